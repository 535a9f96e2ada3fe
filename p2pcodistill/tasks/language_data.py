"""One rank's text in tokens: what it trains on, what is distilled on without labels, and what is held out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from p2pcodistill.config import TrainingConfig
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.hub_text import count_documents, shard_documents, take_held_out
from p2pcodistill.tasks.site_text import (
    comes_from_hub,
    load_held_out,
    load_site_text,
    load_unlabelled,
    require_enough_text,
    require_held_out,
)
from p2pcodistill.tasks.text import Documents
from p2pcodistill.tasks.token_streams import DocumentStreams, Streams, TokenStreams, as_tensor
from p2pcodistill.tasks.vocabulary import Vocabulary


class LanguageData:
    """`streams` are what is trained on, `unlabelled` what is distilled on beside it, if anything; `held_out` are tokens."""

    def __init__(
        self,
        config: LanguageModelConfig,
        training: TrainingConfig,
        vocabulary: Vocabulary,
        *,
        rank: int,
        num_ranks: int,
    ) -> None:
        """Read the text. Raises DataError where there is too little."""
        self._config, self._training = config, training
        self._vocabulary = vocabulary
        self._rank, self._num_ranks = rank, num_ranks
        self.streams: Streams
        if comes_from_hub(config.data) and config.max_data_bytes is None:
            held_out = self._read_held_out()
            self.streams = self._stream_documents()
        else:
            text = load_site_text(config)
            held_out = text.held_out_documents
            self.streams = self._cut(text.train_documents, config.data, training.batch_size, training.seed)
        self.held_out = as_tensor(vocabulary.encode_documents(held_out))
        self.num_held_out_bytes = sum(map(len, held_out))
        require_held_out(len(self.held_out), config)
        self.unlabelled: Streams | None = None
        if config.unlabelled:
            self.unlabelled = self._cut(
                load_unlabelled(config),
                config.unlabelled,
                config.unlabelled_batch_size or training.batch_size,
                training.seed + 1,
            )

    def _cut(
        self, documents: Documents, source: tuple[Path, ...], batch_size: int, seed: int
    ) -> TokenStreams:
        """Streams over text in memory."""
        tokens = as_tensor(self._vocabulary.encode_documents(documents))
        require_enough_text(
            len(tokens), source, self._config, batch_size=batch_size, num_ranks=self._num_ranks
        )
        return TokenStreams(
            tokens,
            batch_size=batch_size,
            window_tokens=self._config.window_tokens,
            seed=seed,
            rank=self._rank,
            num_ranks=self._num_ranks,
        )

    def _read_held_out(self) -> Documents:
        config = self._config
        if config.held_out:
            return load_held_out(config)
        return take_held_out(config.data, config.text_column, config.max_held_out_bytes)

    def _stream_documents(self) -> DocumentStreams:
        """Streams over data sets that stay where they are."""
        config = self._config
        shards = config.shards or tuple(range(config.num_shards))

        def documents_of(epoch: int) -> Iterator[bytes]:
            return shard_documents(
                config.data,
                config.text_column,
                shards=shards,
                num_shards=config.num_shards,
                keeps_held_out=not config.held_out,
                shuffle_seed=(self._training.seed * 1_000_003 + epoch) % 2**31,
            )

        num_documents = count_documents(config.data)
        return DocumentStreams(
            documents_of,
            self._vocabulary,
            batch_size=self._training.batch_size,
            window_tokens=config.window_tokens,
            rank=self._rank,
            num_ranks=self._num_ranks,
            num_documents=num_documents and num_documents * len(shards) // config.num_shards,
        )

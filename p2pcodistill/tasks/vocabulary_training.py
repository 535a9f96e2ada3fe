"""Word pieces from text: what `p2pcodistill vocabulary train` does, and a simulation before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.site_text import split_corpus
from p2pcodistill.tasks.vocabulary import (
    MIN_SIZE,
    SpecialToken,
    decodable_runs,
    import_tokenizers,
    parse_vocabulary,
    split_paragraphs,
    split_sentences,
    write_whole,
)


def train_vocabulary(
    paths: Sequence[Path], path: Path, *, size: int, text_column: str, max_bytes: int | None, stream: TextIO
) -> int:
    """Train word pieces on files and folders, or `hf:` data sets, and tell on `stream` what to do with them.

    Returns the exit status. Raises DataError for text that is missing or too short, and for a file that is there already.
    """
    if path.exists():
        raise DataError(f"{path} is there already: runs may need it; choose another --out, or move it away")
    text = split_corpus(
        paths, text_column=text_column, num_shards=1, max_shard_bytes=max_bytes, max_held_out_bytes=0
    )
    content = train_word_pieces(text.shard_documents[0], size)
    write_whole(path, content)
    vocabulary = parse_vocabulary(content, str(path))
    print(f"{path}: {vocabulary.size} tokens, SHA-256 {vocabulary.digest}", file=stream)
    print(
        f'copy it to all sites of the run, and name it in their files: [task] vocabulary = "{path}"',
        file=stream,
    )
    return 0


def train_word_pieces(documents: Iterable[bytes], size: int) -> bytes:
    """The file of a vocabulary of `size` tokens, the special ones included, made of texts in UTF-8.

    The same texts give the same file. Raises DataError where the library is missing, and for text that is too short.
    """
    if size < MIN_SIZE:
        raise DataError(
            f"a vocabulary of {size}: it needs {MIN_SIZE} or more, for all bytes and the special tokens"
        )
    tokenizers = import_tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(SpecialToken),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sentences = (
        run
        for document in documents
        for paragraph in split_paragraphs(document.decode(errors="surrogateescape"))
        for sentence in split_sentences(paragraph)
        for run in decodable_runs(sentence)
    )
    tokenizer.train_from_iterator(sentences, trainer)
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=False) + len(SpecialToken)
    if num_tokens < size:
        raise DataError(
            f"the text yields {num_tokens} tokens, not {size}: give more text, or a smaller vocabulary"
        )
    content: bytes = tokenizer.to_str().encode()
    return content

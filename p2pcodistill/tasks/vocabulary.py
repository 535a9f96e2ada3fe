"""What a language model's tokens are: bytes, or word pieces (Anil et al. 2018, section 3.1).

Word pieces are merges of bytes (byte-level BPE of the library `tokenizers`, which is optional and imported when needed). So
they are invertible: `decode(encode(text)) == text` for every text. Behind the pieces there are six special tokens: start and
end of a sentence and of a paragraph, end of a document, out of vocabulary. They tell structure and are no text: decoding
leaves them out. What is out of vocabulary is what no text can hold: bytes that are not UTF-8.

A vocabulary's file is a `tokenizer.json` as the library writes it, of the pieces alone. All sites of a run need the same:
the model carries its digest (`tasks.language_model`), so that sites with different ones refuse each other's checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from p2pcodistill.errors import DataError

NUM_BYTE_VALUES = 256
MAX_VOCABULARY_FILE_BYTES = 64 << 20
_REPLACEMENT = "\ufffd"
_BATCH_DOCUMENTS = 256

# Behind an end mark and closing quotes or brackets; a blank line, and what is blank behind it. Linear in time for any text.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+")
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
# Of a model: pieces by chance, with more in them than text, or in place of text. The library may crash on some.
_ALTERING_OPTIONS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "unk_token",
    "fuse_unk",
    "byte_fallback",
)
_UNDECODABLE = re.compile("([\ud800-\udfff])")


class SpecialToken(IntEnum):
    """Tokens behind the last piece, in this order."""

    START_OF_SENTENCE = 0
    END_OF_SENTENCE = 1
    START_OF_PARAGRAPH = 2
    END_OF_PARAGRAPH = 3
    END_OF_DOCUMENT = 4
    OUT_OF_VOCABULARY = 5


MIN_SIZE = NUM_BYTE_VALUES + len(SpecialToken)


class Vocabulary(Protocol):
    """What text is cut into. `digest` tells vocabularies apart; None: bytes, which are all alike."""

    size: int
    digest: str | None

    def encode_documents(self, documents: Iterable[bytes]) -> array[int]:
        """The tokens of texts in UTF-8, one behind the other."""


class ByteVocabulary:
    """Each byte is a token."""

    size = NUM_BYTE_VALUES
    digest: str | None = None

    def encode_documents(self, documents: Iterable[bytes]) -> array[int]:
        """See `Vocabulary`."""
        return array("B", b"".join(documents))


class WordPieces:
    """Pieces that were trained, and the special tokens behind them."""

    def __init__(self, tokenizer: Any, digest: str) -> None:
        """Of a `tokenizers.Tokenizer`; see `load_vocabulary` and `vocabulary_training`."""
        self._tokenizer = tokenizer
        self._num_pieces: int = tokenizer.get_vocab_size(with_added_tokens=False)
        self.size = self._num_pieces + len(SpecialToken)
        self.digest: str | None = digest

    def special(self, token: SpecialToken) -> int:
        """The number of a special token."""
        return self._num_pieces + token

    def encode(self, text: str) -> list[int]:
        """The tokens of a document. Lone surrogates, which stand for bytes that are not UTF-8, are out of vocabulary."""
        return self._encode([text])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; U+FFFD where something was out of vocabulary."""
        parts: list[str] = []
        pieces: list[int] = []
        for token in [*tokens, self.special(SpecialToken.OUT_OF_VOCABULARY)]:
            if token < self._num_pieces:
                pieces.append(token)
            elif token == self.special(SpecialToken.OUT_OF_VOCABULARY):
                parts.append(self._tokenizer.decode(pieces, skip_special_tokens=False))
                pieces = []
        return _REPLACEMENT.join(parts)

    def encode_documents(self, documents: Iterable[bytes]) -> array[int]:
        """See `Vocabulary`."""
        texts = [document.decode(errors="surrogateescape") for document in documents]
        tokens = array("i")
        for start in range(0, len(texts), _BATCH_DOCUMENTS):
            tokens.extend(self._encode(texts[start : start + _BATCH_DOCUMENTS]))
        return tokens

    def _encode(self, texts: Sequence[str]) -> list[int]:
        documents = [
            [
                [decodable_runs(sentence) for sentence in split_sentences(part)]
                for part in split_paragraphs(text)
            ]
            for text in texts
        ]
        runs = [
            run
            for paragraphs in documents
            for sentences in paragraphs
            for sentence in sentences
            for run in sentence
        ]
        encoded = iter(self._tokenizer.encode_batch_fast(runs, add_special_tokens=False))
        special = {token: self.special(token) for token in SpecialToken}
        tokens: list[int] = []
        for paragraphs in documents:
            for sentences in paragraphs:
                tokens.append(special[SpecialToken.START_OF_PARAGRAPH])
                for sentence in sentences:
                    tokens.append(special[SpecialToken.START_OF_SENTENCE])
                    tokens.extend(next(encoded).ids)
                    for _ in sentence[1:]:
                        tokens.append(special[SpecialToken.OUT_OF_VOCABULARY])
                        tokens.extend(next(encoded).ids)
                    tokens.append(special[SpecialToken.END_OF_SENTENCE])
                tokens.append(special[SpecialToken.END_OF_PARAGRAPH])
            tokens.append(special[SpecialToken.END_OF_DOCUMENT])
        return tokens


def split_paragraphs(text: str) -> Iterator[str]:
    """The parts of `text` that end with blank lines; together they are the text."""
    return _split_behind(_PARAGRAPH_END, text)


def split_sentences(paragraph: str) -> Iterator[str]:
    """The parts of `paragraph` that end with an end mark and blanks; together they are the paragraph."""
    return _split_behind(_SENTENCE_END, paragraph)


def _split_behind(boundary: re.Pattern[str], text: str) -> Iterator[str]:
    ends = [0, *(match.end() for match in boundary.finditer(text)), len(text)]
    return (text[start:end] for start, end in pairwise(ends) if start < end)


def decodable_runs(sentence: str) -> list[str]:
    """What is between the lone surrogates of `sentence`: at least one run, each of which may be empty."""
    return _UNDECODABLE.split(sentence)[::2]


# --- files ---------------------------------------------------------------------------------------------------


def load_vocabulary(path: Path | None) -> Vocabulary:
    """The word pieces in the file `path`; bytes without one.

    Raises DataError for a file that is missing or no vocabulary of this kind, and where the library is missing.
    """
    return ByteVocabulary() if path is None else parse_vocabulary(read_vocabulary_file(path), str(path))


def parse_vocabulary(content: bytes, source: str) -> WordPieces:
    """The word pieces in the bytes of a file, which errors call `source`. Raises DataError like `load_vocabulary`."""
    tokenizers = import_tokenizers()
    try:
        _require_invertible(json.loads(content))
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception:  # the library raises plain Exception
        raise DataError(
            f"{source} is not a vocabulary: make one with `p2pcodistill vocabulary train`"
        ) from None
    return WordPieces(tokenizer, digest_of(content))


def read_vocabulary_file(path: Path) -> bytes:
    """The bytes of a vocabulary's file. Raises DataError where there is none, or it is too large to be one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_VOCABULARY_FILE_BYTES + 1)
    except FileNotFoundError:
        raise DataError(
            f"no vocabulary {path}: make one with `p2pcodistill vocabulary train`, the same for all sites"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MAX_VOCABULARY_FILE_BYTES:
        raise DataError(f"{path} is larger than {MAX_VOCABULARY_FILE_BYTES >> 20} MiB: not a vocabulary")
    return content


def keep_vocabulary(path: Path, kept: Path) -> None:
    """Copy the vocabulary of a run beside the run, or see that it still is the one that lies there. Raises DataError."""
    content = read_vocabulary_file(path)
    if not kept.exists():
        write_whole(kept, content)
    elif read_vocabulary_file(kept) != content:
        raise DataError(
            f"{path} is not the vocabulary that this run began with, which is kept in {kept}: restore it, or choose "
            "another run folder"
        )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _require_invertible(table: Any) -> None:
    """Raise ValueError unless it describes byte-level pieces and nothing that would alter text."""
    pieces = table["model"]["vocab"]
    alphabet = import_tokenizers().pre_tokenizers.ByteLevel.alphabet()
    fits = (
        table["model"]["type"] == "BPE"
        and table["pre_tokenizer"]["type"] == table["decoder"]["type"] == "ByteLevel"
        and table["pre_tokenizer"]["add_prefix_space"] is False
        and not any(
            table.get(key)
            for key in ("normalizer", "post_processor", "truncation", "padding", "added_tokens")
        )
        and not any(table["model"].get(key) for key in _ALTERING_OPTIONS)
        and sorted(pieces.values()) == list(range(len(pieces)))
        and all(character in pieces for character in alphabet)
    )
    if not fits:
        raise ValueError("not byte-level pieces")


def digest_of(content: bytes) -> str:
    """The SHA-256 of a vocabulary's file, by which vocabularies are told apart."""
    return hashlib.sha256(content).hexdigest()


def import_tokenizers() -> Any:
    """The library. Raises DataError where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "word pieces need the library tokenizers: pip install 'p2pcodistill[language-model]'"
        ) from None
    return tokenizers

"""Vocabularies: invertible for every text, the same from the same text, and refused where they are something else."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import GENEROUS_S

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.vocabulary import (
    MIN_SIZE,
    ByteVocabulary,
    SpecialToken,
    WordPieces,
    keep_vocabulary,
    load_vocabulary,
    split_paragraphs,
    split_sentences,
)
from p2pcodistill.tasks.vocabulary_training import train_vocabulary, train_word_pieces

DOCUMENTS = [
    b"The cat sat on the mat. The cat sat! Did the cat sit?\n\nThe mat lay on the floor.\n",
    "Grüße aus Köln.\n\n\tEingerückt, «zitiert».\r\n".encode(),
]
SIZE = 290


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "pieces.json"
    path.write_bytes(train_word_pieces(DOCUMENTS, SIZE))
    return path


@pytest.fixture(scope="module")
def pieces(path: Path) -> WordPieces:
    vocabulary = load_vocabulary(path)
    assert isinstance(vocabulary, WordPieces)
    return vocabulary


def test_bytes_are_bytes() -> None:
    vocabulary = load_vocabulary(None)
    assert isinstance(vocabulary, ByteVocabulary)
    assert (vocabulary.size, vocabulary.digest) == (256, None)
    assert vocabulary.encode_documents([b"ab", b"\xff"]).tolist() == [97, 98, 255]


# --- text <-> tokens ---------------------------------------------------------------------------------------------


@given(text=st.text(max_size=200))
def test_what_was_encoded_can_be_decoded(pieces: WordPieces, text: str) -> None:
    tokens = pieces.encode(text)
    assert pieces.decode(tokens) == text
    assert all(0 <= token < pieces.size for token in tokens)
    assert pieces.special(SpecialToken.OUT_OF_VOCABULARY) not in tokens


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\n",
        "\r\n \r\n",
        "\ufeff a\u00a0\u2028b\u3000",
        " leading. And  double.  \n \t\nParagraph",
        "\0 nul, [UNK] <s> </s> <|endoftext|>",
        "👩‍👩‍👧 e\u0301 é",
        "." * 5000 + " " * 5000 + "\n" * 5000,
    ],
)
def test_odd_text_comes_back_to_the_character(pieces: WordPieces, text: str) -> None:
    assert pieces.decode(pieces.encode(text)) == text


def test_structure_is_marked(pieces: WordPieces) -> None:
    tokens = pieces.encode("The cat sat. The mat!\n\nThe floor")
    marks = [token - pieces.special(SpecialToken(0)) for token in tokens]
    sentence = [SpecialToken.START_OF_SENTENCE, SpecialToken.END_OF_SENTENCE]
    assert [SpecialToken(mark) for mark in marks if mark >= 0] == [
        SpecialToken.START_OF_PARAGRAPH,
        *sentence,
        *sentence,
        SpecialToken.END_OF_PARAGRAPH,
        SpecialToken.START_OF_PARAGRAPH,
        *sentence,
        SpecialToken.END_OF_PARAGRAPH,
        SpecialToken.END_OF_DOCUMENT,
    ]


def test_documents_end(pieces: WordPieces) -> None:
    tokens = pieces.encode_documents([b"One.\n", b"Two.\n"]).tolist()
    assert tokens == pieces.encode("One.\n") + pieces.encode("Two.\n")
    assert tokens.count(pieces.special(SpecialToken.END_OF_DOCUMENT)) == 2


def test_what_is_no_text_is_out_of_vocabulary(pieces: WordPieces) -> None:
    tokens = pieces.encode_documents([b"The \xff\xfecat"]).tolist()
    assert tokens.count(pieces.special(SpecialToken.OUT_OF_VOCABULARY)) == 2
    assert pieces.decode(tokens) == "The \ufffd\ufffdcat"


def test_pieces_are_longer_than_bytes(pieces: WordPieces) -> None:
    assert len(pieces.encode("The cat sat on the mat")) < 18


@given(text=st.text(alphabet="a .!?\n\"')\t", max_size=60))
def test_sentences_and_paragraphs_are_all_of_a_text(text: str) -> None:
    assert "".join(split_paragraphs(text)) == text
    assert "".join(split_sentences(text)) == text


def test_sentences_end_behind_quotes_and_blanks() -> None:
    text = 'He said "no." She left!  3.5 times\n'
    assert list(split_sentences(text)) == ['He said "no." ', "She left!  ", "3.5 times\n"]
    assert list(split_paragraphs("a\nb\n \n\n  c\n")) == ["a\nb\n \n\n  ", "c\n"]


# --- files -------------------------------------------------------------------------------------------------------


def test_training_gives_the_size_that_was_asked_for(pieces: WordPieces) -> None:
    assert pieces.size == SIZE
    assert len({pieces.special(token) for token in SpecialToken} | set(range(SIZE - 6))) == SIZE


def test_the_same_text_gives_the_same_file_in_every_process(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from p2pcodistill.tasks.vocabulary_training import train_word_pieces; "
        f"Path(sys.argv[1]).write_bytes(train_word_pieces({DOCUMENTS!r}, {SIZE}))"
    )
    again = tmp_path / "again.json"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, timeout=GENEROUS_S)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("size", "sentence"),
    [(MIN_SIZE - 1, f"it needs {MIN_SIZE} or more"), (5000, "the text yields [0-9]+ tokens, not 5000")],
)
def test_a_size_that_cannot_be_had_is_refused(size: int, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        train_word_pieces(DOCUMENTS, size)


def test_the_command_trains_on_files_and_overwrites_nothing(path: Path, tmp_path: Path) -> None:
    for index, document in enumerate(DOCUMENTS):
        (tmp_path / f"{index}.txt").write_bytes(document)
    out, told = tmp_path / "out.json", io.StringIO()
    arguments: dict[str, Any] = {"size": SIZE, "text_column": "text", "max_bytes": None, "stream": told}
    assert train_vocabulary([tmp_path / "0.txt", tmp_path / "1.txt"], out, **arguments) == 0
    vocabulary = load_vocabulary(out)
    assert vocabulary.size == SIZE and f"SHA-256 {vocabulary.digest}" in told.getvalue()
    with pytest.raises(DataError, match=r"out\.json is there already"):
        train_vocabulary([tmp_path / "0.txt"], out, **arguments)


def changed(path: Path, **changes: Any) -> bytes:
    return json.dumps(json.loads(path.read_text()) | changes).encode()


def test_what_is_no_vocabulary_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    model = json.loads(path.read_text())["model"]
    without = {piece: number for piece, number in model["vocab"].items() if piece != "a"}
    contents = [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        changed(path, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        changed(path, normalizer={"type": "Lowercase"}),
        changed(path, pre_tokenizer={"type": "Whitespace"}),
        changed(path, model=model | {"vocab": without}),
        changed(path, model=model | {"dropout": 0.5}),
        changed(path, model=model | {"continuing_subword_prefix": "##"}),
        changed(path, model=model | {"end_of_word_suffix": "d"}),
        changed(path, model=model | {"unk_token": "a"}),
        changed(path, model=model | {"fuse_unk": True}),
        changed(path, model=model | {"byte_fallback": True}),
    ]
    for content in contents:
        other.write_bytes(content)
        with pytest.raises(DataError, match=r"other.json is not a vocabulary: make one with") as refusal:
            load_vocabulary(other)
        assert "\n" not in str(refusal.value)
    with pytest.raises(DataError, match=r"no vocabulary .*missing\.json: make one with"):
        load_vocabulary(tmp_path / "missing.json")
    with pytest.raises(DataError, match="cannot read"):
        load_vocabulary(tmp_path)


def test_the_vocabulary_of_a_run_is_kept_and_must_not_change(path: Path, tmp_path: Path) -> None:
    own, kept = tmp_path / "own.json", tmp_path / "kept.json"
    own.write_bytes(path.read_bytes())
    for _ in range(2):
        keep_vocabulary(own, kept)
        assert kept.read_bytes() == path.read_bytes()
    own.write_bytes(train_word_pieces([*DOCUMENTS, b"zebra zebra zebra zebra zebra\n"], SIZE))
    with pytest.raises(
        DataError, match=r"own.json is not the vocabulary that this run began with"
    ) as refusal:
        keep_vocabulary(own, kept)
    assert str(kept) in str(refusal.value)


def test_a_missing_library_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'p2pcodistill\[language-model\]'"):
        train_word_pieces(DOCUMENTS, SIZE)
    with pytest.raises(DataError, match=r"pip install 'p2pcodistill\[language-model\]'"):
        load_vocabulary(path)

"""Windows of parallel documents: each token once an epoch, another order each epoch, and resumed where they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.token_streams import DocumentStreams, TokenStreams
from p2pcodistill.tasks.vocabulary import ByteVocabulary

# --- text in memory ----------------------------------------------------------------------------------------------

TOKENS = torch.arange(200, dtype=torch.uint8)


def streams(*, seed: int = 0, rank: int = 0, num_ranks: int = 1) -> TokenStreams:
    return TokenStreams(TOKENS, batch_size=4, window_tokens=6, seed=seed, rank=rank, num_ranks=num_ranks)


def starts(batch: tuple[Tensor, Tensor]) -> list[int]:
    return [int(row[0]) for row in batch[0]]


def test_targets_are_the_next_tokens_and_windows_follow_one_another() -> None:
    source = streams()
    end = None
    for _ in range(8):  # an epoch: (200 / 4 - 1) // 6
        inputs_BT, targets_BT = source.next_batch()
        assert inputs_BT.shape == targets_BT.shape == (4, 6)
        assert torch.equal(targets_BT, (inputs_BT + 1) % 200)
        if end is not None:
            assert torch.equal(inputs_BT[:, 0], end)
        end = targets_BT[:, -1]


def test_an_epoch_visits_nearly_every_token_once_and_the_next_one_in_another_order() -> None:
    source = streams()
    epochs = [torch.cat([source.next_batch()[0].flatten() for _ in range(8)]) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(epoch.unique()) == 4 * 8 * 6
    assert not torch.equal(epochs[0], epochs[1])


def test_sites_with_different_seeds_read_in_different_orders() -> None:
    assert starts(streams(seed=1).next_batch()) != starts(streams(seed=2).next_batch())
    assert starts(streams(seed=1).next_batch()) == starts(streams(seed=1).next_batch())


def test_ranks_share_an_epoch_without_overlap() -> None:
    sources = [streams(rank=rank, num_ranks=2) for rank in range(2)]
    seen = torch.cat([source.next_batch()[0].flatten() for source in sources for _ in range(4)])
    assert len(seen) == len(seen.unique()) == 2 * 4 * 4 * 6


@pytest.mark.parametrize("num_batches", [0, 3, 8, 11])
def test_a_position_is_resumed_exactly(num_batches: int) -> None:
    source, resumed = streams(seed=3), streams(seed=3)
    for _ in range(num_batches):
        source.next_batch()
    resumed.load_state_dict(source.state_dict())
    for _ in range(10):
        assert torch.equal(source.next_batch()[0], resumed.next_batch()[0])


def test_the_shortest_text_is_one_window_a_stream() -> None:
    source = TokenStreams(
        torch.arange(28, dtype=torch.int32), batch_size=4, window_tokens=6, seed=0, rank=0, num_ranks=1
    )
    batches = [source.next_batch() for _ in range(5)]
    assert all(inputs_BT.shape == (4, 6) for inputs_BT, _ in batches)


def test_progress_counts_passes_over_the_data() -> None:
    source = streams()
    assert source.progress() == {"data_passes": 0.0}
    for _ in range(6):
        source.next_batch()
    assert source.progress() == {"data_passes": 6 / 8}
    for _ in range(4):
        source.next_batch()
    assert source.progress() == {"data_passes": 10 / 8}


# --- documents that arrive ---------------------------------------------------------------------------------------

NUM_DOCUMENTS = 7


def documents_of(epoch: int) -> Iterator[bytes]:
    """Documents of different lengths; each byte says from which of them it is, and in which epoch."""
    for index in range(NUM_DOCUMENTS):
        yield bytes([10 * epoch + index]) * (3 + 5 * index)


def document_streams(*, batch_size: int = 2, rank: int = 0, num_ranks: int = 1) -> DocumentStreams:
    return DocumentStreams(
        documents_of,
        ByteVocabulary(),
        batch_size=batch_size,
        window_tokens=4,
        rank=rank,
        num_ranks=num_ranks,
        num_documents=NUM_DOCUMENTS,
    )


def test_each_stream_reads_whole_documents_one_after_the_other() -> None:
    source = document_streams()
    rows = [source.next_batch() for _ in range(20)]
    for stream in range(2):
        read = torch.cat([inputs_BT[stream] for inputs_BT, _ in rows])
        following = torch.cat([targets_BT[stream] for _, targets_BT in rows])
        assert torch.equal(read[1:], following[:-1]), "windows follow one another"
        documents, counts = torch.unique_consecutive(read, return_counts=True)
        assert len(documents) == len(documents.unique()) >= 4, "no document is read twice in an epoch"
        for document, count in list(zip(documents.tolist(), counts.tolist(), strict=True))[:-1]:
            assert count == 3 + 5 * (document % 10)


def test_ranks_read_different_documents() -> None:
    seen = []
    for rank in range(2):
        source = document_streams(batch_size=1, rank=rank, num_ranks=2)
        seen.append(set(torch.cat([source.next_batch()[0].flatten() for _ in range(12)]).tolist()))
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("num_batches", [0, 1, 9, 40])
def test_a_position_among_documents_is_resumed_exactly(num_batches: int) -> None:
    source = document_streams()
    for _ in range(num_batches):
        source.next_batch()
    resumed = document_streams()
    resumed.load_state_dict(source.state_dict())
    assert resumed.progress() == source.progress()
    for _ in range(30):
        assert torch.equal(source.next_batch()[0], resumed.next_batch()[0])


def test_progress_counts_documents_and_passes_where_their_number_is_known() -> None:
    source = document_streams()
    for _ in range(40):
        source.next_batch()
    progress = source.progress()
    assert progress["num_documents_visited"] > NUM_DOCUMENTS, "more than an epoch"
    assert progress["data_passes"] == progress["num_documents_visited"] / NUM_DOCUMENTS
    unknown = DocumentStreams(
        documents_of, ByteVocabulary(), batch_size=1, window_tokens=4, rank=0, num_ranks=1
    )
    assert unknown.progress() == {"num_documents_visited": 0.0}


def test_no_documents_are_an_error() -> None:
    source = DocumentStreams(
        lambda _epoch: iter(()), ByteVocabulary(), batch_size=1, window_tokens=4, rank=0, num_ranks=1
    )
    with pytest.raises(DataError, match="give more text"):
        source.next_batch()

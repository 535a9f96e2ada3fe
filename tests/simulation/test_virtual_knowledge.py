"""What synthetic checkpoints hold, and what is verified once for all sites of a process."""

from __future__ import annotations

import numpy as np
import pytest

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Manifest, Version, digest_chunks, sign_manifest
from p2pcodistill.errors import SignatureError
from p2pcodistill.simulation.virtual import run as virtual_run
from p2pcodistill.simulation.virtual.knowledge import (
    decode_knowledge,
    encode_knowledge,
    hops_of,
    learn,
    learn_own,
    nothing,
    pass_on,
    versions_of,
)
from p2pcodistill.simulation.virtual.run import VerifyMemo, seeded_identity
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel


def test_the_newest_version_wins_and_then_the_shortest_way() -> None:
    mine, theirs = nothing(3), nothing(3)
    learn_own(mine, 0, 4)
    learn_own(theirs, 1, 7)
    learn(mine, pass_on(pass_on(theirs)))  # over two sites
    assert versions_of(mine).tolist() == [4, 7, 0] and hops_of(mine)[:2].tolist() == [0, 2]
    learn(mine, pass_on(theirs))
    assert hops_of(mine)[1] == 1
    learn(mine, pass_on(pass_on(theirs)))
    assert hops_of(mine)[1] == 1
    learn_own(theirs, 1, 8)
    learn(mine, pass_on(pass_on(pass_on(theirs))))
    assert (versions_of(mine)[1], hops_of(mine)[1]) == (8, 3)


def test_the_longest_way_does_not_spoil_the_version() -> None:
    knowledge = nothing(1)
    learn_own(knowledge, 0, 5)
    for _ in range(300):
        knowledge = pass_on(knowledge)
    assert (versions_of(knowledge)[0], hops_of(knowledge)[0]) == (5, 255)
    assert pass_on(nothing(1))[0] == 0


def test_knowledge_travels_as_a_frame_of_any_size() -> None:
    knowledge = np.array([1 << 31, 0, 77], np.uint32)
    data = encode_knowledge(knowledge, 100)
    assert len(data) == 100
    assert decode_knowledge(data, 3).tolist() == knowledge.tolist()


def test_frames_are_scaled_down_as_far_as_chunks_and_knowledge_allow() -> None:
    model = SyntheticModel.of(1_000_000)
    assert (model.num_fp16_bytes, model.keyframe_bytes, model.delta_bytes) == (2_000_000, 1_250_000, 100_000)
    assert model.scale_for(10, chunk_bytes=16 * MIN_CHUNK_BYTES) == 16
    assert model.scale_for(10_000, chunk_bytes=16 * MIN_CHUNK_BYTES) == 2
    assert SyntheticModel.of(1000).scale_for(10_000, chunk_bytes=16 * MIN_CHUNK_BYTES) == 1


def test_what_was_verified_once_is_not_verified_again_and_a_forgery_never_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    berlin, tokyo = (seeded_identity(0, name) for name in ("berlin", "tokyo"))
    assert berlin == seeded_identity(0, "berlin") != seeded_identity(1, "berlin")
    manifest = Manifest(
        "run", "berlin", Version(1, 1), None, "test", bytes(32), 2, 1, MIN_CHUNK_BYTES, digest_chunks(b"x", 1)
    )
    signed = sign_manifest(manifest, berlin)
    num_verified = 0

    def count(*arguments: object) -> object:
        nonlocal num_verified
        num_verified += 1
        return verify(*arguments)

    verify = virtual_run.verify_manifest
    monkeypatch.setattr(virtual_run, "verify_manifest", count)
    memo = VerifyMemo()
    for _ in range(3):
        assert memo(signed.body, signed.signature, berlin.public) == signed
    assert num_verified == 1
    for _ in range(2):
        with pytest.raises(SignatureError):
            memo(signed.body, signed.signature, tokyo.public)
        with pytest.raises(SignatureError):
            memo(signed.body, bytes(64), berlin.public)
    assert num_verified == 5

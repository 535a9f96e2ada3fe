"""Chains: the cheapest way to a version, and what an origin keeps of its own frames."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES, cheapest_path, reachable, worth_keeping
from p2pcodistill.checkpoint.manifest import Version


class Frame(NamedTuple):
    version: Version
    base: Version | None
    num_bytes: int


def at(step: int) -> Version:
    return Version(1, step)


def key(step: int, num_bytes: int = 100) -> Frame:
    return Frame(at(step), None, num_bytes)


def delta(step: int, num_bytes: int = 10, *, base: int | None = None) -> Frame:
    return Frame(at(step), at(step - 1 if base is None else base), num_bytes)


def deltas(first: int, last: int, num_bytes: int = 10) -> list[Frame]:
    return [delta(step, num_bytes) for step in range(first, last + 1)]


@st.composite
def graphs(draw: st.DrawFn) -> list[Frame]:
    """A few frames between versions 1 to 6, in any order: gaps, doubles and dead ends included."""
    frames = []
    for _ in range(draw(st.integers(0, 8))):
        step = draw(st.integers(1, 6))
        base = draw(st.none() | st.integers(0, step - 1))
        frames.append(Frame(at(step), None if base is None else at(base), draw(st.integers(1, 5))))
    return frames


def all_paths(frames: Sequence[Frame], held: Version | None, target: Version) -> Iterator[list[Frame]]:
    """Every path to `target`, found backwards."""
    for frame in frames:
        if frame.version != target:
            continue
        if frame.base is None or frame.base == held:
            yield [frame]
        if frame.base is not None:
            for path in all_paths(frames, held, frame.base):
                yield [*path, frame]


# --- paths -----------------------------------------------------------------------------------------------------------


@given(graphs(), st.none() | st.integers(0, 6).map(at), st.integers(1, 6).map(at))
def test_no_path_is_cheaper(frames: list[Frame], held: Version | None, target: Version) -> None:
    path = cheapest_path(frames, held, target)

    if held == target:
        assert path == []
        return
    costs = [(sum(f.num_bytes for f in one), len(one)) for one in all_paths(frames, held, target)]
    if path is None:
        assert costs == []
        return
    assert (sum(frame.num_bytes for frame in path), len(path)) == min(costs)
    assert path[0].base in (None, held)
    assert path[-1].version == target
    for before, after in itertools.pairwise(path):
        assert after.base == before.version


@given(graphs())
def test_what_is_reachable_is_the_highest_version_with_a_path_from_nothing(frames: list[Frame]) -> None:
    versions = {frame.version for frame in frames}
    with_path = {version for version in versions if cheapest_path(frames, None, version)}

    assert reachable(frames) == max(with_path, default=None)


def test_the_newest_version_is_the_target_unless_another_is_named() -> None:
    frames = [key(1), *deltas(2, 4)]

    assert cheapest_path(frames, at(2)) == [delta(3), delta(4)]
    assert cheapest_path(frames, None, at(2)) == [key(1), delta(2)]
    assert cheapest_path(frames, at(4)) == []
    assert cheapest_path([], None) is None
    assert cheapest_path([], at(1), at(1)) == []


def test_a_keyframe_overtakes_deltas_that_cost_more_and_only_those() -> None:
    frames = [key(1), *deltas(2, 5), key(5, num_bytes=25)]

    assert cheapest_path(frames, at(3)) == [delta(4), delta(5)]
    assert cheapest_path(frames, at(2)) == [key(5, num_bytes=25)]
    assert cheapest_path(frames, None) == [key(5, num_bytes=25)]


def test_of_paths_that_cost_the_same_the_shorter_one_is_taken() -> None:
    assert cheapest_path([key(1, 80), *deltas(2, 3), key(3, 100)], None) == [key(3, 100)]


def test_a_path_goes_on_across_incarnations() -> None:
    renewed = Frame(Version(2, 1), at(3), 10)

    assert cheapest_path([key(1), *deltas(2, 3), renewed], at(2)) == [delta(3), renewed]


def test_a_path_that_is_too_long_does_not_count_but_a_dearer_and_shorter_one_does() -> None:
    longest = [key(1), *deltas(2, MAX_CHAIN_FRAMES)]
    assert cheapest_path(longest, None) == longest
    assert reachable(longest) == at(MAX_CHAIN_FRAMES)

    too_long = [*longest, delta(MAX_CHAIN_FRAMES + 1)]
    assert cheapest_path(too_long, None) is None
    assert cheapest_path(too_long, at(1)) == too_long[1:]
    assert reachable(too_long) == at(MAX_CHAIN_FRAMES)

    shortcut = key(2, num_bytes=1000)
    assert cheapest_path([*too_long, shortcut], None) == [shortcut, *too_long[2:]]


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_everything_is_kept_while_the_deltas_cost_no_more_than_the_keyframe() -> None:
    frames = [key(1), *deltas(2, 11)]

    assert worth_keeping(frames) == frames
    assert worth_keeping(frames[::-1]) == frames
    assert worth_keeping([key(1)]) == [key(1)]
    assert worth_keeping([]) == []


def test_dearer_deltas_take_the_oldest_and_the_keyframe_away() -> None:
    assert worth_keeping([key(1), *deltas(2, 12)]) == deltas(3, 12)


def test_the_newest_keyframe_sets_the_limit_even_where_the_caller_keeps_it_no_more() -> None:
    assert worth_keeping(deltas(2, 12), keyframe_bytes=30) == deltas(10, 12)
    assert worth_keeping(deltas(2, 12)) == deltas(2, 12)
    assert worth_keeping([key(1, 1000), *deltas(2, 12), key(12, 20)]) == [*deltas(11, 12), key(12, 20)]


def test_a_keyframe_stays_with_all_the_deltas_after_it_and_the_cheap_ones_before() -> None:
    frames = [key(1), *deltas(2, 5), key(5), *deltas(6, 7)]

    assert worth_keeping(frames) == [*deltas(2, 4), delta(5), key(5), *deltas(6, 7)]


def test_of_an_earlier_chain_nothing_leads_to_the_newest_frame() -> None:
    relaunched = Frame(Version(2, 3), None, 90)
    newest = Frame(Version(2, 4), Version(2, 3), 10)

    assert worth_keeping([key(1), *deltas(2, 5), relaunched, newest]) == [relaunched, newest]


def test_the_newest_frame_stays_at_any_price() -> None:
    assert worth_keeping([key(1), delta(2, 10), delta(3, 500)]) == [delta(3, 500)]


@pytest.mark.parametrize("num_deltas", [MAX_CHAIN_FRAMES - 1, MAX_CHAIN_FRAMES])
def test_a_kept_chain_is_a_path(num_deltas: int) -> None:
    frames = [key(0, num_bytes=10**6), *deltas(1, num_deltas)]

    kept = worth_keeping(frames)

    if num_deltas < MAX_CHAIN_FRAMES:
        assert cheapest_path(kept, None) == kept == frames
    else:
        assert kept == frames[2:]


@given(graphs(), st.none() | st.integers(1, 10))
def test_what_is_kept_does_not_change_when_it_is_asked_again(
    frames: list[Frame], keyframe_bytes: int | None
) -> None:
    kept = worth_keeping(frames, keyframe_bytes=keyframe_bytes)

    assert worth_keeping(kept, keyframe_bytes=keyframe_bytes) == kept or keyframe_bytes is None
    assert set(kept) <= set(frames)
    assert max((f.version for f in kept), default=None) == max((f.version for f in frames), default=None)

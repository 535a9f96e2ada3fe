"""Lingering: for students, then to tell teachers, and for neither longer than it is worth."""

import asyncio
import contextlib

import pytest
from patience import GENEROUS_S

from p2pcodistill import linger as lingering
from p2pcodistill.linger import linger


class Neighbours:
    """What gossip would know, set by hand."""

    def __init__(self, *, students_finished: bool, teachers_told: bool) -> None:
        self.students_finished, self.teachers_told = students_finished, teachers_told
        self.moved, self.stop = asyncio.Event(), asyncio.Event()

    def learn(self, *, students_finished: bool | None = None, teachers_told: bool | None = None) -> None:
        """Something has become known."""
        if students_finished is not None:
            self.students_finished = students_finished
        if teachers_told is not None:
            self.teachers_told = teachers_told
        self.moved.set()

    def linger(self, linger_s: float = 1e6) -> asyncio.Task[None]:
        """Linger in the background."""
        return asyncio.create_task(linger(self, self.moved, self.stop, linger_s=linger_s))


async def has_ended(task: asyncio.Task[None]) -> bool:
    """After everything that could happen now has happened."""
    for _ in range(20):
        await asyncio.sleep(0)
    return task.done()


async def end_of(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(GENEROUS_S):
        await task


async def test_a_site_whose_teacher_is_away_just_then_waits_to_tell_it():
    neighbours = Neighbours(students_finished=True, teachers_told=False)
    task = neighbours.linger()
    neighbours.learn()
    assert not await has_ended(task)
    neighbours.learn(teachers_told=True)
    await end_of(task)


async def test_students_are_waited_for_first():
    neighbours = Neighbours(students_finished=False, teachers_told=True)
    task = neighbours.linger()
    assert not await has_ended(task)
    neighbours.learn(students_finished=True, teachers_told=False)
    assert not await has_ended(task)
    neighbours.learn(teachers_told=True)
    await end_of(task)


async def test_who_waits_for_nobody_leaves_at_once():
    await end_of(Neighbours(students_finished=True, teachers_told=True).linger())


@pytest.mark.parametrize("students_finished", [False, True])
async def test_a_signal_and_no_time_to_linger_end_it(students_finished):
    neighbours = Neighbours(students_finished=students_finished, teachers_told=False)
    await end_of(neighbours.linger(linger_s=0.0))
    task = neighbours.linger()
    assert not await has_ended(task)
    neighbours.stop.set()
    await end_of(task)


async def test_teachers_that_are_gone_cost_a_moment_only(monkeypatch):
    monkeypatch.setattr(lingering, "TELL_TIMEOUT_S", 0.05)
    await end_of(Neighbours(students_finished=True, teachers_told=False).linger())
    waiting = Neighbours(students_finished=False, teachers_told=False).linger()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(waiting)
    assert not waiting.done(), "students have their whole time"
    waiting.cancel()

"""What stands for the group of a site in virtual time, as its node sees it, and the frames that it hands over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Ranks(Protocol):
    """What the group of a site does. It publishes by `VirtualSite.publish`, and is told what it has to know."""

    @property
    def num_steps(self) -> int:
        """Completed updates."""

    def launch(self) -> None:
        """The node is up: begin, or go on from the last training checkpoint."""

    def kill(self) -> None:
        """The node was killed, and the group with it."""

    def leave(self, done: Callable[[], None]) -> None:
        """The node was asked to stop: keep what a later launch needs, end at a step boundary, then call `done`."""

    def take_offer(self, origin: str) -> None:
        """The chain that the store has of a teacher leads further than before."""

    def make_keyframe(self) -> None:
        """A student needs a keyframe of what was published last."""

    def slow_down(self, factor: float) -> None:
        """Take `factor` times as long as at first for each update from now on."""

    def forget(self) -> None:
        """The disk is empty, while the node is down: the next launch begins from nothing."""

    def corrupt(self) -> None:
        """Publish ruined weights from now on."""


@dataclass(frozen=True, slots=True)
class EncodedBytes:
    """An encoded frame, as ranks hand it to their node. Its base is the frame that was handed over before it."""

    step: int
    is_keyframe: bool
    codec: str
    schema_hash: bytes
    num_fp16_bytes: int
    data: bytes

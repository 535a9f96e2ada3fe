"""Groups that train nothing: they publish checkpoints of the right size at the right times, and pass on what they know.

What such a checkpoint holds is its site's knowledge (`knowledge`), padded to the size of a real one, of which it may be a
scaled-down likeness: on the links and in events each of its bytes stands for several.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.knowledge import (
    BYTES_PER_MEMBER,
    Knowledge,
    decode_knowledge,
    encode_knowledge,
    learn,
    learn_own,
    nothing,
    take_over,
)
from p2pcodistill.simulation.virtual.ranks import EncodedBytes
from p2pcodistill.simulation.virtual.site import VirtualSite
from p2pcodistill.telemetry import training_events

_MAX_DELTAS = MAX_CHAIN_FRAMES // 2
"""As many delta frames of a teacher in a row are replaced by a keyframe, as real ranks do."""

OnKnowledge = Callable[[float, str, Knowledge], None]
"""(virtual seconds, site, what has just arrived there, counted from its origins)."""


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """Sizes of a model's frames, in bytes on the links."""

    num_fp16_bytes: int
    keyframe_bytes: int
    delta_bytes: int

    @classmethod
    def of(
        cls, num_parameters: int, *, keyframe_ratio: float = 1.6, delta_ratio: float = 20.0
    ) -> SyntheticModel:
        """A model of that size whose frames are so many times smaller than raw fp16."""
        num_fp16_bytes = 2 * num_parameters
        return cls(
            num_fp16_bytes,
            max(1, round(num_fp16_bytes / keyframe_ratio)),
            max(1, round(num_fp16_bytes / delta_ratio)),
        )

    def scale_for(self, num_members: int, *, chunk_bytes: int) -> int:
        """How many bytes on the links a byte in memory can stand for: chunks and knowledge have their least sizes."""
        smallest_bytes = min(self.keyframe_bytes, self.delta_bytes)
        return max(1, min(chunk_bytes // MIN_CHUNK_BYTES, smallest_bytes // (BYTES_PER_MEMBER * num_members)))


@dataclass(frozen=True, slots=True)
class SyntheticSchedule:
    """When a group publishes: `num_versions` times, `interval_steps` apart, the first time after `first_step` steps."""

    num_versions: int
    interval_steps: int
    step_time_s: float
    first_step: int = 0


class SyntheticRanks:
    """The pretence of a group at one site. Each teacher that arrives is in use at once, and `turns`, one table for each
    exchange, used in turn, has those that go into a version."""

    def __init__(
        self,
        site: VirtualSite,
        members: tuple[str, ...],
        turns: Sequence[Mapping[str, float]],
        model: SyntheticModel,
        schedule: SyntheticSchedule,
        clock: VirtualClock,
        *,
        bytes_scale: int = 1,
        on_knowledge: OnKnowledge | None = None,
    ) -> None:
        self._site, self._clock, self._on_knowledge = site, clock, on_knowledge
        self._model, self._schedule, self._scale = model, schedule, bytes_scale
        self._turns = turns
        self._num_members = len(members)
        self._member = members.index(site.name)
        self._schema_hash = hashlib.sha256(b"synthetic").digest()
        self._knowledge = nothing(self._num_members)
        self._held: dict[str, Knowledge] = {}  # the newest of each teacher, passed on
        self._num_kept: dict[str, int] = {}  # per teacher, frames of its chain when a keyframe took its place
        self._num_published = 0
        self._num_deltas = 0
        self._needs_keyframe = True
        self._last_step = 0
        self._factor = 1.0
        self._is_corrupt = False
        self._launch = 0
        # Steps were counted last at a moment, from which on the speed has been what it is.
        self._counted_steps, self._counted_s = 0.0, 0.0
        self._is_running = False

    @property
    def num_steps(self) -> int:
        """Completed updates."""
        return int(self._steps_now() + 1e-9)

    @property
    def has_finished(self) -> bool:
        """Whether all versions are published."""
        return self._num_published == self._schedule.num_versions

    def launch(self) -> None:
        """See `ranks.Ranks`."""
        self._launch += 1
        self._needs_keyframe = True
        self._counted_s, self._is_running = self._clock.now_s, True
        self._site.report(
            training_events.TrainingStarted(
                self.num_steps, self._step_of(self._schedule.num_versions - 1), 0, 1, "virtual", "none"
            )
        )
        for teacher in self._site.teachers:
            if self._site.store.chain(teacher):
                self.take_offer(teacher)
        self._wait()

    def kill(self) -> None:
        """See `ranks.Ranks`. What was done since the last version was published is done again."""
        self._halt()
        self._counted_steps = float(self._last_step)

    def leave(self, done: Callable[[], None]) -> None:
        """See `ranks.Ranks`."""
        self._halt()
        done()

    def take_offer(self, origin: str) -> None:
        """See `ranks.Ranks`."""
        chain = self._site.store.chain(origin)
        version = chain[-1].version
        data = chain[-1].chunks[0]
        taken = self._held[origin] = take_over(data, self._num_members)
        self._site.report(
            training_events.TeacherSwapped(self.num_steps, origin, version.incarnation, version.step)
        )
        if origin in self._turn():
            self._tell(taken)
        if len(chain) > _MAX_DELTAS:
            knowledge = decode_knowledge(data, self._num_members)
            frame = self._encode(version.step, knowledge, is_keyframe=True)
            self._site.keep_keyframe(origin, version, frame)

    def make_keyframe(self) -> None:
        """See `ranks.Ranks`. Where no delta frame followed the last keyframe, the next frame has to do."""
        if self._num_deltas:
            self._num_deltas = 0
            self._site.publish(self._encode(self._last_step, self._knowledge, is_keyframe=True))

    def slow_down(self, factor: float) -> None:
        """See `ranks.Ranks`."""
        self._count()
        self._factor = factor
        self._launch += 1
        if self._is_running:
            self._wait()

    def forget(self) -> None:
        """See `ranks.Ranks`. It publishes all versions anew."""
        self._knowledge = nothing(self._num_members)
        self._held.clear()
        self._num_published = self._num_deltas = self._last_step = 0
        self._counted_steps = 0.0

    def corrupt(self) -> None:
        """See `ranks.Ranks`. Ruined weights teach nothing."""
        self._is_corrupt = True

    # --- inside ------------------------------------------------------------------------------------------------------

    def _turn(self) -> Mapping[str, float]:
        """Who teaches until the next version."""
        return self._turns[self._num_published % len(self._turns)]

    def _tell(self, knowledge: Knowledge) -> None:
        if self._on_knowledge is not None:
            self._on_knowledge(self._clock.now_s, self._site.name, knowledge)

    def _steps_now(self) -> float:
        if not self._is_running:
            return self._counted_steps
        elapsed_s = self._clock.now_s - self._counted_s
        return self._counted_steps + elapsed_s / (self._schedule.step_time_s * self._factor)

    def _halt(self) -> None:
        self._count()
        self._is_running = False
        self._launch += 1

    def _count(self) -> None:
        self._counted_steps, self._counted_s = self._steps_now(), self._clock.now_s

    def _step_of(self, index: int) -> int:
        return self._schedule.first_step + index * self._schedule.interval_steps

    def _wait(self) -> None:
        """Publish the next version when its step comes."""
        if not self.has_finished:
            num_left = max(0.0, self._step_of(self._num_published) - self._counted_steps)
            at_s = self._counted_s + num_left * self._schedule.step_time_s * self._factor
            self._clock.call_at(max(at_s, self._clock.now_s), self._publish, self._launch)

    def _publish(self, launch: int) -> None:
        if launch != self._launch:
            return
        if self._is_corrupt:
            self._knowledge = nothing(self._num_members)
        else:
            for teacher in self._turn():
                if teacher in self._held:
                    learn(self._knowledge, self._held[teacher])
            learn_own(self._knowledge, self._member, self._num_published + 1)
        self._last_step = self._step_of(self._num_published)
        self._num_published += 1
        if len(self._turns) > 1:  # others teach from now on
            for teacher in self._turn():
                if teacher in self._held:
                    self._tell(self._held[teacher])
        is_keyframe, self._needs_keyframe = self._needs_keyframe, False
        self._num_deltas = 0 if is_keyframe else self._num_deltas + 1
        self._site.publish(self._encode(self._last_step, self._knowledge, is_keyframe=is_keyframe))
        if self.has_finished:
            if self._num_deltas * self._model.delta_bytes > self._model.keyframe_bytes:
                self.make_keyframe()  # as real ranks do: nobody will be here to make one when a student asks
            self._count()
            self._site.report(training_events.TrainingEnded(self._last_step, True, 0.0, self._clock.now_s))
            self._site.finish()
        self._wait()

    def _encode(self, step: int, knowledge: Knowledge, *, is_keyframe: bool) -> EncodedBytes:
        model, scale = self._model, self._scale
        num_bytes = -(-(model.keyframe_bytes if is_keyframe else model.delta_bytes) // scale)
        return EncodedBytes(
            step,
            is_keyframe,
            "synthetic",
            self._schema_hash,
            -(-model.num_fp16_bytes // scale),
            encode_knowledge(knowledge, num_bytes),
        )

"""What the ranks meet in these tests: a node's end of the link, and nothing else of a node."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from patience import GENEROUS_S

from p2pcodistill.config import (
    GROUP_SPEC_VARIABLE,
    CodistillationConfig,
    FramesConfig,
    GroupConfig,
    GroupSpec,
    TrainingConfig,
)
from p2pcodistill.errors import MalformedError
from p2pcodistill.group import exchange as exchange_module
from p2pcodistill.group.link import NodeLink
from p2pcodistill.group.link_messages import (
    EventHappened,
    FrameOffer,
    FrameReady,
    FrameTaken,
    Joined,
    NodeOrder,
    RankMessage,
    VersionKnown,
    Welcome,
)
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import from_record

torch.set_num_threads(1)

Message = TypeVar("Message", bound=RankMessage)

TOKEN = "token"


class StubNode:
    """Welcomes rank 0 with `offers` and `known`, and records, in order, what the latest launch says.

    Answers each frame at once, with `accepts`, unless that is None.
    """

    def __init__(self, folder: Path) -> None:
        self.offers: tuple[FrameOffer, ...] = ()
        self.known: tuple[VersionKnown, ...] = ()
        self.accepts: bool | None = True
        self.messages: list[RankMessage] = []
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._link: NodeLink = self._call(self._open, folder)
        self._served = asyncio.run_coroutine_threadsafe(self._serve(), self._loop)

    def _call(self, function, *arguments):
        async def run():
            return await function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(GENEROUS_S)

    async def _open(self, folder: Path) -> NodeLink:
        link = NodeLink(folder / "link")
        self.address = link.open()
        link.expect(TOKEN)
        return link

    async def _serve(self) -> None:
        while True:
            with contextlib.suppress(MalformedError):
                message = await self._link.receive()
                if isinstance(message, Joined):
                    await self._link.send(Welcome(self.offers, self.known))
                if isinstance(message, FrameReady) and self.accepts is not None:
                    await self._link.send(FrameTaken(message.step, message.base_step, self.accepts))
                with self._changed:
                    if isinstance(message, Joined):
                        self.messages.clear()  # what an earlier launch said late is not listened to
                    self.messages.append(message)
                    self._changed.notify_all()

    def send(self, message: NodeOrder) -> None:
        self._call(self._link.send, message)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds after a message."""
        with self._changed:
            assert self._changed.wait_for(condition, GENEROUS_S), self.messages

    def wait_for_event(self, kind: type[Event]) -> None:
        """Wait until the latest launch has reported an event of that kind."""
        self.wait_for(lambda: any(isinstance(event, kind) for event in self.events))

    @property
    def events(self) -> list[Event]:
        return [from_record(m.record) for m in self.messages if isinstance(m, EventHappened)]

    def all(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.messages if isinstance(message, kind)]

    @property
    def frames(self) -> list[FrameReady]:
        return self.all(FrameReady)

    def close(self) -> None:
        self._served.cancel()

        async def finish() -> None:
            self._link.close()

        self._call(finish)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def stub_node(tmp_path: Path) -> Iterator[StubNode]:
    node = StubNode(tmp_path)
    yield node
    node.close()


@pytest.fixture
def spec(stub_node: StubNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GroupSpec:
    """A tiny run on text of its own, without teachers, that joins the stub node."""
    data = tmp_path / "data.txt"
    data.write_text("".join(f"line {index} of the text\n" for index in range(400)))
    (tmp_path / "outbox").mkdir()  # a node's run folder has one
    # The test process is no rank: it must not die with its parent.
    monkeypatch.setattr(exchange_module, "die_with_parent", lambda: None)
    return GroupSpec(
        site="berlin",
        link_address=stub_node.address,
        link_token=TOKEN,
        outbox_folder=tmp_path / "outbox",
        training_folder=tmp_path / "training",
        model_path=tmp_path / "model.safetensors",
        error_path=tmp_path / "error.txt",
        teachers=({},),
        num_students=1,
        group=GroupConfig(device="cpu"),
        task=LanguageModelConfig(
            data=(data,), embedding_size=8, hidden_size=16, window_tokens=8, max_held_out_bytes=600
        ),
        training=TrainingConfig(
            num_steps=12,
            batch_size=4,
            evaluation_interval_steps=5,
            checkpoint_interval_steps=6,
            report_interval_steps=4,
            precision="float32",
        ),
        codistillation=CodistillationConfig(
            burn_in_steps=2, exchange_interval_steps=5, agreement_interval_steps=1
        ),
        frames=FramesConfig(),
    )


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[GroupSpec], Path]:
    """Hand a spec to this process as a node would."""

    def write(spec: GroupSpec) -> Path:
        path = tmp_path / "group.json"
        path.write_text(spec.model_dump_json())
        monkeypatch.setenv(GROUP_SPEC_VARIABLE, str(path))
        return path

    return write

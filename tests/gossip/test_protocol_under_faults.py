"""Three sites, any order of deliveries, and every fault that links, disks and neighbours have in stock.

The machine checks what must hold at every moment (`conftest.Node` asserts that nothing unverified is stored or offered, that
credit and every want stay within the window and that offers only get newer; no honest message may be refused as
malformed), and in the end, once the faults are over, that every
student holds the newest checkpoint of its teachers.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES
from p2pcodistill.gossip.messages import (
    Announce,
    Chunk,
    Lane,
    Payload,
    Want,
    decode_message,
    encode_message,
)
from p2pcodistill.gossip.protocol import (
    FramePublished,
    IncarnationRaised,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    Ticked,
    TrainingFinished,
)
from p2pcodistill.gossip.transfer import MAX_BAD_CHUNKS

TEACHERS = {"berlin": ("tokyo", "lima"), "tokyo": ("berlin",), "lima": ("tokyo",)}
PAIRS = (("berlin", "tokyo"), ("berlin", "lima"), ("tokyo", "lima"))
SITES = tuple(TEACHERS)
LINKS = (*PAIRS, *((b, a) for a, b in PAIRS))
STUDENTS = {site: tuple(s for s in SITES if site in TEACHERS[s]) for site in SITES}

pairs = st.sampled_from(PAIRS)
links = st.sampled_from(LINKS)
names = st.sampled_from(SITES)
lanes = st.sampled_from(Lane)


class Network(RuleBasedStateMachine):
    """Nodes joined by queues, one per direction and lane, that the rules deliver from and do harm to."""

    sites: Any
    faults: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_delivered = 0
        self.num_restarts = 0
        self.steps = dict.fromkeys(SITES, 0)
        self.num_lives = dict.fromkeys(SITES, 0)
        self.queues: dict[tuple[str, str], dict[Lane, deque[Payload]]] = {
            link: {lane: deque() for lane in Lane} for link in LINKS
        }
        self.seen: dict[tuple[str, str], list[Payload]] = {link: [] for link in LINKS}
        self.num_corrupted: Counter[tuple[str, str]] = Counter()
        self.is_open = dict.fromkeys(PAIRS, False)
        self.nodes = {site: self.new_node(site, None) for site in SITES}
        self.raise_incarnations()
        for pair in PAIRS:
            self.open(pair)
        for site in SITES:
            self.publish(site, num_chunks=5, steps=9)  # far ahead of what follows a lost disk
        self.flow(num_control=30, num_bulk=0)

    # --- what is done by hand ----------------------------------------------------------------------------------

    def new_node(self, site: str, store: Any) -> Any:
        return self.sites.node(
            site,
            teachers=TEACHERS[site],
            students=STUDENTS[site],
            store=store,
            window_bytes=3 * MIN_CHUNK_BYTES,
        )

    def raise_incarnations(self, *sites: str) -> None:
        """What a node does before it launches its group."""
        for site in sites or SITES:
            self.nodes[site].store.incarnation += 1
            self.feed(site, IncarnationRaised(self.nodes[site].store.incarnation))

    def feed(self, site: str, event: Any) -> list[str]:
        """Hand over an event; the reasons of what was refused in it."""
        node = self.nodes[site]
        node.now_s = self.now_s
        node.feed(event)
        refused = [reason for _, reason in node.refusals()]
        self.faults.update(refused)
        node.events.clear()
        while node.sent:
            action = node.sent.popleft()
            if self.is_open.get((site, action.peer), self.is_open.get((action.peer, site))):
                self.queues[site, action.peer][action.lane].append(action.payload)
        return refused

    def open(self, pair: tuple[str, str]) -> None:
        self.is_open[pair] = True
        for site, peer in (pair, pair[::-1]):
            self.feed(site, PeerOpened(peer))

    def close(self, pair: tuple[str, str]) -> None:
        self.is_open[pair] = False
        for site, peer in (pair, pair[::-1]):
            for queue in self.queues[site, peer].values():
                queue.clear()
            self.feed(site, PeerClosed(peer, "cut"))

    def close_all(self, site: str) -> None:
        for pair in PAIRS:
            if site in pair and self.is_open[pair]:
                self.close(pair)

    def deliver_one(self, link: tuple[str, str], lane: Lane) -> None:
        source, destination = link
        payload = self.queues[link][lane].popleft()
        self.seen[link].append(payload)
        self.num_delivered += 1
        assert "malformed" not in self.feed(destination, PayloadReceived(source, payload))

    def settle(self) -> None:
        """Deliver everything; let time pass until nothing more comes of it."""
        num_quiet = 0
        while num_quiet < 3:
            busy = [(link, lane) for link in LINKS for lane in Lane if self.queues[link][lane]]
            for link, lane in busy:
                while self.queues[link][lane]:
                    self.deliver_one(link, lane)
            num_quiet = 0 if busy else num_quiet + 1
            self.now_s += 1e6  # beyond any patience
            for site in SITES:
                self.feed(site, Ticked())

    def frames_match(self) -> bool:
        """Whether every student holds the newest frame of each of its teachers."""
        newest = {site: self.nodes[site].store.newest() for site in SITES}
        return all(
            newest[student].get(teacher) == newest[teacher].get(teacher)
            for student, teachers in TEACHERS.items()
            for teacher in teachers
        )

    # --- the plain way -----------------------------------------------------------------------------------------

    @rule(site=names, num_chunks=st.integers(1, 7), steps=st.integers(1, 3))
    def publish(self, site: str, num_chunks: int, steps: int) -> None:
        node = self.nodes[site]
        self.steps[site] += steps
        frame = self.sites.frame(
            site,
            self.steps[site],
            incarnation=node.store.incarnation,
            num_chunks=num_chunks,
            content=f"life {self.num_lives[site]}",
        )
        node.store.frames[frame.frame_id] = frame
        self.publish_frame(site, frame)

    def publish_frame(self, site: str, frame: Any) -> None:
        self.feed(site, FramePublished(frame.signed))
        self.nodes[site].prune()

    @rule(link=links, lane=lanes, num_payloads=st.integers(1, 6))
    def deliver(self, link: tuple[str, str], lane: Lane, num_payloads: int) -> None:
        for _ in range(min(num_payloads, len(self.queues[link][lane]))):
            self.deliver_one(link, lane)

    @rule(num_control=st.integers(0, 12), num_bulk=st.integers(0, 8))
    def flow(self, num_control: int, num_bulk: int) -> None:
        """What links do most of the time; where it stops, some frames are half on their way."""
        for lane, num_payloads in ((Lane.CONTROL, num_control), (Lane.BULK, num_bulk)):
            for _ in range(num_payloads):
                busy = [link for link in LINKS if self.queues[link][lane]]
                if busy:
                    self.deliver_one(busy[self.num_delivered % len(busy)], lane)

    @rule(seconds=st.sampled_from([1.0, 5.0, 11.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        for site in SITES:
            self.feed(site, Ticked())
            self.nodes[site].prune()

    # --- faults ------------------------------------------------------------------------------------------------

    @rule(pair=pairs)
    def cut(self, pair: tuple[str, str]) -> None:
        if self.is_open[pair]:
            self.faults["cut"] += 1
            self.close(pair)

    @rule(pair=pairs)
    def reopen(self, pair: tuple[str, str]) -> None:
        if not self.is_open[pair]:
            self.open(pair)

    @precondition(lambda self: any(self.queues[link][Lane.BULK] for link in LINKS))
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from([link for link in LINKS if self.queues[link][Lane.BULK]]))
        chunk = decode_message(self.queues[link][Lane.BULK].popleft())
        assert isinstance(chunk, Chunk)
        wrong = Chunk(chunk.frame_id, chunk.index, bytes(len(chunk.data)))
        self.num_corrupted[link[1], chunk.frame_id] += 1
        self.faults["corrupted chunk"] += 1
        self.feed(link[1], PayloadReceived(link[0], encode_message(wrong)))

    @precondition(lambda self: any(self.queues[link][Lane.BULK] for link in LINKS))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from([link for link in LINKS if self.queues[link][Lane.BULK]]))
        self.queues[link][Lane.BULK].popleft()
        self.faults["lost chunk"] += 1

    @rule(link=links, kind=st.sampled_from([Announce, Chunk, Want]), data=st.data())
    def replay(self, link: tuple[str, str], kind: type, data: st.DataObject) -> None:
        earlier = [payload for payload in self.seen[link] if isinstance(decode_message(payload), kind)]
        if earlier:
            payload = data.draw(st.sampled_from(earlier))
            self.faults["replay"] += 1
            self.feed(link[1], PayloadReceived(link[0], payload))

    @rule(link=links, garbage=st.none() | st.binary(max_size=20))
    def lie(self, link: tuple[str, str], garbage: bytes | None) -> None:
        source, destination = link
        forged = self.sites.frame(source, step=1, incarnation=99, signer="stranger")
        if garbage is None:
            self.faults["forgery"] += 1
            payload = encode_message(Announce(forged.signed.body, forged.signed.signature))
        else:
            self.faults["garbage"] += 1
            payload = (b"\xc1", garbage)
        self.feed(destination, PayloadReceived(source, payload))
        assert forged.frame_id not in self.nodes[destination].gossip.frames_in_use(self.now_s)

    @precondition(lambda self: self.num_restarts < 3)
    @rule(site=names)
    def restart(self, site: str) -> None:
        self.faults["restart"] += 1
        self.num_restarts += 1
        self.close_all(site)
        self.nodes[site] = self.new_node(site, self.nodes[site].store)
        self.raise_incarnations(site)

    @precondition(lambda self: not any(self.num_lives.values()))
    @rule(site=names)
    def lose_the_disk(self, site: str) -> None:
        self.faults["lost disk"] += 1
        self.close_all(site)
        self.steps[site] = 0
        self.num_lives[site] += 1
        self.nodes[site] = self.new_node(site, None)
        # Nobody sends again what was said to a site that has no memory of it.
        for link in LINKS:
            if site in link:
                self.seen[link].clear()
        self.raise_incarnations(site)

    # --- the end -----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        for pair in PAIRS:
            self.reopen(pair)
        self.settle()
        was_memory_lost = any(self.num_lives.values())
        was_source_given_up = max(self.num_corrupted.values(), default=0) >= MAX_BAD_CHUNKS
        if not was_memory_lost and not was_source_given_up:
            self.faults["healed without a new checkpoint"] += 1
            assert self.frames_match()

        for site in SITES:
            self.publish(site, num_chunks=4, steps=1)
            self.feed(site, TrainingFinished())
        self.settle()
        assert self.frames_match()
        for node in self.nodes.values():
            assert node.gossip.students_finished
            node.prune()
            # Of a life that its origin has forgotten, half a frame may stay until that life's version is passed.
            assert was_memory_lost or not node.store.partials


def test_every_student_ends_with_the_newest_checkpoint_of_its_teachers(sites: Any) -> None:
    faults: Counter[str] = Counter()
    machine = type("Network", (Network,), {"sites": sites, "faults": faults})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )

    injected = (
        "cut",
        "corrupted chunk",
        "lost chunk",
        "replay",
        "forgery",
        "garbage",
        "restart",
        "lost disk",
    )
    noticed = ("bad-checksum", "bad-signature", "malformed", "replayed", "healed without a new checkpoint")
    assert [fault for fault in (*injected, *noticed) if not faults[fault]] == []

"""Three sites and a relay, any order of deliveries, and every fault that links, disks, ranks and neighbours have in stock.

Two of the sites have a teacher in common and tell each other of its frames; all relay, and oslo does nothing else. At times
one site cannot reach its teacher at all, even in the end.

The machine checks what must hold at every moment (`conftest.Node` asserts that nothing unverified is stored or offered, that
every want stays within the window and that every offer is a chain that leads further than the one before; no honest message
may be refused as malformed; nobody asks for a path more often than something happens), and in the end, once the faults are
over, that the chains of every student lead to the newest checkpoint of its teachers.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version, claimed_origin
from p2pcodistill.gossip.codec import decode_message, encode_message
from p2pcodistill.gossip.download import MAX_BAD_CHUNKS
from p2pcodistill.gossip.events import (
    ChainBroken,
    FramePublished,
    IncarnationRaised,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    Ticked,
    TrainingFinished,
)
from p2pcodistill.gossip.messages import (
    Announce,
    CatchUp,
    Chunk,
    Finished,
    Follow,
    Gone,
    Have,
    Lane,
    Payload,
    Unfollow,
    Want,
)
from p2pcodistill.telemetry.node_events import FrameFetched, FrameRelayed, PeerQuarantined

TEACHERS = {"berlin": ("tokyo", "lima"), "tokyo": ("berlin",), "lima": ("tokyo",)}
SITES = tuple(TEACHERS)
RELAY = "oslo"
NODES = (*SITES, RELAY)
PAIRS = (("berlin", "tokyo"), ("berlin", "lima"), ("tokyo", "lima"), ("tokyo", "oslo"), ("lima", "oslo"))
BLOCKABLE = ("tokyo", "lima")
LINKS = (*PAIRS, *((b, a) for a, b in PAIRS))
STUDENTS = {site: tuple(s for s in SITES if site in TEACHERS[s]) for site in SITES}

pairs = st.sampled_from(PAIRS)
links = st.sampled_from(LINKS)
names = st.sampled_from(SITES)
nodes = st.sampled_from(NODES)
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
        self.num_lives = dict.fromkeys(NODES, 0)
        self.is_blocked = False
        self.queues: dict[tuple[str, str], dict[Lane, deque[Payload]]] = {
            link: {lane: deque() for lane in Lane} for link in LINKS
        }
        self.seen: dict[tuple[str, str], list[Payload]] = {link: [] for link in LINKS}
        self.bases: dict[str, Version | None] = dict.fromkeys(SITES)
        self.broken: set[tuple[str, str]] = set()
        self.misled: set[tuple[str, str]] = (
            set()
        )  # pairs of which one may have lost its trust in this session
        self.needs_new_sessions = False  # something was given up until there is news
        self.num_corrupted: Counter[tuple[str, str]] = Counter()
        self.is_open = dict.fromkeys(PAIRS, False)
        self.nodes = {site: self.new_node(site, None) for site in NODES}
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
            teachers=TEACHERS.get(site, ()),
            students=STUDENTS.get(site, ()),
            store=store,
            window_bytes=3 * MIN_CHUNK_BYTES,
            students_of=STUDENTS,
            relay=True,
        )

    def raise_incarnations(self, *sites: str) -> None:
        """What a node does before it launches its group."""
        for site in sites or SITES:
            if site == RELAY:
                continue
            self.bases[site] = None
            self.nodes[site].is_keyframe_wanted = False
            self.nodes[site].store.incarnation += 1
            self.feed(site, IncarnationRaised(self.nodes[site].store.incarnation))

    def feed(self, site: str, event: Any) -> list[str]:
        """Hand over an event; the reasons of what was refused in it."""
        node = self.nodes[site]
        node.now_s = self.now_s
        node.feed(event)
        self.faults["keyframe requested"] += node.num_keyframes_requested
        node.num_keyframes_requested = 0
        fetched = [event.kind for event in node.events if isinstance(event, FrameFetched)]
        self.faults["delta frame fetched"] += fetched.count("delta")
        self.faults["fetched to pass it on"] += sum(isinstance(event, FrameRelayed) for event in node.events)
        self.faults["quarantine"] += sum(isinstance(event, PeerQuarantined) for event in node.events)
        refused = [reason for _, reason in node.refusals()]
        self.faults.update(refused)
        node.events.clear()
        while node.sent:
            action = node.sent.popleft()
            if self.is_open[self.pair_of(site, action.peer)]:
                self.queues[site, action.peer][action.lane].append(action.payload)
        return refused

    @staticmethod
    def pair_of(a: str, b: str) -> tuple[str, str]:
        return (a, b) if (a, b) in PAIRS else (b, a)

    def open(self, pair: tuple[str, str]) -> None:
        if self.is_blocked and pair == BLOCKABLE:
            return
        self.is_open[pair] = True
        self.misled.discard(pair)
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
        message = decode_message(payload)
        self.faults["path"] += isinstance(message, Announce) and message.num_more == 0
        self.faults["catch-up"] += isinstance(message, CatchUp)
        self.faults["gone"] += isinstance(message, Gone)
        self.faults["partial source"] += isinstance(message, Have)
        self.faults["told by another"] += isinstance(message, Announce) and (
            claimed_origin(message.body) != source
        )
        self.faults["followed"] += isinstance(message, Follow) and message.origin != destination
        refused = self.feed(destination, PayloadReceived(source, payload))
        assert "malformed" not in refused or self.pair_of(*link) in self.misled

    def settle(self) -> None:
        """Deliver everything, make what keyframes are wanted; let time pass until nothing more comes of it."""
        num_quiet = num_rounds = num_turns = 0
        while num_quiet < 3:
            num_rounds += 1
            assert num_rounds < 200, "they do not come to rest"
            for site in SITES:
                self.oblige(site, num_chunks=5)
            num_quiet += 1
            while busy := [(link, lane) for link in LINKS for lane in Lane if self.queues[link][lane]]:
                for link, lane in busy:
                    message = decode_message(self.queues[link][lane][0])
                    if not isinstance(message, Follow | Unfollow):  # a relay is looked for for ever
                        num_quiet = 0
                    self.deliver_one(link, lane)
                num_turns += 1
                assert num_turns < 10_000, "they go on for ever"
            self.now_s += 1e6  # beyond any patience
            for site in NODES:
                self.feed(site, Ticked())

    def frames_match(self) -> bool:
        """Whether every student holds a chain to the newest version of each of its teachers, and has handed it on."""
        for student, teachers in TEACHERS.items():
            for teacher in teachers:
                newest = self.nodes[teacher].store.frames_of(teacher)[-1].version
                if self.nodes[student].store.held(teacher) != newest:
                    return False
        return True

    # --- the plain way -----------------------------------------------------------------------------------------

    @rule(site=names, num_chunks=st.sampled_from([1, 1, 1, 2, 3, 5, 7]), steps=st.integers(1, 3))
    def publish(self, site: str, num_chunks: int, steps: int) -> None:
        """The next frame of a chain: a keyframe if it is the first of this launch, else a delta frame."""
        node = self.nodes[site]
        self.steps[site] += steps
        base = self.bases[site]
        if base is not None:  # published in this launch, but perhaps renewed since
            base = Version(node.store.incarnation, base.step)
        frame = self.sites.frame(
            site,
            self.steps[site],
            incarnation=node.store.incarnation,
            num_chunks=num_chunks if base is None else (num_chunks + 1) // 2,
            content=f"life {self.num_lives[site]}",
            base=base,
            num_fp16_bytes=8 * MIN_CHUNK_BYTES,
        )
        self.bases[site] = frame.version
        self.publish_frame(site, frame)

    @rule(site=names, num_chunks=st.integers(3, 7))
    def oblige(self, site: str, num_chunks: int) -> None:
        """The ranks make the keyframe that was requested, if this launch has published anything that it could be of."""
        node, version = self.nodes[site], self.bases[site]
        if not node.is_keyframe_wanted or version is None:
            return
        node.is_keyframe_wanted = False
        frame = self.sites.frame(
            site,
            version.step,
            incarnation=node.store.incarnation,
            num_chunks=num_chunks,
            content=f"life {self.num_lives[site]}, on request",
            num_fp16_bytes=8 * MIN_CHUNK_BYTES,
        )
        self.faults["keyframe made"] += 1
        self.publish_frame(site, frame)

    def publish_frame(self, site: str, frame: Any) -> None:
        self.nodes[site].store.frames[frame.frame_id] = frame
        self.feed(site, FramePublished(frame.signed))
        self.nodes[site].prune()

    @rule(link=links, lane=lanes, num_payloads=st.integers(1, 6))
    def deliver(self, link: tuple[str, str], lane: Lane, num_payloads: int) -> None:
        for _ in range(min(num_payloads, len(self.queues[link][lane]))):
            self.deliver_one(link, lane)

    @rule(num_control=st.integers(0, 12), num_bulk=st.integers(0, 12))
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
        for site in NODES:
            self.feed(site, Ticked())
            self.nodes[site].prune()

    # --- faults ------------------------------------------------------------------------------------------------

    @rule(pair=pairs)
    def cut(self, pair: tuple[str, str]) -> None:
        if self.is_open[pair]:
            self.faults["cut"] += 1
            self.close(pair)

    @rule(is_blocked=st.booleans())
    def block(self, is_blocked: bool) -> None:
        """Two sites that share an edge cannot connect."""
        self.is_blocked = is_blocked
        if is_blocked and self.is_open[BLOCKABLE]:
            self.faults["blocked"] += 1
            self.close(BLOCKABLE)

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

    @rule(link=links, kind=st.sampled_from([Announce, Chunk, Want, Finished]), data=st.data())
    def replay(self, link: tuple[str, str], kind: type, data: st.DataObject) -> None:
        earlier = [payload for payload in self.seen[link] if isinstance(decode_message(payload), kind)]
        if earlier:
            payload = data.draw(st.sampled_from(earlier))
            message = decode_message(payload)
            self.faults["replay"] += 1
            if isinstance(message, Announce) and message.num_more is not None:
                # Only the peer itself can do that within a session; its true answer may be taken for a false one then.
                self.misled.add(self.pair_of(*link))
                self.needs_new_sessions = True
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

    @rule(link=links, member=names)
    def lie_about_an_end(self, link: tuple[str, str], member: str) -> None:
        source, destination = link
        if source != member != destination:
            self.faults["forged end"] += 1
            forged = self.sites.finished(member, incarnation=99, signer=source)
            refused = self.feed(destination, PayloadReceived(source, encode_message(forged)))
            is_heard = source in self.nodes[destination].gossip.peers_ready
            assert (
                "bad-signature" in refused
                or not is_heard
                or "quarantined" in refused
                or "flooding" in refused
            )

    @rule(site=nodes, is_full=st.sampled_from([True, True, True, False]))
    def fill_or_clear_the_disk(self, site: str, is_full: bool) -> None:
        self.nodes[site].refuses = "oversized" if is_full else None
        self.needs_new_sessions |= is_full

    @rule(data=st.data())
    def break_chain(self, data: st.DataObject) -> None:
        """The ranks cannot apply what they were offered."""
        edges = [(site, teacher) for site, teachers in TEACHERS.items() for teacher in teachers]
        held = [(site, teacher) for site, teacher in edges if self.nodes[site].store.chain(teacher)]
        if held:
            site, teacher = data.draw(st.sampled_from(held))
            self.faults["broken chain"] += 1
            self.needs_new_sessions |= (site, teacher) in self.broken
            self.broken.add((site, teacher))
            self.feed(site, ChainBroken(teacher))

    @rule(site=names, data=st.data())
    def lose_an_own_frame(self, site: str, data: st.DataObject) -> None:
        """The disk of a teacher spoils a file; nobody there notices until it is wanted."""
        frames = self.nodes[site].store.frames
        own = [frame.frame_id for frame in self.nodes[site].store.frames_of(site)[:-1]]
        if own:
            self.faults["lost frame"] += 1
            del frames[data.draw(st.sampled_from(own))]
            self.needs_new_sessions = True

    @precondition(lambda self: self.num_restarts < 3)
    @rule(site=nodes)
    def restart(self, site: str) -> None:
        self.faults["restart"] += 1
        self.num_restarts += 1
        self.close_all(site)
        self.nodes[site] = self.new_node(site, self.nodes[site].store)
        self.raise_incarnations(site)

    @precondition(lambda self: self.num_restarts < 3)
    @rule(site=names, num_control=st.integers(0, 12))
    def finish_and_begin_again(self, site: str, num_control: int) -> None:
        """The training of a site is over; then it is started once more, to train on."""
        self.faults["begun again"] += 1
        self.feed(site, TrainingFinished())
        self.flow(num_control, num_bulk=0)
        self.restart(site)

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
        for site in NODES:
            self.fill_or_clear_the_disk(site, False)
        was_memory_lost = any(self.num_lives.values())
        was_source_given_up = max(self.num_corrupted.values(), default=0) >= MAX_BAD_CHUNKS
        for pair in PAIRS:
            if self.is_open[pair] and (was_source_given_up or self.needs_new_sessions):
                self.close(pair)
            self.reopen(pair)
        self.settle()
        if not was_memory_lost and None not in self.bases.values():
            self.faults["healed without a new checkpoint"] += 1
            assert self.frames_match()

        for site in SITES:
            self.publish(site, num_chunks=4, steps=1)
        self.settle()
        assert self.frames_match()
        assert not any(self.nodes[site].gossip.students_finished for site in SITES)
        for site in SITES:
            self.feed(site, TrainingFinished())
        self.settle()
        if self.is_blocked:
            self.faults["never connected"] += 1
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
            max_examples=300,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )

    injected = (
        "cut",
        "blocked",
        "never connected",
        "corrupted chunk",
        "lost chunk",
        "replay",
        "forgery",
        "forged end",
        "begun again",
        "garbage",
        "restart",
        "lost disk",
        "lost frame",
        "broken chain",
        "oversized",
    )
    noticed = ("bad-checksum", "bad-signature", "malformed", "replayed", "healed without a new checkpoint")
    shared = ("told by another", "partial source", "followed", "fetched to pass it on")
    caught_up = ("delta frame fetched", "catch-up", "path", "gone", "keyframe requested", "keyframe made")
    assert [fault for fault in (*injected, *noticed, *shared, *caught_up) if not faults[fault]] == []

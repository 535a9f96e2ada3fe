"""What the links with the neighbours carry, put together from both directions, and what follows from it for own frames.

Downloads are measured by gossip's windows, uploads by the transport's receipts. What is seen at best within the last seconds
of traffic counts: an idle link has not become slower. Caps of the configuration count as links of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.telemetry.node_events import LinkMeasured
from p2pcodistill.transport.base import Traffic
from p2pcodistill.transport.shaper import BYTES_PER_MBIT, UploadCaps

CHUNK_S = 0.5
"""How long a chunk takes on the slowest link to a student: a cut costs little, and deadlines stay near."""
LEAST_CHUNK_BYTES = 64 << 10
LARGEST_WANTED_CHUNK_BYTES = 512 << 10
"""On a fast link it counts what each chunk costs the processor; larger ones cost more again, for want of memory at hand."""
MIN_CHUNKS = 64
"""Of a frame whose chunks are larger than by default: peers are to have something for each other."""
MAX_CHUNKS = 4096
"""Of a frame, where MAX_CHUNK_BYTES allows: a manifest of 128 KiB."""
MIN_MOVED_BYTES = 1 << 16
"""Less traffic than this since the last measurement of a link is not worth another one."""


def choose_chunk_bytes(num_frame_bytes: int, slowest_bytes_s: float | None) -> int:
    """The size of the chunks of a frame, a power of two. `slowest_bytes_s`: of the students' links, where it is known."""
    chunk_bytes = DEFAULT_CHUNK_BYTES
    if slowest_bytes_s is not None:
        wanted_bytes = min(max(CHUNK_S * slowest_bytes_s, LEAST_CHUNK_BYTES), LARGEST_WANTED_CHUNK_BYTES)
        chunk_bytes = 1 << (int(wanted_bytes).bit_length() - 1)
        while chunk_bytes > DEFAULT_CHUNK_BYTES and chunk_bytes * MIN_CHUNKS > num_frame_bytes:
            chunk_bytes //= 2
    while chunk_bytes * MAX_CHUNKS < num_frame_bytes and chunk_bytes < MAX_CHUNK_BYTES:
        chunk_bytes *= 2
    return chunk_bytes


class LinkMeter:
    """This site's links, of which those to `students` bear its own frames; `caps` are on what it sends.

    `traffic` is the transport's, `downloads` gossip's, and `num_waiting_bytes` says what a peer waits for here.
    """

    def __init__(
        self,
        students: Collection[str],
        caps: UploadCaps,
        traffic: Callable[[], Mapping[str, Traffic]],
        downloads: Callable[[], Mapping[str, LinkEstimate]],
        num_waiting_bytes: Callable[[str], int],
    ) -> None:
        self._students, self._caps = tuple(students), caps
        self._traffic, self._downloads, self._num_waiting_bytes = traffic, downloads, num_waiting_bytes
        self._num_losses: Counter[str] = Counter()
        self._reported: dict[str, tuple[int, int]] = {}

    def lose(self, peer: str) -> None:
        """A session with `peer` ended."""
        self._num_losses[peer] += 1

    def measure(self) -> list[LinkMeasured]:
        """What has changed: of each link over which something moved, or which was lost, since the last call."""
        downloads, measured = self._downloads(), []
        for peer, traffic in self._traffic().items():
            num_moved_bytes = traffic.num_bytes_sent + traffic.num_bytes_received
            num_reported_bytes, num_reported_losses = self._reported.get(peer, (0, 0))
            num_losses = self._num_losses[peer]
            if num_moved_bytes - num_reported_bytes < MIN_MOVED_BYTES and num_losses == num_reported_losses:
                continue
            self._reported[peer] = (num_moved_bytes, num_losses)
            download = downloads.get(peer) or LinkEstimate()
            round_trips_s = [s for s in (download.round_trip_s, traffic.round_trip_s) if s is not None]
            measured.append(
                LinkMeasured(
                    peer=peer,
                    upload_mbit=_mbit(traffic.rate_bytes_s),
                    download_mbit=_mbit(download.rate_bytes_s),
                    round_trip_ms=round(1000 * min(round_trips_s), 3) if round_trips_s else None,
                    num_connection_losses=num_losses,
                    queued_bytes=traffic.num_bytes_under_way + self._num_waiting_bytes(peer),
                )
            )
        return measured

    def student_rates_bytes_s(self) -> list[float]:
        """What the links to the students carry, as far as it was measured or is capped, the slowest first."""
        traffic, site_bytes_s = self._traffic(), self._caps.site_bytes_s
        share_bytes_s = None if site_bytes_s is None else site_bytes_s / max(1, len(self._students))
        rates_bytes_s = []
        for student in self._students:
            measured_bytes_s = traffic[student].rate_bytes_s if student in traffic else None
            limits = (measured_bytes_s, self._caps.link_bytes_s.get(student), share_bytes_s)
            known = [limit for limit in limits if limit is not None]
            rates_bytes_s += [min(known)] if known else []
        return sorted(rates_bytes_s)

    def shared_rate_bytes_s(self) -> float | None:
        """What own frames may count on: all students but the slowest quarter can follow. None while nothing is known.

        A student that is slower is not the measure for the others: it falls behind and catches up with a keyframe. Of up to
        three students none is left out.
        """
        rates_bytes_s = self.student_rates_bytes_s()
        return rates_bytes_s[len(rates_bytes_s) // 4] if rates_bytes_s else None

    def chunk_bytes(self, num_frame_bytes: int) -> int:
        """The size of the chunks of an own frame that is published now."""
        return choose_chunk_bytes(num_frame_bytes, next(iter(self.student_rates_bytes_s()), None))


def _mbit(rate_bytes_s: float | None) -> float | None:
    return None if rate_bytes_s is None else round(rate_bytes_s / BYTES_PER_MBIT, 3)

"""What a site's links with its neighbours do, in words."""

from __future__ import annotations

from collections.abc import Mapping

from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.table import ABSENT, byte_count, number
from p2pcodistill.telemetry.node_events import LinkMeasured

MAX_ROWS = 200


def link_sentence(link: LinkMeasured) -> str:
    """All that was measured of one link."""
    parts = []
    if link.upload_mbit is not None:
        parts.append(f"{mbit(link.upload_mbit)} Mbit/s up")
    if link.download_mbit is not None:
        parts.append(f"{mbit(link.download_mbit)} Mbit/s down")
    if link.round_trip_ms is not None:
        parts.append(f"{link.round_trip_ms:.{0 if link.round_trip_ms >= 10 else 1}f} ms there and back")
    if link.queued_bytes:
        parts.append(f"{byte_count(link.queued_bytes)} waiting")
    if link.num_connection_losses:
        parts.append(
            f"lost {link.num_connection_losses} times" if link.num_connection_losses > 1 else "lost once"
        )
    return ", ".join(parts) or "not measured yet"


def rate_mbit(link: LinkMeasured) -> float:
    """What it carries in the direction in which it carries less; infinite where nothing is known of either."""
    known = [rate for rate in (link.upload_mbit, link.download_mbit) if rate is not None]
    return min(known, default=float("inf"))


def mbit(rate_mbit: float) -> str:
    """A bandwidth with three digits at most."""
    return (
        f"{rate_mbit:.2g}" if rate_mbit < 1 else f"{rate_mbit:.1f}" if rate_mbit < 100 else f"{rate_mbit:.0f}"
    )


def link_rows(sites: Mapping[str, SiteHistory]) -> list[list[str]]:
    """The cells of a table, a row for each site and peer: rates, round trip, losses, most that waited, refusals from it, and
    how often it was not listened to or did not answer. At most MAX_ROWS, of more those that carry least."""
    about = [
        (site, name, peer)
        for site, history in sites.items()
        for name, peer in history.peers.items()
        if peer.is_measured or peer.num_refusals or peer.num_suspicions or peer.num_quarantines
    ]
    if len(about) > MAX_ROWS:
        about = sorted(about, key=lambda row: row[2].upload_mbit or float("inf"))[:MAX_ROWS]
    return [
        [
            site,
            name,
            ABSENT if peer.upload_mbit is None else mbit(peer.upload_mbit),
            ABSENT if peer.download_mbit is None else mbit(peer.download_mbit),
            number(peer.round_trip_ms),
            str(peer.num_connection_losses),
            byte_count(peer.max_queued_bytes),
            str(peer.num_refusals),
            str(peer.num_quarantines),
            str(peer.num_suspicions),
        ]
        for site, name, peer in about
    ]

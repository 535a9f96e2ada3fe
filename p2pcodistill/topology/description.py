"""`p2pcodistill topology`: what a graph means for a run, before there is one, as text, JSON or a picture.

Everything follows from the graph, a model's size and how densely its checkpoints are coded; nothing is measured here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from p2pcodistill.errors import ConfigError, IdentityError, TopologyError
from p2pcodistill.identity import check_site_name
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.density import CODEC_BITS
from p2pcodistill.topology.graph import LinkAttributes, Topology
from p2pcodistill.topology.named import MAX_SITES
from p2pcodistill.topology.statistics import (
    Range,
    diameter,
    longest_way_s,
    measure_spread,
    num_students,
    num_teachers,
    num_teachers_at_once,
    spectral_gap,
)

TEACHER_SHARE = 1 / 3
"""A teacher's forward pass, of a training step's forward and backward."""
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the figures of a topology depend on beside itself. Raises ConfigError for numbers that make no sense."""

    num_parameters: float = 100e6
    bits: float = CODEC_BITS["adaptive"]
    """Bits a weight that travel."""
    step_s: float = 0.1
    exchange_interval_steps: int = 50
    exchange_interval_s: float | None = None
    """None: `exchange_interval_steps` of `step_s`."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                flag = {"num_parameters": "parameters"}.get(name, name).replace("_", "-")
                raise ConfigError(f"--{flag} must be a number above 0, not {value:g}")

    @property
    def num_checkpoint_bytes(self) -> float:
        """Of one checkpoint as it travels."""
        return self.num_parameters * self.bits / 8

    @property
    def interval_s(self) -> float:
        """Seconds between two exchanges of a site."""
        if self.exchange_interval_s is not None:
            return self.exchange_interval_s
        return self.exchange_interval_steps * self.step_s

    @property
    def interval_steps(self) -> float:
        """Training steps between two exchanges of a site."""
        return self.interval_s / self.step_s


def members_for(spec: str, members: Sequence[str] | None, num_sites: int | None) -> tuple[str, ...]:
    """The sites to build `spec` over: `members` if given, else `num_sites` with the names 0, 1, ..., else those that `spec`
    itself speaks of. Raises TopologyError, ConfigError."""
    if members is None and num_sites is None:
        members = default_members(spec)
        if members is None:
            raise ConfigError(
                f"{spec} takes any number of sites: say how many with -n 8, or who with --members a,b,c"
            )
    elif members is None:
        assert num_sites is not None
        if not 1 <= num_sites <= MAX_SITES:
            raise ConfigError(f"-n must be from 1 to {MAX_SITES:,}, not {num_sites:,}")
        members = tuple(map(str, range(num_sites)))
    try:
        return tuple(check_site_name(member) for member in members)
    except IdentityError as error:
        raise TopologyError(f"{spec}: {error}") from None


def describe(
    spec: str,
    *,
    members: Sequence[str] | None,
    num_sites: int | None,
    assumptions: Assumptions,
    picture: Path | None,
    as_json: bool,
    stream: TextIO,
) -> int:
    """Print the figures of the topology `spec`, and draw it into the file `picture`. Raises UserError, OSError."""
    if picture is not None and picture.suffix not in PICTURE_SUFFIXES:
        raise ConfigError(f"--draw {picture}: name a file that ends in {', '.join(PICTURE_SUFFIXES)}")
    topology = build_topology(spec, members_for(spec, members, num_sites))
    facts = figures(topology, assumptions)
    if picture is not None:
        from p2pcodistill.topology.drawing import save_picture  # late: matplotlib takes a while

        save_picture(topology, picture, title=spec)
    if as_json:
        print(json.dumps({"topology": spec, **facts}, indent=2), file=stream)
        return 0
    for line in _lines(spec, facts, assumptions):
        print(line, file=stream)
    if picture is not None:
        print(f"drawn in {picture}", file=stream)
    return 0


def figures(topology: Topology, assumptions: Assumptions) -> dict[str, Any]:
    """All figures as one JSON object; what cannot be told is None."""
    spread = measure_spread(topology)
    at_once, teachers = num_teachers_at_once(topology), num_teachers(topology)
    students = num_students(topology)
    num_bytes = assumptions.num_checkpoint_bytes
    count = len(topology.members)
    num_all_reduce_bytes = (
        2 * (count - 1) / count * _FP32_BYTES * assumptions.num_parameters * assumptions.interval_steps
    )
    slowest = _slowest_link(topology, num_bytes)
    return {
        "num_sites": count,
        "num_edges": sum(len(topology.teachers_of(member)) for member in topology.members),
        "period_exchanges": topology.period,
        "teachers_at_once": asdict(at_once),
        "teachers": asdict(teachers),
        "students": asdict(students),
        "diameter_hops": diameter(topology),
        "spectral_gap": spectral_gap(topology),
        "spread_exchanges": None if spread.cut_off else spread.most,
        "spread_mean_exchanges": spread.mean,
        "spread_s": None if spread.cut_off else _spread_s(topology, spread.most, assumptions, slowest),
        "cut_off": spread.cut_off and {"origin": spread.cut_off[0], "never_reached": spread.cut_off[1]},
        "checkpoint_bytes": num_bytes,
        "upload_bytes": {key: value * num_bytes for key, value in asdict(students).items()},
        "download_bytes": {key: value * num_bytes for key, value in asdict(teachers).items()},
        "all_reduce_bytes": num_all_reduce_bytes,
        "slowest_link": slowest and {"from": slowest[0][0], "to": slowest[0][1], "checkpoint_s": slowest[1]},
        "teacher_compute_ratio": {key: value * TEACHER_SHARE for key, value in asdict(at_once).items()},
    }


def transfer_s(link: LinkAttributes | None, num_bytes: float) -> float:
    """Seconds that `num_bytes` take along an otherwise idle link: its bandwidth, and its delay once."""
    if link is None:
        return 0.0
    sending_s = 0.0 if link.bandwidth_mbit is None else num_bytes * 8 / (link.bandwidth_mbit * 1e6)
    return sending_s + link.latency_ms / 1000


def _slowest_link(topology: Topology, num_bytes: float) -> tuple[tuple[str, str], float] | None:
    """The edge over which a checkpoint takes longest, and how long; None where nothing is known of links."""
    if not topology.links:
        return None
    ends = max(topology.links, key=lambda ends: transfer_s(topology.links[ends], num_bytes))
    return ends, transfer_s(topology.links[ends], num_bytes)


def _spread_s(
    topology: Topology,
    num_exchanges: int,
    assumptions: Assumptions,
    slowest: tuple[tuple[str, str], float] | None,
) -> float:
    if slowest is None:
        return num_exchanges * assumptions.interval_s
    if (
        topology.period > 1
    ):  # who teaches when matters more than which way is quickest: the slowest link at each exchange
        return num_exchanges * (assumptions.interval_s + slowest[1])
    num_bytes = assumptions.num_checkpoint_bytes
    return longest_way_s(
        topology, lambda a, b: assumptions.interval_s + transfer_s(topology.links.get((a, b)), num_bytes)
    )


# --- text --------------------------------------------------------------------------------------------------------------


def _lines(spec: str, facts: dict[str, Any], assumptions: Assumptions) -> list[str]:
    period = facts["period_exchanges"]
    is_schedule = period > 1
    at_once = Range(**facts["teachers_at_once"])
    teachers, students = Range(**facts["teachers"]), Range(**facts["students"])
    gap, hops, interval_s = facts["spectral_gap"], facts["diameter_hops"], assumptions.interval_s
    pace = f"{_seconds(interval_s)} an exchange"
    if assumptions.exchange_interval_s is None:
        pace += f" ({assumptions.exchange_interval_steps} steps of {assumptions.step_s:g} s)"
    rows: list[tuple[str, str]] = [
        ("sites", f"{facts['num_sites']:,}"),
        ("edges, teacher -> student", f"{facts['num_edges']:,}"),
    ]
    if is_schedule:
        rows += [
            ("schedule", f"repeats after {period:,} exchanges"),
            ("teachers at a time", _range(at_once)),
        ]
    rows += [
        ("teachers of a site", _range(teachers)),
        ("students of a site", _range(students)),
        (
            "diameter",
            "none: some sites cannot learn from some others" if hops is None else _counted(hops, "hop"),
        ),
        ("spectral gap", "not computed for so many sites" if gap is None else _gap(gap)),
    ]
    if is_schedule and gap is not None:
        rows[-1] = (
            "spectral gap an exchange",
            _gap(gap) if gap < 1 else "1.000: averages are exact within a period",
        )
    if facts["cut_off"]:
        ends = facts["cut_off"]
        rows.append(
            (
                "knowledge reaches everyone",
                f"never: {ends['never_reached']} learns nothing of {ends['origin']}",
            )
        )
    else:
        mean = f"{facts['spread_mean_exchanges']:.1f}"
        rows += [
            (
                "knowledge reaches everyone",
                f"after {_counted(facts['spread_exchanges'], 'exchange')}, mean {mean}",
            ),
            ("  that is", f"{_seconds(facts['spread_s'])}, at {pace}{_with_links(facts)}"),
        ]
    size = f"{_scaled(assumptions.num_parameters)} parameters at {assumptions.bits:g} bits"
    all_reduce = facts["all_reduce_bytes"]
    rows += [
        ("a checkpoint", f"{_bytes(facts['checkpoint_bytes'])}: {size}"),
        ("upload a site and exchange", _range_of_bytes(facts["upload_bytes"])),
        ("download a site and exchange", _range_of_bytes(facts["download_bytes"])),
    ]
    if all_reduce and (most := max(facts["upload_bytes"]["most"], facts["download_bytes"]["most"])):
        rows.append(
            (
                "  fp32 ring all-reduce",
                f"{_bytes(all_reduce)} each way in these {assumptions.interval_steps:,.0f} steps, "
                f"{all_reduce / most:,.0f} times as much",
            )
        )
    if facts["slowest_link"]:
        rows.append(("slowest link", _link_line(facts["slowest_link"], interval_s)))
    compute = facts["teacher_compute_ratio"]
    share = f"+{compute['mean']:.0%} of a training step"
    if compute["least"] != compute["most"]:
        share += f" ({compute['least']:+.0%} to {compute['most']:+.0%})"
    rows += [
        ("teachers' forward passes", f"{share}, a third for each teacher"),
        ("teachers' copies in memory", _range(teachers)),
    ]
    width = max(len(name) for name, _ in rows)
    return [spec, *(f"  {name:<{width}}  {value}" for name, value in rows)]


def _gap(gap: float) -> str:
    return f"{gap:.3f}" if gap >= 0.001 or gap == 0 else f"{gap:.2g}"


def _with_links(facts: dict[str, Any]) -> str:
    return " and with the time on the links" if facts["slowest_link"] else ""


def _link_line(link: dict[str, Any], interval_s: float) -> str:
    line = f"{link['from']} -> {link['to']}, {_seconds(link['checkpoint_s'])} a checkpoint"
    if link["checkpoint_s"] <= interval_s:
        return line
    return f"{line}: longer than an exchange interval, so its student lags behind; exchange less often, or send fewer bits"


def _range(counts: Range) -> str:
    if counts.least == counts.most:
        return str(counts.most)
    return f"{counts.least} to {counts.most}, mean {counts.mean:.1f}"


def _range_of_bytes(counts: dict[str, float]) -> str:
    if counts["least"] == counts["most"]:
        return _bytes(counts["most"])
    return f"{_bytes(counts['least'])} to {_bytes(counts['most'])}, mean {_bytes(counts['mean'])}"


def _bytes(num_bytes: float) -> str:
    return "0 B" if num_bytes == 0 else f"{_scaled(num_bytes, units=(' B', ' kB', ' MB', ' GB', ' TB'))}"


def _scaled(number: float, units: Sequence[str] = ("", " k", " M", " G", " T")) -> str:
    scale = min(len(units) - 1, max(0, int(math.log10(number) / 3))) if number >= 1 else 0
    scaled = number / 1000**scale
    return f"{scaled:.0f}{units[scale]}" if scaled >= 100 else f"{scaled:.3g}{units[scale]}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

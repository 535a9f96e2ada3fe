"""From what users write, a name, a file or a list of them, to the `Topology`.

ring            ring:8          torus:4x4        graph.json          one graph that stays
one-peer-exponential            random-matching:7                    a schedule with a name
alternating:ring,full           files:day.json,night.json            graphs used in turn
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.files import FILE_SUFFIXES, read_graph_file
from p2pcodistill.topology.graph import Edge, LinkAttributes, Topology
from p2pcodistill.topology.named import is_named, named_phases, num_sites_of, unknown_name

_LIST_PREFIXES = ("alternating:", "files:")
_HOW_TO_SAY_MORE = (
    "alternating:A,B,...",
    "files:A,B,...",
    f"or a graph file ending in {', '.join(FILE_SUFFIXES)}",
)


def build_topology(spec: str, members: Sequence[str], *, base_folder: Path = Path()) -> Topology:
    """The topology that `spec` means, over `members`.

    `spec` is the name of a graph or schedule (see `named`), the path of a graph file (see `files`), looked up below
    `base_folder` when relative, or `alternating:` or `files:` with a list of them. Raises TopologyError with what to do.
    """
    members = tuple(members)
    if len(members) == 1:  # a site alone needs no graph, whatever the run's is
        return Topology(members, [], source=spec)
    phases: list[Sequence[Edge]] = []
    links: dict[tuple[str, str], LinkAttributes] = {}
    parts = _parts(spec)
    for part in parts:
        if part.endswith(FILE_SUFFIXES):
            file = read_graph_file(base_folder / part)
            for ends, link in file.links.items():
                if links.setdefault(ends, link) != link:
                    raise TopologyError(
                        f"{base_folder / part}: the link {ends[0]} -> {ends[1]} has other attributes in a file before it"
                    )
            phases.append(file.edges)
            continue
        named = [
            [(members[a], members[b], 1.0) for a, b in pairs] for pairs in named_phases(part, len(members))
        ]
        if len(parts) > 1 and len(named) > 1:
            raise TopologyError(f"{spec}: {part!r} is a schedule itself: list graphs that stay")
        phases += named
    source = str(base_folder / spec) if spec.endswith(FILE_SUFFIXES) and len(parts) == 1 else spec
    return Topology(members, *phases, source=source, links=links)


def default_members(spec: str, *, base_folder: Path = Path()) -> tuple[str, ...] | None:
    """The sites that `spec` itself speaks of: `0` to `7` for `ring:8`, the nodes of a file; None if it takes any number."""
    members: tuple[str, ...] = ()
    for part in _parts(spec):
        if part.endswith(FILE_SUFFIXES):
            nodes = read_graph_file(base_folder / part).nodes
        else:
            nodes = tuple(map(str, range(num_sites_of(part) or 0)))
        members += tuple(node for node in nodes if node not in members)
    return members or None


def files_of(spec: str) -> tuple[str, ...]:
    """The graph files that `spec` names, as it names them."""
    return tuple(part for part in _listed(spec)[1] if part.endswith(FILE_SUFFIXES))


def map_files(spec: str, change: Callable[[str], str]) -> str:
    """`spec` with every path of a graph file in it changed; other specs, also senseless ones, come back as they are."""
    prefix, parts = _listed(spec)
    return prefix + ",".join(change(part) if part.endswith(FILE_SUFFIXES) else part for part in parts)


def _parts(spec: str) -> list[str]:
    """The graphs that `spec` lists, itself when it is one; each is a name or a file. Raises TopologyError."""
    prefix, parts = _listed(spec)
    if prefix and len(parts) < 2:
        example = "alternating:ring,full" if prefix == "alternating:" else "files:day.json,night.json"
        raise TopologyError(f"the topology {spec!r} lists fewer than two graphs: write it like {example}")
    for part in parts:
        if part.endswith(FILE_SUFFIXES):
            continue
        if prefix == "files:":
            raise TopologyError(f"{spec}: {part!r} does not end in {', '.join(FILE_SUFFIXES)}")
        if not is_named(part):
            raise unknown_name(part, _HOW_TO_SAY_MORE)
    return parts


def _listed(spec: str) -> tuple[str, list[str]]:
    """`alternating:` or `files:` and what is listed after it; else nothing and the spec."""
    prefix = next((prefix for prefix in _LIST_PREFIXES if spec.startswith(prefix)), "")
    return (prefix, _split(spec.removeprefix(prefix))) if prefix else ("", [spec])


def _split(text: str) -> list[str]:
    """Split a list at its commas, but not at those within `random-regular:16,3`: what is only a number belongs to it."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and part.replace(".", "", 1).isdecimal():
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts

"""Graphs from files, through networkx: edge list, GraphML, GML, JSON node-link; by suffix.

An edge may have the attributes `weight`, `bandwidth_mbit`, `latency_ms` and `loss_ratio`; others are ignored, since such
files carry all sorts. An undirected file means both directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.graph import Edge, LinkAttributes

if TYPE_CHECKING:
    import networkx

FILE_SUFFIXES = (".edgelist", ".graphml", ".gml", ".json")
MAX_TOPOLOGY_FILE_BYTES = 4 << 20
_LINK_ATTRIBUTES = ("bandwidth_mbit", "latency_ms", "loss_ratio")


@dataclass(frozen=True, slots=True)
class FileGraph:
    """What a graph file says: its nodes in their order, directed edges, and attributes of links by (teacher, student)."""

    nodes: tuple[str, ...]
    edges: tuple[Edge, ...]
    links: dict[tuple[str, str], LinkAttributes]


def read_graph_file(path: Path) -> FileGraph:
    """The graph in the file `path`. Raises TopologyError, one line that names the file."""
    graph = _parse(path)
    edges: list[Edge] = []
    links: dict[tuple[str, str], LinkAttributes] = {}
    for a, b, attributes in graph.edges(data=True):
        teacher, student = str(a), str(b)
        where = f"{path}: the %s of {teacher} -> {student}"
        weight = _number(attributes.get("weight", 1.0), where % "weight")
        ends = [(teacher, student)]
        if not graph.is_directed() and teacher != student:
            ends.append((student, teacher))
        edges += [(*pair, weight) for pair in ends]
        if any(name in attributes for name in _LINK_ATTRIBUTES):
            links |= dict.fromkeys(ends, _link(attributes, where))
    return FileGraph(tuple(str(node) for node in graph.nodes), tuple(edges), links)


def _link(attributes: dict[str, Any], where: str) -> LinkAttributes:
    values = {
        name: _number(attributes[name], where % name) for name in _LINK_ATTRIBUTES if name in attributes
    }
    link = LinkAttributes(**values)
    if link.bandwidth_mbit is not None and not (0 < link.bandwidth_mbit < math.inf):
        raise TopologyError(
            f"{where % 'bandwidth_mbit'} must be above 0, not {link.bandwidth_mbit}; leave it out for no limit"
        )
    if not 0 <= link.latency_ms < math.inf:
        raise TopologyError(f"{where % 'latency_ms'} must be 0 or more, not {link.latency_ms}")
    if not 0 <= link.loss_ratio < 1:
        raise TopologyError(f"{where % 'loss_ratio'} must be from 0 to below 1, not {link.loss_ratio}")
    return link


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TopologyError(f"{what} is not a number") from None


def _parse(path: Path) -> networkx.Graph[Any]:
    # Imported late: a node whose topology has a name starts without paying for networkx.
    import json

    import networkx

    try:
        if path.stat().st_size > MAX_TOPOLOGY_FILE_BYTES:
            raise TopologyError(
                f"{path} is larger than {MAX_TOPOLOGY_FILE_BYTES >> 20} MiB: not a topology file"
            )
        if path.suffix == ".edgelist":
            # Direction is the point of an edge list here: 'a b' says that a teaches b.
            return networkx.read_edgelist(path, create_using=networkx.DiGraph)
        if path.suffix == ".graphml":
            return networkx.read_graphml(path)
        if path.suffix == ".gml":
            return networkx.read_gml(path)
        return networkx.node_link_graph(json.loads(path.read_text()), edges="edges")
    except FileNotFoundError:
        raise TopologyError(f"no topology file {path}") from None
    except OSError as error:
        raise TopologyError(f"cannot read the topology file {path}: {error.strerror}") from None
    except TopologyError:
        raise
    except Exception as error:  # networkx's readers raise whatever their parsers do
        reason = str(error).partition("\n")[0]
        raise TopologyError(f"{path} does not parse as {path.suffix[1:]}: {reason}") from None

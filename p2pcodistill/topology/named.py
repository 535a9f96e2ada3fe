"""The graphs and schedules that have a name: `ring:8`, `torus:4x4`, `one-peer-exponential`.

Numbers after the name say how many sites there are; without them it takes the members of the run. Sites are placed in
member order. All but the exponential graphs teach in both directions, and every weight is 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.draws import Pair, random_matchings, random_regular, small_world

MAX_SITES = 10_000
MAX_EDGES = 2_000_000
"""Directed edges of one graph."""
NUM_MATCHINGS = 1024

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class _Generator:
    """How a name becomes edges. `parameters` are read from the text after the colon, the first `num_required` of them are
    needed; `num_sites` tells from them how many members fit, None: any; `phases` gives each exchange's pairs."""

    usage: str
    example: str
    parameters: tuple[type[int] | type[float], ...]
    num_required: int
    num_sites: Callable[..., int | None]
    phases: Callable[..., list[list[Pair]]]
    is_directed: bool = False
    separator: str = ","


def is_named(spec: str) -> bool:
    """Whether `spec` begins with one of the names."""
    return spec.partition(":")[0] in _GENERATORS


def num_sites_of(spec: str) -> int | None:
    """How many sites `spec` is for; None: as many as there are members. Raises TopologyError."""
    generator, parameters = _parse(spec)
    return _num_sites(generator, parameters)


def named_phases(spec: str, num_members: int) -> list[list[Pair]]:
    """The directed pairs (teacher, student) of ranks of each exchange of `spec`; one list for a graph that stays.

    `num_members` is at least 2. Raises TopologyError when it does not fit.
    """
    generator, parameters = _parse(spec)
    num_sites = _num_sites(generator, parameters)
    if num_sites is not None and num_sites != num_members:
        name = spec.partition(":")[0]
        if name == "pair":
            raise TopologyError(
                f"the topology 'pair' joins two members, this run has {num_members}: use 'ring' or 'full'"
            )
        way_out = f", or {name!r} alone" if generator.num_required == 0 else ""
        raise TopologyError(
            f"the topology {spec!r} is for {num_sites} sites, this run has {num_members}: write numbers that give "
            f"{num_members}{way_out}"
        )
    phases = generator.phases(num_members, *parameters)
    if generator.is_directed:
        return phases
    return [[pair for a, b in phase for pair in ((a, b), (b, a))] for phase in phases]


def unknown_name(spec: str, others: tuple[str, ...]) -> TopologyError:
    """The error for a spec that is neither a name nor a file; `others` are what may follow beside the names."""
    name = spec.partition(":")[0]
    close = difflib.get_close_matches(name, _GENERATORS, 1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return TopologyError(f"unknown topology {spec!r}{guess}: use one of {', '.join((*_GENERATORS, *others))}")


def _parse(spec: str) -> tuple[_Generator, list[int | float]]:
    name, colon, text = spec.partition(":")
    generator = _GENERATORS[name]
    parts = text.split(generator.separator) if colon else []
    fits = generator.num_required <= len(parts) <= len(generator.parameters)
    # A decimal point belongs to a ratio only; a size with one would be cut off unnoticed.
    kinds = generator.parameters[: len(parts)]
    if not fits or not all(
        _NUMBER.fullmatch(part) and (kind is float or "." not in part)
        for kind, part in zip(kinds, parts, strict=True)
    ):
        raise TopologyError(
            f"the topology {spec!r} does not parse: write {generator.usage}, like {generator.example}"
        )
    return generator, [kind(part) for kind, part in zip(kinds, parts, strict=True)]


def _num_sites(generator: _Generator, parameters: list[int | float]) -> int | None:
    num_sites = generator.num_sites(*parameters)
    if num_sites is not None and not 2 <= num_sites <= MAX_SITES:
        shown = num_sites if num_sites < 2 else f"more than {MAX_SITES:,}"
        raise TopologyError(
            f"{generator.usage}: a run has 2 to {MAX_SITES:,} sites, these numbers make {shown}: write others"
        )
    return num_sites


def _require_few_edges(num_sites: int, degree: int) -> None:
    if num_sites * degree > MAX_EDGES:
        raise TopologyError(
            f"{num_sites:,} sites with {degree:,} teachers each are {num_sites * degree:,} edges, more than "
            f"{MAX_EDGES:,}: use a sparser graph, such as 'exponential'"
        )


# --- graphs that stay --------------------------------------------------------------------------------------------------


def _full(num_sites: int, *_: int) -> list[list[Pair]]:
    _require_few_edges(num_sites, num_sites - 1)
    return [[(a, b) for a in range(num_sites) for b in range(a + 1, num_sites)]]


def _ring(num_sites: int, *_: int) -> list[list[Pair]]:
    return [[(a, (a + 1) % num_sites) for a in range(num_sites)]]


def _star(num_sites: int, *_: int) -> list[list[Pair]]:
    return [[(0, other) for other in range(1, num_sites)]]


def _line(num_sites: int, *_: int) -> list[list[Pair]]:
    return [[(a, a + 1) for a in range(num_sites - 1)]]


def _torus(_: int, num_rows: int, num_columns: int) -> list[list[Pair]]:
    import networkx  # late, here and below: nodes with the other names start without paying for it

    if min(num_rows, num_columns) < 2:
        raise TopologyError("a torus has at least two rows and two columns: for one row, use 'ring'")
    grid: Any = networkx.grid_2d_graph(num_rows, num_columns, periodic=True)
    return [[(r * num_columns + c, s * num_columns + d) for (r, c), (s, d) in grid.edges]]


def _hypercube(num_sites: int, *_: int) -> list[list[Pair]]:
    import networkx

    dimension = num_sites.bit_length() - 1
    if num_sites != 1 << dimension:
        raise TopologyError(
            f"a hypercube has 2, 4, 8, ... sites, this run has {num_sites}: use 'exponential', which takes any number"
        )
    cube: Any = networkx.hypercube_graph(dimension)
    return [[(_binary(a), _binary(b)) for a, b in cube.edges]]


def _binary(corner: int | tuple[int, ...]) -> int:
    bits = (
        (corner,) if isinstance(corner, int) else corner
    )  # networkx's one-dimensional cube has plain numbers
    return sum(bit << place for place, bit in enumerate(reversed(bits)))


def _tree(_: int, branching: int, height: int) -> list[list[Pair]]:
    import networkx

    return [list(networkx.balanced_tree(branching, height).edges)]


def _tree_size(branching: int, height: int) -> int:
    if branching < 1 or height > MAX_SITES:
        return 1 if branching < 1 else MAX_SITES + 1
    num_sites, num_leaves = 1, 1
    for _ in range(height):
        num_leaves *= branching
        num_sites += num_leaves
        if num_sites > MAX_SITES:
            break
    return num_sites


def _random_regular(_: int, num_sites: int, degree: int, seed: int = 1) -> list[list[Pair]]:
    if not (2 <= degree < num_sites or (num_sites, degree) == (2, 1)):
        raise TopologyError(
            f"random-regular with {num_sites} sites has a degree from 2 to {num_sites - 1}, not {degree}"
        )
    if num_sites * degree % 2:
        raise TopologyError(
            f"random-regular cannot give each of {num_sites} sites {degree} neighbours: one of both numbers must be even"
        )
    _require_few_edges(num_sites, degree)
    return [random_regular(num_sites, degree, seed)]


def _small_world(
    _: int, num_sites: int, num_neighbours: int, rewiring_ratio: float, seed: int = 1
) -> list[list[Pair]]:
    if num_neighbours % 2 or not 2 <= num_neighbours < num_sites:
        raise TopologyError(
            f"small-world with {num_sites} sites needs an even number of neighbours, 2 or more and below {num_sites}, "
            f"not {num_neighbours}"
        )
    if rewiring_ratio > 1:
        raise TopologyError(f"small-world rewires a share from 0 to 1 of the edges, not {rewiring_ratio}")
    _require_few_edges(num_sites, num_neighbours)
    return [small_world(num_sites, num_neighbours, rewiring_ratio, seed)]


def _exponential(num_sites: int, *_: int) -> list[list[Pair]]:
    return [[pair for phase in _one_peer_exponential(num_sites) for pair in phase]]


# --- schedules ---------------------------------------------------------------------------------------------------------


def _one_peer_exponential(num_sites: int, *_: int) -> list[list[Pair]]:
    """Exchange k: site i teaches site i + 2^k (Ying et al. 2021, arXiv 2110.13363, section 4)."""
    num_hops = (num_sites - 1).bit_length()
    return [[(a, (a + (1 << k)) % num_sites) for a in range(num_sites)] for k in range(num_hops)]


def _random_matching(num_sites: int, seed: int = 1, num_matchings: int = NUM_MATCHINGS) -> list[list[Pair]]:
    most = min(NUM_MATCHINGS, MAX_EDGES // num_sites)
    if not 1 <= num_matchings <= most:
        raise TopologyError(
            f"random-matching of {num_sites} sites repeats 1 to {most} matchings, not {num_matchings}: "
            f"write random-matching:{seed},{most} or fewer"
        )
    return random_matchings(num_sites, num_matchings, seed)


def _as_given(num_sites: int | None = None, *_: int) -> int | None:
    return num_sites


def _any(
    usage: str, example: str, phases: Callable[..., list[list[Pair]]], *, is_directed: bool = False
) -> _Generator:
    """A generator whose only parameter is the number of sites."""
    return _Generator(usage, example, (int,), 0, _as_given, phases, is_directed)


_GENERATORS = {
    "pair": _Generator("pair, without a number", "pair", (), 0, lambda: 2, _line),
    "ring": _any("ring or ring:SITES", "ring:8", _ring),
    "full": _any("full or full:SITES", "full:4", _full),
    "star": _any("star or star:SITES", "star:5", _star),
    "line": _any("line or line:SITES", "line:4", _line),
    "torus": _Generator(
        "torus:ROWSxCOLUMNS", "torus:4x4", (int, int), 2, lambda r, c: r * c, _torus, separator="x"
    ),
    "hypercube": _Generator(
        "hypercube or hypercube:DIMENSION",
        "hypercube:4",
        (int,),
        0,
        lambda dimension=None: None if dimension is None else 1 << min(dimension, 64),
        _hypercube,
    ),
    "exponential": _any("exponential or exponential:SITES", "exponential:16", _exponential, is_directed=True),
    "random-regular": _Generator(
        "random-regular:SITES,DEGREE[,SEED]",
        "random-regular:16,3",
        (int, int, int),
        2,
        _as_given,
        _random_regular,
    ),
    "small-world": _Generator(
        "small-world:SITES,NEIGHBOURS,REWIRING[,SEED]",
        "small-world:20,4,0.1",
        (int, int, float, int),
        3,
        _as_given,
        _small_world,
    ),
    "tree": _Generator("tree:BRANCHING,HEIGHT", "tree:2,3", (int, int), 2, _tree_size, _tree),
    "one-peer-exponential": _any(
        "one-peer-exponential or one-peer-exponential:SITES",
        "one-peer-exponential:16",
        _one_peer_exponential,
        is_directed=True,
    ),
    "random-matching": _Generator(
        "random-matching or random-matching:SEED[,MATCHINGS]",
        "random-matching:7",
        (int, int),
        0,
        lambda *_: None,
        _random_matching,
    ),
}

"""The commands of the command line that run nothing: `report`, `topology`, `vocabulary`, `frame`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from p2pcodistill.topology.density import CODEC_BITS

if TYPE_CHECKING:
    # What argparse makes of parsers has no public name.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_REPORT_EPILOG = """\
what RUN can be:
  a run folder of p2pcodistill simulate (runs/latest) or of p2pcodistill node, also while it runs or after it was stopped;
  NAME=FOLDER calls it so in tables and figures

of one run, its table and its report.html are made again, of what the folder holds. Several are compared: loss curves over
steps, seconds and bytes, tables with differences to a baseline seed by seed, and in which settings the runs differ. Runs of
another task, or evaluated on other held-out data, are shown apart.

examples:
  p2pcodistill report runs/latest
  p2pcodistill report fast=runs/pair-20261120-103000 slow=runs/pair-20261121-091500 --baseline fast:alone
"""
_TOPOLOGY_EPILOG = """\
what SPEC can be:
  pair  ring:8  full:4  star:5  line:4  torus:4x4  hypercube:4  tree:2,3 (branching, height)
  exponential:16             site i teaches i+1, i+2, i+4, ... (one way)
  random-regular:16,3[,SEED] every site has 3 neighbours
  small-world:20,4,0.1[,SEED]  a ring with 4 neighbours each, a tenth of the edges rewired
  graph.json                 a file: edge list, GraphML, GML or node-link JSON, see topologies/
 over time, by the exchanges that a site has made:
  one-peer-exponential       exchange k: site i teaches i + 2^k
  random-matching[:SEED[,MATCHINGS]]  sites in pairs; so many matchings in turn (default 1024)
  alternating:ring,full      graphs in turn
  files:a.json,b.json        files in turn
Without a number, a graph takes the members of the run: here -n 8, or --members berlin,tokyo.

what the figures mean:
  knowledge is taken to move one edge per exchange. Spectral gap: 1 - |lambda_2| of the mixing matrix, with Metropolis
  weights where all edges go both ways, else each site and its teachers equally; of a schedule, the mean per exchange.
  A site fetches from all teachers that the schedule ever gives it, each at every exchange.

examples:
  p2pcodistill topology torus:4x4 --draw torus.png
  p2pcodistill topology topologies/three-continents.json --parameters 1.3e9 --exchange-interval-s 600
"""
_VOCABULARY_EPILOG = """\
examples:
  p2pcodistill vocabulary train corpus/ --size 24006 --out vocabulary.json
  p2pcodistill vocabulary train hf:roneneldan/TinyStories --size 4000 --max-bytes 50000000
"""
_DECODE_EPILOG = """\
examples:
  p2pcodistill frame decode runs/run-berlin --origin tokyo --out tokyo.safetensors
  p2pcodistill frame decode key.frame delta-1.frame delta-2.frame --out model.safetensors
"""


def add_tools(commands: Commands) -> None:
    """Add these commands to the command line's."""
    _add_report(commands)
    _add_topology(commands)
    _add_vocabulary(commands)
    _add_frame(commands)


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="a run's report, made again; or several runs side by side",
        description="Report on what run folders hold; compare several.",
        epilog=_REPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, or NAME=FOLDER")
    report.add_argument(
        "--baseline",
        metavar="RUN[:ARM]",
        help="what the others are compared with (default: the first lone arm of the first RUN); with one RUN, ARM",
    )
    report.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help="where to write (default: one RUN's own folder; of several, a new folder beside the first)",
    )
    report.set_defaults(call=_report)


def _add_topology(commands: Commands) -> None:
    topology = commands.add_parser(
        "topology",
        help="what a graph or schedule means for a run: spread, bytes, compute; and its picture",
        description="Print how fast knowledge spreads in a graph of sites, and what it costs each site.",
        epilog=_TOPOLOGY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    topology.add_argument("spec", metavar="SPEC", help="a graph or schedule, by name or file (see below)")
    sites = topology.add_mutually_exclusive_group()
    sites.add_argument("-n", dest="num_sites", metavar="SITES", type=int, help="for so many sites")
    sites.add_argument("--members", metavar="A,B,...", help="for these sites, in the order of the run")
    topology.add_argument(
        "--parameters", metavar="NUMBER", type=float, default=100e6, help="of the model (default: 100e6)"
    )
    density = topology.add_mutually_exclusive_group()
    density.add_argument(
        "--codec",
        choices=tuple(CODEC_BITS),
        default="adaptive",
        help="how checkpoints travel: raw, fp16 keyframes only (frames.delta = off), or a keyframe and adaptive delta "
        "frames (the default), as measured",
    )
    density.add_argument("--bits", metavar="BITS", type=float, help="a weight, instead of a codec's")
    topology.add_argument(
        "--step-s", metavar="S", type=float, default=0.1, help="a training step (default: 0.1)"
    )
    topology.add_argument(
        "--exchange-interval-steps", metavar="STEPS", type=int, default=50, help="default: 50"
    )
    topology.add_argument(
        "--exchange-interval-s", metavar="S", type=float, help="default: that many steps of --step-s"
    )
    topology.add_argument("--draw", metavar="FILE", type=Path, help="draw it into a .png, .svg or .pdf file")
    topology.add_argument("--json", action="store_true", help="print one JSON object")
    topology.set_defaults(call=_topology)


def _add_vocabulary(commands: Commands) -> None:
    vocabulary = commands.add_parser(
        "vocabulary",
        help="word pieces for the language model",
        description="Without a vocabulary, a language model predicts bytes; with one, pieces of words.",
    )
    vocabulary_commands = vocabulary.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train_vocabulary = vocabulary_commands.add_parser(
        "train",
        help="make a vocabulary of text",
        description="Train word pieces on text, once for all sites of a run: all of them need the same file.",
        epilog=_VOCABULARY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_vocabulary.add_argument(
        "data", metavar="DATA", nargs="+", type=Path, help="files or folders of text, or hf: data sets"
    )
    train_vocabulary.add_argument(
        "--size",
        metavar="TOKENS",
        type=int,
        default=24_006,
        help="tokens, six special ones included (default: 24006, as in the paper)",
    )
    train_vocabulary.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("vocabulary.json"), help="default: vocabulary.json"
    )
    train_vocabulary.add_argument(
        "--text-column", metavar="COLUMN", default="text", help="of hf: data sets (default: text)"
    )
    train_vocabulary.add_argument(
        "--max-bytes", metavar="BYTES", type=_positive, help="read at most this much text (default: all)"
    )
    train_vocabulary.set_defaults(call=_train_vocabulary)


def _add_frame(commands: Commands) -> None:
    frame = commands.add_parser(
        "frame",
        help="look into frames; turn stored ones into a safetensors file",
        description="Frames are how checkpoints travel: a keyframe, then delta frames. These commands only read them.",
    )
    frame_commands = frame.add_subparsers(title="commands", metavar="COMMAND", required=True)
    inspect = frame_commands.add_parser(
        "inspect",
        help="print a frame's header, and what each tensor costs",
        description="Print a frame's header, and for every tensor its encoding, its bytes, the ratio to fp16 and the share "
        "of codes that are zero.",
    )
    inspect.add_argument("file", metavar="FILE", type=Path, help="a frame")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    _add_max_bytes(inspect)
    inspect.set_defaults(call=_inspect_frame)
    decode = frame_commands.add_parser(
        "decode",
        help="write the checkpoint that frames lead to as a safetensors file",
        description="Decode a chain of frames: a keyframe and the delta frames after it, or the newest checkpoint of a site "
        "in a store.",
        epilog=_DECODE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decode.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="frames, in any order, or one run folder or store"
    )
    decode.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the safetensors file to write"
    )
    decode.add_argument("--origin", metavar="NAME", help="whose checkpoint, if FILE is a folder")
    _add_max_bytes(decode)
    decode.set_defaults(call=_decode_frames)


def _add_max_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bytes",
        metavar="BYTES",
        type=int,
        help="refuse frames whose tensors are larger together (default: 1 GiB and 64 times the files' size)",
    )


def _positive(text: str) -> int:
    """An argument that counts. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _report(options: argparse.Namespace) -> int:
    from p2pcodistill.simulation.reporting import report_runs

    return report_runs(options.runs, baseline=options.baseline, out=options.out, stream=sys.stdout)


def _topology(options: argparse.Namespace) -> int:
    from p2pcodistill.topology.description import Assumptions, describe

    assumptions = Assumptions(
        num_parameters=options.parameters,
        bits=CODEC_BITS[options.codec] if options.bits is None else options.bits,
        step_s=options.step_s,
        exchange_interval_steps=options.exchange_interval_steps,
        exchange_interval_s=options.exchange_interval_s,
    )
    return describe(
        options.spec,
        members=None if options.members is None else options.members.split(","),
        num_sites=options.num_sites,
        assumptions=assumptions,
        picture=options.draw,
        as_json=options.json,
        stream=sys.stdout,
    )


def _train_vocabulary(options: argparse.Namespace) -> int:
    from p2pcodistill.tasks.vocabulary_training import train_vocabulary

    return train_vocabulary(
        options.data,
        options.out,
        size=options.size,
        text_column=options.text_column,
        max_bytes=options.max_bytes,
        stream=sys.stdout,
    )


def _inspect_frame(options: argparse.Namespace) -> int:
    from p2pcodistill import frame_tools

    return frame_tools.inspect(
        options.file, as_json=options.json, max_bytes=options.max_bytes, stream=sys.stdout
    )


def _decode_frames(options: argparse.Namespace) -> int:
    from p2pcodistill import frame_tools

    return frame_tools.decode(
        options.files, options.out, origin=options.origin, max_bytes=options.max_bytes, stream=sys.stdout
    )

"""The command line: parse, call one function, turn errors into one line and an exit status.

Exit status: 0 finished; 2 something the user can mend (one line on standard error says what); 128 + signal when stopped;
1 and a traceback for what should not have happened.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pcodistill.errors import ConfigError, UserError
from p2pcodistill.topology.density import CODEC_BITS

if TYPE_CHECKING:
    from p2pcodistill.config import NodeConfig

USER_ERROR_STATUS = 2

_DESCRIPTION = """\
Peer-to-peer codistillation: sites train copies of one model, each on its own data, and learn from stale
copies of each other's weights. Nothing but signed checkpoints travels between sites; no coordinator, no
shared file system.
"""
_EPILOG = """\
first steps:
  p2pcodistill simulate simulations/pair.toml     two sites on this machine, ends with a report
  p2pcodistill keygen berlin                      an identity for the site 'berlin'
  p2pcodistill node nodes/two-sites/berlin.toml   run the site
  p2pcodistill topology ring:8                    what a graph means for a run, before there is one
"""
_NODE_EPILOG = """\
examples:
  p2pcodistill node nodes/two-sites/berlin.toml
  p2pcodistill node --name berlin --listen tcp://0.0.0.0:5600 --data corpus/ \\
      --peers 'tokyo=tcp://tokyo.example:5600#p2p1-...'

The first Ctrl-C lets the workers agree on a step, checkpoint and exit; a second one stops at once. The same
command again goes on from the last training checkpoint.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if sys.platform == "win32":
        print("p2pcodistill: Windows is not supported: use Linux, or WSL on Windows", file=sys.stderr)
        return USER_ERROR_STATUS
    try:
        status: int = options.call(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"p2pcodistill: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else the interpreter complains of the same when it exits
        return 128 + signal.SIGPIPE
    except (
        OSError
    ) as error:  # a folder in place of a file, a full disk, a permission: the system says what and where
        where = f"{error.filename}: " if error.filename else ""
        print(f"p2pcodistill: {where}{error.strerror or error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:  # while starting or reporting; a node that runs stops in order
        return 128 + signal.SIGINT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="p2pcodistill",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    keygen = commands.add_parser(
        "keygen",
        help="make a site's identity",
        description="Write NAME.key (secret, mode 0600) and print the public identity to hand to the peers.",
    )
    keygen.add_argument("name", metavar="NAME", help="the site's name, as its peers will call it")
    keygen.add_argument("--out", metavar="FILE", type=Path, help="write the secret here instead of NAME.key")
    keygen.set_defaults(call=_keygen)

    node = commands.add_parser(
        "node",
        help="run a site: its workers, and the exchange with its peers",
        description="Run one site. Everything can come from FILE; flags override it.",
        epilog=_NODE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    node.add_argument("file", metavar="FILE", nargs="?", type=Path, help="the site's file (TOML)")
    node.add_argument("--name", metavar="NAME", help="this site's name")
    node.add_argument("--listen", metavar="ADDRESS", help="tcp://HOST:PORT to listen on")
    node.add_argument(
        "--peers",
        metavar="PEER",
        nargs="+",
        help="the other members, each NAME=tcp://HOST:PORT#PUBLIC-IDENTITY "
        "(NAME=#PUBLIC-IDENTITY for one that dials this site)",
    )
    node.add_argument("--identity", metavar="FILE", help="the identity file (default: NAME.key)")
    node.add_argument("--topology", metavar="SPEC", help="who teaches whom, see p2pcodistill topology --help")
    node.add_argument("--task", metavar="TASK", help="what to train: language-model")
    node.add_argument("--data", metavar="PATH", nargs="+", help="files or folders of text to train on")
    node.add_argument("--run", metavar="RUN", help="name of the run; all its nodes use the same")
    node.add_argument("--run-folder", metavar="FOLDER", help="where this run lives (default: runs/RUN-NAME)")
    _add_set(node)
    node.add_argument("--die-with-parent", metavar="PID", type=int, help=argparse.SUPPRESS)
    node.set_defaults(call=_node)

    simulate = commands.add_parser(
        "simulate",
        help="run a scenario on this machine, with real node processes or in virtual time",
        description="Run a scenario: every site of every arm as a real node, or all of them in virtual time; ends with a "
        "report.",
    )
    simulate.add_argument("file", metavar="FILE", type=Path, help="the scenario (TOML), see simulations/")
    simulate.add_argument(
        "--data", metavar="PATH", nargs="+", type=Path, help="text to use instead of the scenario's"
    )
    simulate.add_argument("--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="default: runs")
    simulate.add_argument(
        "--namespaces",
        action="store_true",
        help="give each site of a codistilled arm a network namespace and an address of its own (Linux, root)",
    )
    _add_set(simulate)
    simulate.set_defaults(call=_simulate)

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
    return parser


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


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override any key of the file, e.g. --set training.num_steps=500; may be repeated",
    )


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import p2pcodistill

        print(f"p2pcodistill {p2pcodistill.__version__}")
        parser.exit()


def _keygen(options: argparse.Namespace) -> int:
    from p2pcodistill.identity import Identity, check_site_name

    path: Path = options.out or Path(f"{check_site_name(options.name)}.key")
    identity = Identity.generate()
    identity.save(path)
    print(f"{options.name}: secret identity in {path} (keep it on this machine)", file=sys.stderr)
    print("public identity, to hand to the peers:", file=sys.stderr)
    print(identity.public)
    return 0


def _node(options: argparse.Namespace) -> int:
    if options.die_with_parent is not None:
        from p2pcodistill.group.lifeline import die_with_parent

        die_with_parent(options.die_with_parent)
    import asyncio

    from p2pcodistill.node import Node
    from p2pcodistill.report.live import make_view
    from p2pcodistill.tasks.preflight import require_data

    config, base_folder = _node_config(options)
    if config.group.script is None:
        require_data(
            config.task.located_in(base_folder),
            batch_size=config.training.batch_size,
            num_ranks=config.group.num_ranks,
        )

    async def run() -> int:
        with make_view(f"{config.run}: {config.name}", sys.stdout) as view:
            node = Node(
                config,
                base_folder=base_folder,
                subscriber=lambda record: view.update(config.run, config.name, record),
                reload=(lambda: _node_config(options)[0]) if options.file else None,
            )
            return (await node.run()).exit_status

    return asyncio.run(run())


def _node_config(options: argparse.Namespace) -> tuple[NodeConfig, Path]:
    from p2pcodistill.config import NodeConfig, parse_peer
    from p2pcodistill.strict import load_toml, override, parse_model
    from p2pcodistill.task_configs import entry_in

    table: dict[str, Any] = load_toml(options.file) if options.file else {}
    # Relative paths in a file mean its folder, those of flags the current one.
    base_folder = options.file.parent if options.file else Path()
    flags = {
        "name": options.name,
        "listen": options.listen,
        "topology": options.topology,
        "run": options.run,
        "identity": options.identity and str(Path(options.identity).absolute()),
        "run_folder": options.run_folder and str(Path(options.run_folder).absolute()),
    }
    table |= {key: value for key, value in flags.items() if value is not None}
    if options.peers is not None:
        table["peers"] = [parse_peer(text).model_dump() for text in options.peers]
    task = table.setdefault("task", {})
    if isinstance(task, dict):
        if options.task is not None:
            task["name"] = options.task
        if options.data is not None:
            task["data"] = [str(entry_in(Path(), Path(entry))) for entry in options.data]
    table = override(table, options.set)
    if "name" not in table:
        raise ConfigError("a node needs a name: give --name NAME, or a file that has one")
    source = str(options.file) if options.file else "the command line"
    return parse_model(NodeConfig, table, source=source), base_folder


def _simulate(options: argparse.Namespace) -> int:
    from p2pcodistill.simulation.processes import simulate

    return simulate(
        options.file,
        data=options.data or (),
        overrides=options.set,
        run_root=options.runs,
        stream=sys.stdout,
        in_namespaces=options.namespaces,
    )


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

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

from p2pcodistill.cli_tools import add_tools
from p2pcodistill.errors import ConfigError, UserError

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
  p2pcodistill report RUN RUN                     runs side by side
"""
_NODE_EPILOG = """\
examples:
  p2pcodistill node nodes/two-sites/berlin.toml
  p2pcodistill node --name berlin --listen tcp://0.0.0.0:5600 --data corpus/ \\
      --peers 'tokyo=tcp://tokyo.example:5600#p2p1-...'

The first Ctrl-C lets the workers agree on a step, checkpoint and exit; a second one stops at once. The same
command again goes on from the last training checkpoint.
"""
_SIMULATE_EPILOG = """\
examples:
  p2pcodistill simulate simulations/pair.toml
  p2pcodistill simulate --resume latest

What was stopped, by Ctrl-C, kill or a reboot, goes on in the same folder: arms and trials that have finished are kept.
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
        epilog=_SIMULATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="the scenario (TOML), see simulations/"
    )
    simulate.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="go on with a simulation that was stopped, in its run folder; 'latest' is the newest",
    )
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

    add_tools(commands)
    return parser


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
    from p2pcodistill.simulation.processes import resume, simulate

    if options.resume is not None:
        for given, flag in (
            (options.file, "FILE"),
            (options.set, "--set"),
            (options.data, "--data"),
            (options.namespaces, "--namespaces"),
        ):
            if given:
                raise ConfigError(
                    f"--resume goes on with the scenario in the run folder, as it was begun: leave out {flag}"
                )
        return resume(options.resume, run_root=options.runs, stream=sys.stdout)
    if options.file is None:
        raise ConfigError("simulate needs a scenario: give FILE, or --resume RUN to go on with one")
    return simulate(
        options.file,
        data=options.data or (),
        overrides=options.set,
        run_root=options.runs,
        stream=sys.stdout,
        in_namespaces=options.namespaces,
    )

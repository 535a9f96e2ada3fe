"""`p2pcodistill report RUN…`: what run folders hold, told again, or side by side."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from p2pcodistill.errors import ConfigError, RunFolderError
from p2pcodistill.report.comparison import arms_table
from p2pcodistill.report.recorded import RecordedRun
from p2pcodistill.report.results import tell
from p2pcodistill.report.run_comparison import RunComparison, compare_runs, group_headline
from p2pcodistill.report.site_run import is_site_run, read_site_run, report_site
from p2pcodistill.simulation.files import SCENARIO_FILE, create_run_folder
from p2pcodistill.simulation.outcome import report
from p2pcodistill.simulation.recorded import load_recorded_scenario, read_scenario_run
from p2pcodistill.simulation.search import SEARCH_FOLDER

COMPARISON_NAME = "comparison"
"""Of the folder that a comparison goes into, beside the first run."""


def report_runs(
    texts: Sequence[str], *, baseline: str | None = None, out: Path | None = None, stream: TextIO
) -> int:
    """Report on one run again, or compare several; the exit status.

    Each of `texts` is a run folder of a simulation or of a node, or NAME=FOLDER. `baseline` is RUN or RUN:ARM. Of one run,
    what is written goes into its own folder, of several into a new one beside the first; or into `out`.

    Raises RunFolderError for folders that cannot be reported on, ConfigError for runs of one name or a baseline that is not
    there.
    """
    given = [_parse_run(text) for text in texts]
    for _, folder in given:
        _require_run(folder)
    if out is not None and (_is_run(out) and (len(given) > 1 or out.resolve() != given[0][1].resolve())):
        raise RunFolderError(f"--out {out} is a run folder, whose own report would be lost: choose another")
    if len(given) == 1:
        _report_one(*given[0], baseline, out, stream)
        return 0
    names = _names(given)
    runs = [_read(folder, name) for (_, folder), name in zip(given, names, strict=True)]
    comparison = compare_runs(runs, baseline)
    if out is None:
        out = create_run_folder(given[0][1].resolve().parent, COMPARISON_NAME, datetime.now())
    else:
        out.mkdir(parents=True, exist_ok=True)
    _write(comparison, out, stream)
    return 0


def _parse_run(text: str) -> tuple[str | None, Path]:
    """The name that a run is given, if it is, and its folder."""
    name, equals, folder = text.partition("=")
    if equals and name and folder and not Path(text).exists():
        return name, Path(folder)
    return None, Path(text)


def _is_run(folder: Path) -> bool:
    return (folder / SCENARIO_FILE).exists() or is_site_run(folder)


def _require_run(folder: Path) -> None:
    """Raise RunFolderError that says what to do about a folder that is no run."""
    if not folder.exists():
        raise RunFolderError(f"no such run folder: {folder}")
    if _is_run(folder):
        return
    if (folder / SEARCH_FOLDER / SCENARIO_FILE).exists():
        raise RunFolderError(
            f"{folder} was stopped before anything in it began, so there is nothing to report: run its scenario anew"
        )
    outer = next((parent for parent in folder.resolve().parents if (parent / SCENARIO_FILE).exists()), None)
    if outer is not None:
        raise RunFolderError(f"{folder} is a part of a run: report on the whole of it, {outer}")
    raise RunFolderError(
        f"{folder} is no run folder, with a {SCENARIO_FILE} of p2pcodistill simulate or what p2pcodistill node leaves: name "
        "one, such as runs/latest"
    )


def _report_one(
    name: str | None, folder: Path, baseline: str | None, out: Path | None, stream: TextIO
) -> None:
    out = out or folder
    if is_site_run(folder):
        if baseline is not None:
            raise ConfigError(f"{folder} is the run of a single site, which has no baseline: leave it out")
        run = read_site_run(folder, name or folder.resolve().name)
        out.mkdir(parents=True, exist_ok=True)
        report_site(run, out, stream)
        return
    scenario = load_recorded_scenario(folder)
    if baseline is not None:
        run_name, _, arm = baseline.rpartition(":")
        if run_name and run_name not in (name, str(folder), scenario.name):
            raise ConfigError(
                f"--baseline {baseline} is none of the runs: with one run, it takes an ARM of it"
            )
        baseline = arm
    out.mkdir(parents=True, exist_ok=True)
    report(scenario, folder, stream, out=out, baseline=baseline, is_partial=True)


def _read(folder: Path, name: str) -> RecordedRun:
    return read_site_run(folder, name) if is_site_run(folder) else read_scenario_run(folder, name)


def _names(given: Sequence[tuple[str | None, Path]]) -> list[str]:
    """What each run is called: as it is given, else by its scenario where no other is called so, else by its folder."""
    short = [name or _short_name(folder) for name, folder in given]
    names = [
        name or (short[index] if short.count(short[index]) == 1 else folder.resolve().name)
        for index, (name, folder) in enumerate(given)
    ]
    for name, (_, folder) in zip(names, given, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"two runs are called {name!r}: name them, as in mine={folder}")
    return names


def _short_name(folder: Path) -> str:
    return folder.resolve().name if is_site_run(folder) else load_recorded_scenario(folder).name


def _write(comparison: RunComparison, out: Path, stream: TextIO) -> None:
    from p2pcodistill.report.run_comparison_html import write_run_comparison  # late: it draws

    title = "Comparison of " + ", ".join(run.name for run in comparison.runs)
    write_run_comparison(comparison, out, title=title)
    tables = [
        arms_table(group.comparison, title=f"{group.title}, {group.loss_unit}") for group in comparison.groups
    ]
    notes = [*map(group_headline, comparison.groups), *comparison.notes]
    tell(tables, notes, out, stream)

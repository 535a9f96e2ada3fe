"""Several runs held side by side: which of them can be compared at all, and what is then seen.

Losses are compared only between runs of one task that were evaluated on the same held-out data, in the same unit; others are
shown apart. Within such a group, runs may differ in anything: in what they do, a note or the table of settings says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2pcodistill.errors import ConfigError
from p2pcodistill.report.arm_figures import ArmFigures, arm_figures
from p2pcodistill.report.comparison import ArmRow, Comparison, compare, markdown, with_spread
from p2pcodistill.report.recorded import RecordedRun
from p2pcodistill.report.table import ABSENT

_NOT_OF_MODEL = (
    *("task.data", "task.held_out", "task.shards", "task.num_shards", "task.shard_by", "task.max_"),
    *("task.vocabulary", "task.text_column", "task.unlabelled"),
    *("task.num_generated_examples", "task.generator_seed", "task.malformed_rows"),
    *("task.label_column", "task.crop_padding", "task.flip"),
)
"""How settings of a task begin that are none of its model, nor of what that is given to see."""
_MAX_VALUE_CHARS = 60


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs whose losses are of the same thing. Arms have the labels of `labels`: by run and by the arm's own name."""

    runs: Sequence[RecordedRun]
    labels: Mapping[str, Mapping[str, str]]
    comparison: Comparison

    @property
    def loss_unit(self) -> str:
        """Of all of them."""
        return self.runs[0].loss_unit

    @property
    def title(self) -> str:
        """Which runs these are."""
        return ", ".join(run.name for run in self.runs)


@dataclass(frozen=True, slots=True)
class RunComparison:
    """All runs: in groups that can be compared, with what has to be said of them."""

    groups: Sequence[RunGroup]
    notes: Sequence[str]
    differing: Mapping[str, Sequence[str]]
    """Values of the settings in which the runs differ, in the order of `runs`."""

    @property
    def runs(self) -> list[RecordedRun]:
        """In the order of their groups."""
        return [run for group in self.groups for run in group.runs]

    def to_record(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            "runs": [
                {
                    "name": run.name,
                    "folder": str(run.folder),
                    "task": run.task,
                    "loss_unit": run.loss_unit,
                    "seconds": run.clock,
                    "num_steps": run.num_steps,
                    "num_parameters": run.num_parameters,
                    "seeds": run.seeds,
                    "unfinished": list(run.unfinished),
                }
                for run in self.runs
            ],
            "groups": [
                {
                    "runs": [run.name for run in group.runs],
                    "loss_unit": group.loss_unit,
                    "labels": group.labels,
                    "comparison": group.comparison.to_record(),
                }
                for group in self.groups
            ],
            "notes": list(self.notes),
            "differing_settings": {key: list(values) for key, values in self.differing.items()},
        }


def compare_runs(runs: Sequence[RecordedRun], baseline: str | None = None) -> RunComparison:
    """Put `runs`, whose names differ, side by side.

    `baseline` is `RUN` or `RUN:ARM`, what the others of its group are compared with; elsewhere, and without it, that is the
    first lone arm of the group's first run (or its first arm that is not codistilled, or its first). Raises ConfigError for
    a baseline that is not there.
    """
    chosen = None if baseline is None else _find_baseline(runs, baseline)
    together: list[list[RecordedRun]] = []
    for run in runs:
        comparable = next((of for of in together if _apart(run, of[0]) is None), None)
        if comparable is None:
            together.append([run])
        else:
            comparable.append(run)
    groups = [_group(of, chosen) for of in together]
    notes = [
        f"{of[0].name} is shown apart from {runs[0].name}, and not compared with it: {_apart(of[0], runs[0])}."
        for of in together[1:]
    ]
    for group in groups:
        notes += _cautions(group)
    ordered = [run for group in groups for run in group.runs]
    return RunComparison(groups, notes, _differing(ordered))


def default_baseline(run: RecordedRun) -> str:
    """The arm that others are compared with where nobody has said which."""
    lone = [name for name, kind in run.arms.items() if kind == "alone"]
    others = [name for name, kind in run.arms.items() if kind != "codistilled"]
    return [*lone, *others, *run.arms][0]


def _find_baseline(runs: Sequence[RecordedRun], text: str) -> tuple[str, str]:
    """The run and the arm that `text` means."""
    named = {name: run for run in runs for name in (run.name, str(run.folder))}
    if text in named:
        return named[text].name, default_baseline(named[text])
    run_name, colon, arm = text.rpartition(":")
    if not colon or run_name not in named:
        raise ConfigError(
            f"--baseline {text} is none of the runs: it takes RUN or RUN:ARM, of {', '.join(r.name for r in runs)}"
        )
    run = named[run_name]
    if arm not in run.arms:
        raise ConfigError(f"--baseline {text}: the arms of {run_name} are {', '.join(run.arms)}")
    return run.name, arm


def _group(runs: Sequence[RecordedRun], chosen: tuple[str, str] | None) -> RunGroup:
    labels = {
        run.name: {arm: run.name if len(run.arms) == 1 else f"{run.name}: {arm}" for arm in run.arms}
        for run in runs
    }
    arms: dict[str, ArmFigures] = {}
    for run in runs:
        for name, figures in arm_figures(run.results, {}).items():
            label = labels[run.name][name]
            # Sites of one name in two runs need not have the same data: each arm is taken as a whole.
            arms[label] = replace(figures, name=label, histories={})
    run_name, arm = chosen if chosen is not None and chosen[0] in labels else (runs[0].name, "")
    arm = arm or default_baseline(runs[0])
    return RunGroup(runs, labels, compare(arms, baseline=labels[run_name][arm]))


# --- what has to be said -------------------------------------------------------------------------------------------


def _apart(run: RecordedRun, other: RecordedRun) -> str | None:
    """Why the losses of two runs are of different things; None if they are of the same."""
    if run.task != other.task:
        return f"the tasks are {run.task} and {other.task}"
    if run.loss_unit != other.loss_unit:
        return f"losses are in {run.loss_unit} and {other.loss_unit}"
    if not run.held_out.is_same(other.held_out):
        if run.held_out.has_same_kind(other.held_out):
            return "they were evaluated on different held-out data"
        return "nothing shows that they were evaluated on the same held-out data"
    return None


def _cautions(group: RunGroup) -> list[str]:
    first, *others = group.runs
    notes = []
    for run in others:
        pair = f"{run.name} and {first.name}"
        if not run.held_out.has_same_kind(first.held_out):
            notes.append(
                f"That {pair} were evaluated on the same held-out data is what their configurations say; neither text nor "
                "predictions of both are there to check it."
            )
        model = [key for key in _differing([first, run]) if _is_of_model(key)]
        if model:
            told = ", ".join(
                f"{key} is {run.settings.get(key, ABSENT)} and {first.settings.get(key, ABSENT)}"
                for key in model
            )
            notes.append(f"{pair} have different models: {told}.")
        elif run.num_parameters != first.num_parameters:
            notes.append(
                f"{pair} have models of different sizes: {_sizes(run)} and {_sizes(first)} parameters."
            )
        if run.num_steps != first.num_steps:
            notes.append(
                f"{pair} have trained for different numbers of steps, {run.num_steps} and {first.num_steps}: their final "
                "losses are not of equal training."
            )
        if run.clock != first.clock:
            notes.append(f"Seconds of {run.name} are {run.clock}, those of {first.name} {first.clock}.")
    for run in group.runs:
        notes += [f"{run.name}: {told}." for told in run.unfinished]
    return [*notes, *_without_difference(group.comparison)]


def _without_difference(comparison: Comparison) -> list[str]:
    baseline = next((row for row in comparison.rows if row.name == comparison.baseline), None)
    if baseline is None:
        return []
    if not baseline.is_finished:
        return [f"{baseline.name} has not finished: nothing can be compared with it yet."]
    strange = [
        row.name for row in comparison.rows if row.is_finished and not set(row.seeds) & set(baseline.seeds)
    ]
    if not strange:
        return []
    return [
        f"No seed is common to {', '.join(strange)} and {baseline.name}: there are no differences seed by seed."
    ]


def _is_of_model(key: str) -> bool:
    return key.startswith("task.") and not key.startswith(_NOT_OF_MODEL)


def _sizes(run: RecordedRun) -> str:
    return " or ".join(f"{size:,}" for size in run.num_parameters) or ABSENT


def _differing(runs: Sequence[RecordedRun]) -> dict[str, list[str]]:
    differing: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key, ABSENT) for run in runs]
        told = {value for value in values if value != ABSENT}
        # An arm that a run does not have is no setting of it.
        is_optional = key.startswith(("arms.", "made with "))
        if len(told) > 1 or (ABSENT in values and not is_optional):
            differing[key] = [_shorten(value) for value in values]
    return differing


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"


# --- in words ----------------------------------------------------------------------------------------------------


def group_headline(group: RunGroup) -> str:
    """What was seen, in a sentence or two."""
    finished = [row for row in group.comparison.rows if row.is_finished and row.final_loss is not None]
    if not finished:
        return "No arm has finished: there is nothing to compare yet."
    best = min(finished, key=_mean_loss)
    sentence = (
        f"The lowest final held-out loss is {with_spread(best.final_loss)} {group.loss_unit} ({best.name})"
    )
    if best.difference is not None:
        difference = with_spread(best.difference, signed=True)
        sentence += f", {difference} from the baseline ({group.comparison.baseline})"
    elif best.name == group.comparison.baseline and len(finished) > 1:
        sentence += ", of the baseline itself"
    if best.final_loss is not None and best.final_loss.num > 1:
        sentence += "; means over seeds, ± half their range"
    return f"{sentence}."


def _mean_loss(row: ArmRow) -> float:
    assert row.final_loss is not None, "only of arms that have one"
    return row.final_loss.mean


RUN_HEADINGS = ("run", "arms", "seeds", "steps", "parameters", "task", "seconds", "folder")
"""Of `run_cells`."""


def run_cells(run: RecordedRun) -> list[str]:
    """What there is to know of a run before its figures."""
    return [
        run.name,
        str(len(run.arms)),
        ", ".join(map(str, run.seeds)),
        f"{run.num_steps:,}",
        _sizes(run),
        run.task,
        run.clock,
        str(run.folder),
    ]


def runs_markdown(comparison: RunComparison, *, heading: str) -> str:
    """The result as sections of a Markdown file."""
    parts = [f"# {heading}\n", _markdown_table(RUN_HEADINGS, map(run_cells, comparison.runs))]
    if comparison.notes:
        parts.append("".join(f"- {note}\n" for note in comparison.notes))
    parts += [
        markdown(group.comparison, heading=group.title, facts=[group_headline(group), _baseline_fact(group)])
        for group in comparison.groups
    ]
    if comparison.differing:
        rows = ([key, *values] for key, values in comparison.differing.items())
        parts += [
            "## Settings that differ\n",
            _markdown_table(["setting", *(run.name for run in comparison.runs)], rows),
        ]
    return "\n".join(parts)


def _baseline_fact(group: RunGroup) -> str:
    return f"losses in {group.loss_unit}; the baseline is {group.comparison.baseline}"


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells)

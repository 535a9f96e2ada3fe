"""What delta frames save, and what they cost in quality: trains all that it measures on (most of an hour on two cores).

`run_ratio_vs_fp16`: the demo's pair with the demo's frames, against the same pair with fp16 keyframes, under the same seeds:
bytes of raw fp16 checkpoints / bytes of all frames sent; difference of the final held-out losses; difference of the steps to
the lone students' final loss, as a share of the run.
`delta_ratio_vs_fp16`, `delta_ratio_early`, `delta_entropy_efficiency`, `keyframe_efficiency`: the checkpoints of a pair that
exchanges them exactly, sent as one chain a site; of the demo's model and of the network of `letters`, with decaying and with
constant learning rate. Losses of teachers are those of the decoded reference, against the exact weights of the same step.
`teachers_side_by_side`: the pair with exact, ternary and averaged (EMA) teachers under both schedules.
`keyframe_compressors`: what else could compress keyframes.

    python -m benchmarks.codec_quality [--seeds 5] [--steps 2000]      (fewer of them for a quick look)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.chains import list_checkpoints, load_checkpoint
from benchmarks.figure import print_figure
from benchmarks.keyframe_compressors import print_compressors
from benchmarks.quality_jobs import ChainJob, ChainResult, TrainJob, run_jobs
from benchmarks.training import EXACT, SITES, Run, SiteResult, codistillation_config, demo_scenario
from p2pcodistill.config import FramesConfig

MIN_RUN_RATIO = 20
MAX_FINAL_LOSS_PERCENT = 0.5
MAX_STEPS_DIFFERENCE = 0.03
MIN_DELTA_RATIO = 16
MIN_EARLY_RATIO = 8
EARLY_STEPS = 1000
MAX_TEACHER_LOSS_PERCENT = 0.5
MIN_ENTROPY_EFFICIENCY = 0.95
MIN_KEYFRAME_EFFICIENCY = 0.99
TERNARY = FramesConfig(delta="ternary")
AVERAGE_DECAY = 0.98
LETTERS_STEPS = 1500
_TITLES = {"language-model": "demo's language model", "letters": "convolutional network with batch norm"}
_RATES = {"cosine": "decaying", "constant": "constant"}

Results = dict[Run, dict[str, SiteResult]]


def main() -> None:
    """Train, then print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=demo_scenario().training.num_steps)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(list(range(options.seeds)), options.steps)
        chained = plan.chained()
        jobs = [
            (
                run,
                TrainJob(
                    run, folder, folder / f"checkpoints-{chained.index(run)}" if run in chained else None
                ),
            )
            for run in plan.runs()
        ]
        results: Results = run_jobs(jobs, "trained")
        print_run_ratio(plan, results)
        chain_jobs = [
            ((run, site), ChainJob(run, site, plan.frames, folder, folder / f"checkpoints-{index}"))
            for index, run in enumerate(chained)
            for site in SITES
        ]
        chains = run_jobs(chain_jobs, "sent")
        for run in chained:
            print_chain_figures(run, [chains[run, site] for site in SITES])
        print_teachers(plan, results)
        for index, run in enumerate(chained):
            if run.schedule != "cosine":
                continue
            newest = list_checkpoints(folder / f"checkpoints-{index}", SITES[0])[-1]
            print_compressors(load_checkpoint(newest), describe(run))


class Plan:
    """Which runs there are."""

    def __init__(self, seeds: list[int], num_steps: int) -> None:
        self.seeds, self.num_steps = seeds, num_steps
        self.frames: FramesConfig = demo_scenario().frames

    def pair(
        self, seed: int, frames: FramesConfig | None, schedule: Any = "cosine", decay: float = 0.0
    ) -> Run:
        """A run of the demo's model."""
        return Run("language-model", schedule, seed, self.num_steps, frames, decay)

    def chained(self) -> list[Run]:
        """The runs whose checkpoints are kept."""
        letters_steps = min(LETTERS_STEPS, self.num_steps)
        return [self.pair(self.seeds[0], EXACT, schedule) for schedule in _RATES] + [
            Run("letters", schedule, self.seeds[0], letters_steps, EXACT) for schedule in _RATES
        ]  # type: ignore[arg-type]

    def teachers(self, schedule: str) -> dict[str, Run]:
        """The runs that are shown side by side."""
        seed = self.seeds[0]
        return {
            "exact": self.pair(seed, EXACT, schedule),
            f"{self.frames.delta}, as in the demo": self.pair(seed, self.frames, schedule),
            "ternary": self.pair(seed, TERNARY, schedule),
            f"EMA {AVERAGE_DECAY}": self.pair(seed, EXACT, schedule, AVERAGE_DECAY),
        }

    def runs(self) -> list[Run]:
        """All, each once."""
        paired = [self.pair(seed, frames) for seed in self.seeds for frames in (EXACT, self.frames, None)]
        side_by_side = [run for schedule in _RATES for run in self.teachers(schedule).values()]
        return list(dict.fromkeys([*paired, *side_by_side, *self.chained()]))


def describe(run: Run) -> str:
    """Which model, how trained."""
    interval = codistillation_config(run).exchange_interval_steps
    return (
        f"{_TITLES[run.model]}, {_RATES[run.schedule]} learning rate, {run.num_steps} steps, checkpoints "
        f"{interval} steps apart"
    )


# --- whole runs ---------------------------------------------------------------------------------------------------


def print_run_ratio(plan: Plan, results: Results) -> None:
    """Bytes of whole runs, and what they cost."""
    rows, num_fp16_bytes, num_frame_bytes = [], 0, 0
    for seed in plan.seeds:
        exact, ours, alone = (results[plan.pair(seed, frames)] for frames in (EXACT, plan.frames, None))
        for site in SITES:
            assert len(ours[site].frame_sizes) == len(exact[site].frame_sizes)
            num_fp16_bytes += ours[site].num_fp16_bytes * len(ours[site].frame_sizes)
            num_frame_bytes += sum(ours[site].frame_sizes)
        baseline = statistics.mean(result.final_loss for result in alone.values())
        losses = [mean_final_loss(arm) for arm in (exact, ours)]
        steps = [mean_steps_to(arm, baseline, plan.num_steps) for arm in (exact, ours)]
        rows.append(
            {
                "seed": seed,
                "final_loss": [round(loss, 4) for loss in losses],
                "steps_to_baseline": [round(share, 3) for share in steps],
                "alone": round(baseline, 4),
                "loss_percent": round(100 * (losses[1] / losses[0] - 1), 3),
            }
        )
    loss_percent = statistics.mean(row["loss_percent"] for row in rows)
    steps_difference = statistics.mean(
        row["steps_to_baseline"][1] - row["steps_to_baseline"][0] for row in rows
    )
    value = num_fp16_bytes / num_frame_bytes
    print_figure(
        "run_ratio_vs_fp16",
        round(value, 2),
        "bytes of raw fp16 checkpoints / of all frames sent",
        f"at least {MIN_RUN_RATIO}; final loss at most {MAX_FINAL_LOSS_PERCENT} % worse, steps to baseline at most "
        f"{MAX_STEPS_DIFFERENCE} more",
        holds=value >= MIN_RUN_RATIO
        and loss_percent <= MAX_FINAL_LOSS_PERCENT
        and steps_difference <= MAX_STEPS_DIFFERENCE,
        on=f"{describe(plan.pair(0, EXACT))}, codistilled pair, keyframes included, {len(plan.seeds)} paired seeds",
        frames=plan.frames.model_dump(),
        loss_percent=round(loss_percent, 3),
        loss_percent_deviation=_deviation([row["loss_percent"] for row in rows]),
        steps_difference=round(steps_difference, 4),
        exact_then_ours_by_seed=rows,
    )


def mean_final_loss(arm: dict[str, SiteResult]) -> float:
    """Over the sites."""
    return statistics.mean(result.final_loss for result in arm.values())


def mean_steps_to(arm: dict[str, SiteResult], loss: float, num_steps: int) -> float:
    """Over the sites, as a share of the run; a site that never gets there counts as 1."""
    steps = [result.first_step_at_or_below(loss) for result in arm.values()]
    return statistics.mean(num_steps if step is None else step for step in steps) / num_steps


def _deviation(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 3) if len(values) > 1 else None


# --- chains -------------------------------------------------------------------------------------------------------


def print_chain_figures(run: Run, chains: list[ChainResult]) -> None:
    """Of the two sites' chains of one run, the means."""
    on = describe(run)
    is_bound = run.schedule == "cosine"
    for name, min_ratio, up_to_step in (
        ("delta_ratio_vs_fp16", MIN_DELTA_RATIO, run.num_steps),
        ("delta_ratio_early", MIN_EARLY_RATIO, EARLY_STEPS),
    ):
        value = statistics.mean(chain.delta_ratio(up_to_step) for chain in chains)
        percent = 100 * statistics.mean(chain.mean_excess_loss(up_to_step) for chain in chains)
        bound = f"at least {min_ratio}, teacher's loss at most {MAX_TEACHER_LOSS_PERCENT} % worse"
        print_figure(
            name,
            round(value, 2),
            "bytes of raw fp16 checkpoints / of delta frames",
            bound if is_bound else "none: the bound is for a decaying rate",
            holds=(value >= min_ratio and percent <= MAX_TEACHER_LOSS_PERCENT) if is_bound else None,
            on=on if up_to_step == run.num_steps else f"{on}, steps up to {up_to_step}",
            why="" if is_bound else "shown beside",
            teacher_loss_percent=round(percent, 3),
            teacher_loss_percent_by_step={
                step: round(100 * loss, 2)
                for step, loss in chains[0].excess_losses.items()
                if step <= up_to_step
            },
            codecs={
                codec: chains[0].codecs[1:].count(codec) for codec in dict.fromkeys(chains[0].codecs[1:])
            },
        )
    efficiency = statistics.mean(chain.entropy_efficiency for chain in chains)
    print_figure(
        "delta_entropy_efficiency",
        round(efficiency, 4),
        "order-0 entropy of the codes by tensor, and scales / bytes sent for them",
        f"at least {MIN_ENTROPY_EFFICIENCY}",
        holds=efficiency >= MIN_ENTROPY_EFFICIENCY,
        on=f"{on}, all delta frames",
        of_all_bytes=round(statistics.mean(chain.entropy_efficiency_of_all_bytes for chain in chains), 4),
    )
    efficiency = statistics.mean(chain.keyframe_efficiency for chain in chains)
    print_figure(
        "keyframe_efficiency",
        round(efficiency, 4),
        "order-0 entropy of the fp16 byte planes / bytes sent",
        f"at least {MIN_KEYFRAME_EFFICIENCY}",
        holds=efficiency >= MIN_KEYFRAME_EFFICIENCY,
        on=f"{on}, last checkpoint",
        by_tensor=round(statistics.mean(chain.keyframe_efficiency_by_tensor for chain in chains), 4),
    )


# --- teachers side by side ----------------------------------------------------------------------------------------


def print_teachers(plan: Plan, results: Results) -> None:
    """Held-out losses of teachers and students, and bytes, of each kind of teacher under each schedule."""
    for schedule, rate in _RATES.items():
        rows = {name: _teacher_row(results[run]) for name, run in plan.teachers(schedule).items()}
        exact = rows["exact"]["students_final_loss"]
        best = min(rows.values(), key=lambda row: row["students_final_loss"])
        print_figure(
            "teachers_side_by_side",
            round(100 * (best["students_final_loss"] / exact - 1), 3),
            "% that the best students' final loss differs from that with exact teachers",
            "none: a comparison",
            holds=None,
            why="shown beside",
            on=f"{describe(plan.pair(0, EXACT, schedule))}, codistilled pair, seed {plan.seeds[0]}, {rate} rate",
            rows=rows,
        )


def _teacher_row(arm: dict[str, SiteResult]) -> dict[str, Any]:
    by_step = {
        step: round(statistics.mean(result.teacher_losses[step] for result in arm.values()), 4)
        for step in next(iter(arm.values())).teacher_losses
    }
    num_bytes = sum(sum(result.frame_sizes) for result in arm.values())
    num_fp16_bytes = sum(result.num_fp16_bytes * len(result.frame_sizes) for result in arm.values())
    return {
        "students_final_loss": round(mean_final_loss(arm), 4),
        "teachers_loss_by_step": by_step,
        "run_ratio": round(num_fp16_bytes / num_bytes, 2),
    }


if __name__ == "__main__":
    main()

"""The figures of a run in words: the headline, how numbers are shown, and all of them as a table."""

from __future__ import annotations

from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from p2pcodistill.report.summary import KINDS, Summary, of_seed, seeds_without_gap


def headline(summary: Summary) -> str:
    """The outcome in a few plain sentences, whatever it was."""
    losses, unit = summary["final_val_loss"], summary["loss_unit"]
    if not summary["is_compared"]:
        return _site_headline(summary)
    names = {
        "codistilled": "codistilled sites",
        "alone": "sites alone",
        "pooled": "one site with all data pooled",
    }
    told = [f"{names[kind]} at {losses[kind]:.3f}" for kind in KINDS if losses[kind] is not None]
    if not told:
        return "No arm has finished: there is nothing to compare yet."
    sentences = [f"Held-out losses end, in {unit}: {', '.join(told)}."]
    if summary["gap_closed_ratio"] is not None:
        sentences.append(_gap_sentence(summary))
    elif any(seed["final_val_loss"][kind] is None for seed in summary["by_seed"] for kind in KINDS):
        sentences.append("How much of the gap is closed cannot be told: an arm is missing or did not finish.")
    else:
        without = [of_seed(seed, summary) for seed in seeds_without_gap(summary)]
        sentences.append(
            f"Pooling the data gained nothing here{''.join(without)}, so there was no gap to close."
        )
    if summary["steps_to_baseline_loss_ratio"] is not None:
        steps = _with_spread(summary, "steps_to_baseline_loss_ratio", 1, 2)
        sentences.append(f"The lone sites' final loss is reached after {steps} of the steps.")
    elif losses["codistilled"] is not None and losses["alone"] is not None:
        sentences.append("Not every codistilled site reached the lone sites' final loss.")
    if summary["seconds_ratio_vs_alone"] is not None:
        seconds = _with_spread(summary, "seconds_ratio_vs_alone", 1, 2)
        sentences.append(f"Training took {seconds} times as long as alone.")
    if summary["bytes_vs_fp16_ratio"] is not None:
        ratio = _with_spread(summary, "bytes_vs_fp16_ratio", 1, 1)
        sentences.append(f"Checkpoints travelled {ratio} times smaller than as raw fp16.")
    sentences += [_other_sentence(other) for other in summary["other_arms"]]
    if len(summary["seeds"]) > 1:
        sentences.append(f"Each figure is the mean of {len(summary['seeds'])} seeds, ± half their range.")
    return " ".join(sentences)


def _site_headline(summary: Summary) -> str:
    """Of a single site's own run."""
    ((site, values),) = summary["arms"][0]["sites"].items()
    where = "in the end" if values["finished"] else f"at step {values['num_steps']} of {summary['num_steps']}"
    loss = values["final_val_loss"]
    shown = "is not finite" if loss is None else f"is {loss:.3f} {summary['loss_unit']}"
    return f"The held-out loss of {site} {shown} {where}."


def _gap_sentence(summary: Summary) -> str:
    if summary["gap_closed_ratio"] < 0:
        return "Codistillation made it worse than being alone: no part of the gap is closed."
    gap = _with_spread(summary, "gap_closed_ratio", 100, 0)
    return f"{gap} % of the gap between alone and pooled is closed, without moving a byte of training data."


def _other_sentence(other: Summary) -> str:
    if other["final_val_loss"]["codistilled"] is None:
        return f"The arm {other['name']} did not finish."
    parts = [f"at {other['final_val_loss']['codistilled']:.3f}"]
    if other["gap_closed_ratio"] is not None:
        parts.append(f"{_with_spread(other, 'gap_closed_ratio', 100, 0)} % of the gap closed")
    if other["steps_to_baseline_loss_ratio"] is not None:
        parts.append(f"{_with_spread(other, 'steps_to_baseline_loss_ratio', 1, 2)} of the steps")
    if other["bytes_vs_fp16_ratio"] is not None:
        parts.append(f"{_with_spread(other, 'bytes_vs_fp16_ratio', 1, 1)} times smaller than fp16")
    return f"The arm {other['name']}: {', '.join(parts)}."


def _with_spread(summary: Summary, name: str, factor: float, num_digits: int) -> str:
    """The figure `name`; over several seeds with half its range."""
    figure = f"{factor * summary[name]:.{num_digits}f}"
    spread = summary["over_seeds"] and summary["over_seeds"][name]
    return f"{figure} ± {factor * spread['half_range']:.{num_digits}f}" if spread else figure


ABSENT = "–"


def number(value: float | None, num_digits: int = 0) -> str:
    """`value` with `num_digits` decimals, or a dash for None."""
    return ABSENT if value is None else f"{value:.{num_digits}f}"


def percent(ratio: float | None, num_digits: int = 0) -> str:
    """`ratio` as a percentage, or a dash for None."""
    return ABSENT if ratio is None else f"{100 * ratio:.{num_digits}f} %"


def times(ratio: float | None) -> str:
    """`ratio` as a factor, or a dash for None."""
    return ABSENT if ratio is None else f"{ratio:.1f}×"


def byte_count(num_bytes: int) -> str:
    """`num_bytes` in decimal units with one decimal, or a dash for none."""
    return decimal(num_bytes).replace("bytes", "B") if num_bytes else ABSENT


def table(summary: Summary) -> Table:
    """A line per arm and site, legible at 100 columns; the headline is the caption."""
    many_seeds = len(summary["seeds"]) > 1
    result = Table(
        title=f"{summary['scenario']}: {summary['num_steps']} steps",
        caption=Text(headline(summary)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # Names give way where the width does not do, numbers never.
    result.add_column("arm", overflow="fold")
    if many_seeds:
        result.add_column("seed", justify="right")
    result.add_column("site", overflow="fold")
    for heading in (
        f"held-out\n{summary['loss_unit']}",
        "lone\nloss at",
        "\nswaps",
        "stale\nsteps",
        "\nstall",
        "\nsent",
        "re-\nceived",
        "vs\nfp16",
        "steps\n/s",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for arm in summary["arms"]:
        for index, (site, values) in enumerate(arm["sites"].items()):
            swaps = values["num_teacher_swaps"]
            unfinished = "" if values["finished"] else "*"
            result.add_row(
                arm["name"] if index == 0 else "",
                *([str(arm["seed"])] if many_seeds else []),
                Text(site + unfinished),
                number(values["final_val_loss"], 3),
                percent(values["steps_to_baseline_loss_ratio"]),
                str(swaps) if swaps else ABSENT,
                number(values["mean_staleness_steps"], 1),
                percent(values["exchange_stall_ratio"], 2) if swaps else ABSENT,
                byte_count(values["bytes_sent"]),
                byte_count(values["bytes_received"]),
                times(values["bytes_vs_fp16_ratio"]),
                number(values["steps_per_s"], 1),
                end_section=index == len(arm["sites"]) - 1,
            )
    if any(not site["finished"] for arm in summary["arms"] for site in arm["sites"].values()):
        result.caption = Text(f"* did not finish. {headline(summary)}")
    return result

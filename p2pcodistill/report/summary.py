"""The figures of a run: what `summary.json` holds.

Three kinds of arms are compared: `codistilled` sites, the same sites each `alone`, and one site with all data `pooled`.
They are equal in steps, batch and model, but not in compute: a codistilled site also runs its teachers' forward pass.
Losses are final held-out losses. A figure that cannot be told honestly (an arm is missing, a site did not finish, a loss is
not finite) is None, and `notes` says why.

Of several arms of one kind, the first is compared: arms that differ in what they exchange are never averaged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.peers import PeerHistory

Kind: TypeAlias = str
"""That of an arm, as its scenario says."""
KINDS: tuple[Kind, ...] = ("codistilled", "alone", "pooled")
"""What the headline compares."""
POOLED_SITE = "pooled"
"""The site of arms that have one model for all data."""
Summary: TypeAlias = dict[str, Any]

HEADLINES = (
    "gap_closed_ratio",
    "steps_to_baseline_loss_ratio",
    "seconds_ratio_vs_alone",
    "worst_exchange_stall_ratio",
    "bytes_vs_all_reduce_ratio",
    "bytes_vs_fp16_ratio",
)
_MEANS_OVER_SEEDS = ("gap_closed_ratio", "steps_to_baseline_loss_ratio", "seconds_ratio_vs_alone")


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm of a scenario under one seed: what each of its sites went through."""

    name: str
    kind: Kind
    seed: int
    sites: dict[str, SiteHistory]
    is_finished: bool = True
    """Whether every site got to the end that was to: not so where a run was stopped, or still goes on."""


def all_reduce_bytes(num_sites: int, num_parameters: int, num_steps: int) -> int:
    """Bytes that each of `num_sites` sites would have sent to all-reduce fp32 gradients at every step.

    A ring all-reduce sends 2 (n - 1) / n of the gradient per site; that is the least that any algorithm can do.
    """
    return 2 * (num_sites - 1) * num_parameters * 4 * num_steps // num_sites


def summarise(
    scenario_name: str,
    arms: Sequence[ArmResult],
    num_steps: int,
    *,
    loss_unit: str = "nats/byte",
    is_compared: bool = True,
) -> Summary:
    """What `summary.json` holds; JSON without NaN. `num_steps` are the steps of the run, `loss_unit` names that of losses.
    `is_compared` is False of a single site's own run, which no other arm belongs to.

    Of each seed, and then the mean over seeds; None if it is None for one of them:

    - `gap_closed_ratio`: (alone - codistilled) / (alone - pooled), of final held-out losses, means over sites. None where
      pooling gains nothing over being alone.
    - `steps_to_baseline_loss_ratio`: mean over codistilled sites of the first evaluated step at which the site is at or
      below the lone sites' mean final loss, divided by `num_steps`; None if a site never gets there.
    - `seconds_ratio_vs_alone`: mean training seconds of codistilled sites / of lone sites, teachers' forward passes,
      evaluations and whatever else ran on the machine included; None if a site did not finish.

    Over all seeds at once:

    - `worst_exchange_stall_ratio`: the largest share of time that a codistilled site's training spent in exchange.
    - `bytes_vs_all_reduce_ratio`: bytes that all-reducing fp32 gradients between the sites would have sent, divided by the
      bytes really sent, envelopes and control messages included.
    - `bytes_vs_fp16_ratio`: bytes of the checkpoints that students fetched as raw fp16, each version once a student, divided
      by the bytes of the frames that brought them, keyframes and what was sent again included.
    - `final_val_loss`: per kind of arm, the mean over sites and seeds.

    In detail:

    - `by_seed`: the same figures of each seed. `over_seeds`: mean and half the range of each figure over the seeds; None
      with one seed.
    - `other_arms`: the same figures of each further codistilled arm, by its `name`.
    - `arms`: per arm and seed, per site, all that the figures were made of.
    """
    first = _compared(arms)
    summary: Summary = {
        "scenario": scenario_name,
        "num_steps": num_steps,
        "seeds": sorted({arm.seed for arm in arms}),
        "loss_unit": loss_unit,
        "is_compared": is_compared,
    }
    summary |= _compare(first, num_steps)
    summary["other_arms"] = [
        {"name": name} | _compare(_compared(arms, name), num_steps)
        for name in dict.fromkeys(arm.name for arm in arms if arm.kind == "codistilled" and arm not in first)
    ]
    summary["arms"] = [_arm_summary(arm, first, num_steps) for arm in arms]
    summary["notes"] = _notes(summary, arms, num_steps)
    return summary


def _compared(arms: Sequence[ArmResult], codistilled: str | None = None) -> list[ArmResult]:
    """The arms that are compared: the codistilled ones of this name, or the first, and the first of the other kinds."""
    names = {arm.kind: arm.name for arm in reversed(arms)}
    if codistilled is not None:
        names["codistilled"] = codistilled
    return [arm for arm in arms if arm.name == names[arm.kind]]


def _compare(arms: Sequence[ArmResult], num_steps: int) -> dict[str, Any]:
    by_seed = [
        {"seed": seed} | _headlines([arm for arm in arms if arm.seed == seed], num_steps)
        for seed in sorted({arm.seed for arm in arms})
    ]
    figures = _headlines(arms, num_steps)
    figures |= {name: _mean([seed[name] for seed in by_seed]) for name in _MEANS_OVER_SEEDS}
    figures["by_seed"] = by_seed
    figures["over_seeds"] = (
        {name: _mean_and_half_range([seed[name] for seed in by_seed]) for name in HEADLINES}
        if len(by_seed) > 1
        else None
    )
    return figures


def _headlines(arms: Sequence[ArmResult], num_steps: int) -> dict[str, Any]:
    losses = {kind: _mean_final_loss(arms, kind, num_steps) for kind in KINDS}
    codistilled = [(arm, site) for arm in arms if arm.kind == "codistilled" for site in arm.sites]
    to_baseline = [
        _steps_to_baseline_ratio(arm.sites[site], _baseline_loss(arms, arm.seed, num_steps), num_steps)
        for arm, site in codistilled
    ]
    stalls = [arm.sites[site].exchange_stall_ratio for arm, site in codistilled]
    known_stalls = [stall for stall in stalls if stall is not None]
    all_reduced = [_all_reduce_bytes_of(arm, arm.sites[site]) for arm, site in codistilled]
    sent = sum(arm.sites[site].num_bytes_sent for arm, site in codistilled)
    frames = [_fetched_from(arm, site) for arm, site in codistilled]
    return {
        "gap_closed_ratio": _gap_closed(losses),
        "steps_to_baseline_loss_ratio": _mean(to_baseline),
        "seconds_ratio_vs_alone": _ratio(
            _mean_seconds(arms, "codistilled", num_steps), _mean_seconds(arms, "alone", num_steps)
        ),
        "worst_exchange_stall_ratio": max(known_stalls, default=None),
        "bytes_vs_all_reduce_ratio": _ratio(_sum(all_reduced), sent),
        "bytes_vs_fp16_ratio": _ratio(
            sum(num_fp16_bytes for num_fp16_bytes, _ in frames), sum(num_bytes for _, num_bytes in frames)
        ),
        "final_val_loss": losses,
    }


def _fetched_from(arm: ArmResult, site: str) -> tuple[int, int]:
    """Bytes of the checkpoints of `site` that the others learnt from, as raw fp16, and of all its frames they fetched."""
    num_fp16_bytes = arm.sites[site].num_fp16_bytes
    fetched = [history.fetched[site] for history in arm.sites.values() if site in history.fetched]
    if num_fp16_bytes is None:
        return 0, 0
    num_versions = sum(len(history.swapped.get(site, ())) for history in arm.sites.values())
    return num_fp16_bytes * num_versions, sum(of.num_bytes for of in fetched)


def _gap_closed(losses: Mapping[Kind, float | None]) -> float | None:
    alone, pooled, codistilled = losses["alone"], losses["pooled"], losses["codistilled"]
    if alone is None or pooled is None or codistilled is None or alone <= pooled:
        return None
    return (alone - codistilled) / (alone - pooled)


def _has_finished(history: SiteHistory, num_steps: int) -> bool:
    # Killed between its last evaluation and the record of its end, a site has still done all that is compared here.
    return history.finished or (bool(history.evaluations) and history.evaluations[-1][0] >= num_steps)


def _mean_final_loss(arms: Iterable[ArmResult], kind: Kind, num_steps: int) -> float | None:
    histories = [history for arm in arms if arm.kind == kind for history in arm.sites.values()]
    return _mean([_finite(h.final_val_loss) if _has_finished(h, num_steps) else None for h in histories])


def _mean_seconds(arms: Iterable[ArmResult], kind: Kind, num_steps: int) -> float | None:
    histories = [history for arm in arms if arm.kind == kind for history in arm.sites.values()]
    return _mean([h.duration_s or None if _has_finished(h, num_steps) else None for h in histories])


def _baseline_loss(arms: Iterable[ArmResult], seed: int, num_steps: int) -> float | None:
    return _mean_final_loss([arm for arm in arms if arm.seed == seed], "alone", num_steps)


def _steps_to_baseline_ratio(
    history: SiteHistory, baseline_loss: float | None, num_steps: int
) -> float | None:
    step = None if baseline_loss is None else history.first_step_at_or_below(baseline_loss)
    return _ratio(step, num_steps)


def _all_reduce_bytes_of(arm: ArmResult, history: SiteHistory) -> int | None:
    if history.num_parameters is None:
        return None
    return all_reduce_bytes(len(arm.sites), history.num_parameters, history.num_steps)


def _arm_summary(arm: ArmResult, compared: Sequence[ArmResult], num_steps: int) -> dict[str, Any]:
    baseline_loss = _baseline_loss(compared, arm.seed, num_steps) if arm.kind == "codistilled" else None
    return {
        "name": arm.name,
        "kind": arm.kind,
        "seed": arm.seed,
        "sites": {
            site: {
                "final_val_loss": _finite(history.final_val_loss),
                "num_steps": history.num_steps,
                "finished": _has_finished(history, num_steps),
                "steps_to_baseline_loss_ratio": _steps_to_baseline_ratio(history, baseline_loss, num_steps),
                "bytes_sent": history.num_bytes_sent,
                "bytes_received": history.num_bytes_received,
                "bytes_vs_all_reduce_ratio": _ratio(
                    _all_reduce_bytes_of(arm, history), history.num_bytes_sent
                ),
                "bytes_vs_fp16_ratio": _ratio(*_fetched_from(arm, site)),
                "num_frames_published": history.num_frames_published,
                "num_keyframes_published": history.num_keyframes_published,
                "num_teacher_swaps": history.num_teacher_swaps,
                "mean_staleness_steps": history.mean_staleness_steps,
                "mean_lag_steps": history.mean_lag_steps,
                "exchange_stall_ratio": history.exchange_stall_ratio,
                "num_refusals": history.num_refusals,
                "num_refusals_by_reason": dict(history.refusals),
                "bytes_relayed_by_origin": dict(history.num_bytes_relayed),
                "peers": {name: _peer_summary(peer) for name, peer in history.peers.items()},
                "num_gatings_by_teacher": dict(history.num_gatings),
                "num_expiries_by_teacher": dict(history.num_expiries),
                "num_faults": len(history.faults),
                "num_node_starts": history.num_node_starts,
                "num_group_starts": history.num_group_starts,
                "steps_per_s": history.steps_per_s,
                "duration_s": history.duration_s,
                "num_parameters": history.num_parameters,
                "precision": history.precision,
                "device": history.device,
            }
            for site, history in arm.sites.items()
        },
    }


def _notes(summary: Summary, arms: Sequence[ArmResult], num_steps: int) -> list[str]:
    notes = []
    for kind in KINDS if summary["is_compared"] else ():
        for seed in summary["seeds"]:
            if not any(arm.kind == kind and arm.seed == seed for arm in arms):
                notes.append(f"There is no {kind} arm{of_seed(seed, summary)}.")
    for arm in arms:
        for site, history in arm.sites.items():
            name = f"{site} ({arm.name}{of_seed(arm.seed, summary)})"
            if not history.evaluations:
                notes.append(f"{name} was never evaluated.")
            elif _finite(history.final_val_loss) is None:
                notes.append(f"{name} diverged: its last held-out loss is not finite.")
            elif not _has_finished(history, num_steps):
                notes.append(f"{name} did not finish: it got to step {history.num_steps} of {num_steps}.")
            if history.faults:
                told = ", ".join(f"{kind} at step {step}" for kind, step in history.faults)
                notes.append(f"{name} was put through {len(history.faults)} fault(s): {told}.")
            for teacher, count in history.num_gatings.items():
                notes.append(f"{name} gated its teacher {teacher} off {count} time(s); its events say why.")
            for teacher, count in history.num_expiries.items():
                notes.append(f"{name} did not learn from {count} version(s) of {teacher}: over a limit.")
            if history.num_refusals:
                told = f" ({reasons_in_words(history.refusals)})" if history.refusals else ""
                notes.append(
                    f"{name} refused {history.num_refusals} thing(s) that arrived{told}; its events say why."
                )
            for peer, about in history.peers.items():
                if about.num_quarantines:
                    notes.append(
                        f"{name} did not listen to {peer} for a while, {about.num_quarantines} time(s): it kept sending "
                        "what was refused."
                    )
                if about.num_suspicions:
                    notes.append(
                        f"{name} got no answer from {peer} for a while, {about.num_suspicions} time(s), although they were "
                        "connected."
                    )
    for arm in arms:
        baseline_loss = _baseline_loss(_compared(arms), arm.seed, num_steps)
        for site, history in arm.sites.items():
            never = baseline_loss is not None and history.first_step_at_or_below(baseline_loss) is None
            if arm.kind == "codistilled" and never:
                notes.append(
                    f"{site} ({arm.name}{of_seed(arm.seed, summary)}) never reached the lone sites' final loss."
                )
    for seed in seeds_without_gap(summary):
        notes.append(
            f"Pooling the data gained nothing over being alone{of_seed(seed, summary)}: "
            "there is no gap that could be closed."
        )
    return notes


def reasons_in_words(refusals: Counter[str]) -> str:
    """How many of each reason, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in refusals.most_common())


def _peer_summary(peer: PeerHistory) -> dict[str, Any]:
    return {
        "upload_mbit": peer.upload_mbit,
        "download_mbit": peer.download_mbit,
        "round_trip_ms": peer.round_trip_ms,
        "num_connection_losses": peer.num_connection_losses,
        "max_queued_bytes": peer.max_queued_bytes,
        "num_refusals": peer.num_refusals,
        "num_quarantines": peer.num_quarantines,
        "num_suspicions": peer.num_suspicions,
    }


def seeds_without_gap(summary: Summary) -> list[int]:
    """The seeds under which pooling gained nothing."""
    losses = {figures["seed"]: figures["final_val_loss"] for figures in summary["by_seed"]}
    return [
        seed
        for seed, of in losses.items()
        if of["alone"] is not None and of["pooled"] is not None and of["alone"] <= of["pooled"]
    ]


def of_seed(seed: int, summary: Summary) -> str:
    """Names the seed where there are several."""
    return f", seed {seed}" if len(summary["seeds"]) > 1 else ""


# --- arithmetic that passes None on --------------------------------------------------------------------------------


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    total = _sum(values)
    return None if total is None else total / len(values)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _mean_and_half_range(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": sum(known) / len(known), "half_range": (max(known) - min(known)) / 2}

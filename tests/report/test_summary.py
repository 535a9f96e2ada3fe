from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from p2pcodistill.report.history import Fetched, SiteHistory
from p2pcodistill.report.summary import HEADLINES, ArmResult, all_reduce_bytes, summarise
from p2pcodistill.report.table import headline


def site(*evaluations: tuple[int, float], finished: bool = True, **fields) -> SiteHistory:
    return SiteHistory(
        evaluations=list(evaluations), num_steps=evaluations[-1][0], finished=finished, **fields
    )


def arms_of(codistilled, alone, pooled, seed: int = 0) -> list[ArmResult]:
    return [
        ArmResult("codistilled", "codistilled", seed, dict(codistilled)),
        ArmResult("alone", "alone", seed, dict(alone)),
        ArmResult("pooled", "pooled", seed, {"pooled": pooled}),
    ]


def simple_arms(
    berlin: float = 1.1, tokyo: float = 1.3, pooled: float = 1.0, seed: int = 0
) -> list[ArmResult]:
    """Lone sites end at 1.9 and 2.1: their mean is 2.0."""
    return arms_of(
        {"berlin": site((50, 2.5), (100, berlin)), "tokyo": site((50, 1.9), (100, tokyo))},
        {"berlin": site((50, 3.0), (100, 1.9)), "tokyo": site((50, 3.0), (100, 2.1))},
        site((50, 3.0), (100, pooled)),
        seed,
    )


def test_headlines_by_hand():
    summary = summarise("pair", simple_arms(), 100)
    assert summary["final_val_loss"] == {
        "codistilled": pytest.approx(1.2),
        "alone": pytest.approx(2.0),
        "pooled": 1.0,
    }
    assert summary["gap_closed_ratio"] == pytest.approx(0.8)
    assert summary["steps_to_baseline_loss_ratio"] == pytest.approx((1.0 + 0.5) / 2)
    sites = summary["arms"][0]["sites"]
    assert [sites[name]["steps_to_baseline_loss_ratio"] for name in ("berlin", "tokyo")] == [1.0, 0.5]
    assert summary["over_seeds"] is None
    assert summary["notes"] == []


def test_the_summary_of_a_whole_run_is_strict_json_and_complete(make_arms):
    summary = json.loads(json.dumps(summarise("pair", make_arms(), 2000), allow_nan=False))
    assert (summary["scenario"], summary["num_steps"], summary["seeds"]) == ("pair", 2000, [0])
    assert summary["gap_closed_ratio"] == pytest.approx((1.601 - 1.485) / (1.601 - 1.479))
    assert summary["steps_to_baseline_loss_ratio"] < 1
    assert 0 < summary["worst_exchange_stall_ratio"] < 0.02
    assert [(arm["kind"], list(arm["sites"])) for arm in summary["arms"]] == [
        ("codistilled", ["berlin", "tokyo"]),
        ("alone", ["berlin", "tokyo"]),
        ("pooled", ["pooled"]),
    ]
    berlin = summary["arms"][0]["sites"]["berlin"]
    assert berlin["num_steps"] == 2000 and berlin["finished"]
    assert berlin["bytes_sent"] == 40 * 1_612_000
    assert berlin["bytes_vs_all_reduce_ratio"] == pytest.approx(940_000 * 4 * 2000 / berlin["bytes_sent"])
    # All 40 frames were fetched, and 34 of the versions became teachers.
    assert berlin["bytes_vs_fp16_ratio"] == pytest.approx(34 * 2 * 940_000 / (40 * 1_610_000))
    assert summary["bytes_vs_fp16_ratio"] == berlin["bytes_vs_fp16_ratio"]
    assert (berlin["num_frames_published"], berlin["num_keyframes_published"]) == (40, 1)
    assert berlin["num_teacher_swaps"] == 39
    assert (berlin["num_parameters"], berlin["device"], berlin["precision"]) == (940_000, "cpu", "float32")
    assert berlin["mean_staleness_steps"] > 0 and berlin["mean_lag_steps"] > 0
    lone = summary["arms"][1]["sites"]["berlin"]
    assert lone["bytes_vs_all_reduce_ratio"] is None and lone["bytes_vs_fp16_ratio"] is None
    assert lone["mean_staleness_steps"] is None
    assert lone["steps_to_baseline_loss_ratio"] is None


@pytest.mark.parametrize(("num_sites", "expected"), [(1, 0), (2, 4_000), (4, 6_000)])
def test_all_reduce_bytes(num_sites, expected):
    assert all_reduce_bytes(num_sites, num_parameters=100, num_steps=10) == expected


@pytest.mark.parametrize("missing", ["codistilled", "alone", "pooled"])
def test_a_missing_arm_leaves_the_gap_untold(missing):
    summary = summarise("pair", [arm for arm in simple_arms() if arm.kind != missing], 100)
    assert summary["gap_closed_ratio"] is None
    assert f"There is no {missing} arm." in summary["notes"]
    assert "cannot be told" in headline(summary)


def test_a_site_that_did_not_finish_leaves_the_gap_untold():
    arms = simple_arms()
    arms[1].sites["tokyo"] = site((50, 1.5), finished=False)
    summary = summarise("pair", arms, 100)
    assert summary["gap_closed_ratio"] is None
    assert summary["steps_to_baseline_loss_ratio"] is None
    assert "tokyo (alone) did not finish: it got to step 50 of 100." in summary["notes"]
    assert summary["arms"][1]["sites"]["tokyo"]["final_val_loss"] == 1.5


def test_an_evaluation_at_the_last_step_counts_as_finished():
    arms = simple_arms()
    arms[1].sites["tokyo"] = site((100, 2.1), finished=False)
    assert summarise("pair", arms, 100)["gap_closed_ratio"] == pytest.approx(0.8)


def test_a_loss_that_is_not_finite_is_told_and_never_reaches_the_json():
    arms = simple_arms(berlin=math.nan)
    summary = summarise("pair", arms, 100)
    json.dumps(summary, allow_nan=False)
    assert summary["gap_closed_ratio"] is None
    assert any("berlin (codistilled) diverged" in note for note in summary["notes"])


@pytest.mark.parametrize("pooled", [2.0, 2.5])
def test_without_a_gap_there_is_no_ratio(pooled):
    summary = summarise("pair", simple_arms(pooled=pooled), 100)
    assert summary["gap_closed_ratio"] is None
    assert any("no gap that could be closed" in note for note in summary["notes"])
    assert "no gap to close" in headline(summary)


def test_a_site_that_never_reaches_the_lone_loss_makes_the_mean_null():
    summary = summarise("pair", simple_arms(berlin=2.4), 100)
    assert summary["steps_to_baseline_loss_ratio"] is None
    assert summary["arms"][0]["sites"]["tokyo"]["steps_to_baseline_loss_ratio"] == 0.5
    assert any("berlin (codistilled) never reached" in note for note in summary["notes"])
    assert "Not every codistilled site reached" in headline(summary)


def test_a_codistilled_arm_that_is_worse_is_called_worse():
    summary = summarise("pair", simple_arms(berlin=3.0, tokyo=3.0), 100)
    assert summary["gap_closed_ratio"] == pytest.approx(-1.0)
    assert "worse than being alone" in headline(summary)


def test_several_seeds_give_mean_and_half_the_range():
    arms = simple_arms(seed=0) + simple_arms(berlin=1.3, tokyo=1.5, seed=1)
    summary = summarise("pair", arms, 100)
    assert summary["seeds"] == [0, 1]
    assert [seed["gap_closed_ratio"] for seed in summary["by_seed"]] == [
        pytest.approx(0.8),
        pytest.approx(0.6),
    ]
    assert summary["gap_closed_ratio"] == pytest.approx(0.7)
    assert summary["over_seeds"]["gap_closed_ratio"] == {
        "mean": pytest.approx(0.7),
        "half_range": pytest.approx(0.1),
    }
    assert "70 ± 10 % of the gap" in headline(summary)
    assert "mean of 2 seeds" in headline(summary)


def test_seeds_count_alike_however_wide_their_gaps_are():
    # Gaps of 1.0 and 0.1, of which 0.8 and 0.2 are closed: the ratio of the mean losses would be 0.75.
    arms = simple_arms(seed=0) + simple_arms(berlin=1.97, tokyo=1.99, pooled=1.9, seed=1)
    summary = summarise("pair", arms, 100)
    assert summary["gap_closed_ratio"] == pytest.approx(0.5)
    assert summary["gap_closed_ratio"] == summary["over_seeds"]["gap_closed_ratio"]["mean"]
    assert "50 ± 30 % of the gap" in headline(summary)
    assert headline(summary).endswith("Each figure is the mean of 2 seeds, ± half their range.")


def test_a_seed_without_a_gap_leaves_the_mean_untold():
    summary = summarise("pair", simple_arms(seed=0) + simple_arms(pooled=2.5, seed=1), 100)
    assert summary["gap_closed_ratio"] is None
    [note] = summary["notes"]
    assert note.startswith("Pooling the data gained nothing over being alone, seed 1:")
    assert "gained nothing here, seed 1, so there was no gap" in headline(summary)


def timed_arms(codistilled_s: float, alone_s: float, seed: int = 0) -> list[ArmResult]:
    arms = simple_arms(seed=seed)
    for arm, duration_s in zip(arms, (codistilled_s, alone_s, 1.0), strict=True):
        for index, history in enumerate(arm.sites.values()):
            history.duration_s = duration_s + index
    return arms


def test_what_codistillation_costs_in_seconds():
    summary = summarise("pair", timed_arms(14.5, 9.5), 100)
    assert summary["seconds_ratio_vs_alone"] == pytest.approx(15 / 10)
    assert "Training took 1.50 times as long as alone." in headline(summary)
    two_seeds = summarise("pair", timed_arms(14.5, 9.5) + timed_arms(24.5, 9.5, seed=1), 100)
    assert two_seeds["seconds_ratio_vs_alone"] == pytest.approx(2.0)
    assert "took 2.00 ± 0.50 times" in headline(two_seeds)


@pytest.mark.parametrize("fault", ["no seconds", "not finished", "no arm"])
def test_seconds_that_are_missing_are_not_compared(fault):
    arms = timed_arms(14.5, 9.5)
    if fault == "no seconds":
        arms[1].sites["tokyo"].duration_s = 0.0
    elif fault == "not finished":
        arms[0].sites["tokyo"].finished, arms[0].sites["tokyo"].evaluations = False, [(50, 1.9)]
    else:
        del arms[1]
    summary = summarise("pair", arms, 100)
    assert summary["seconds_ratio_vs_alone"] is None
    assert "Training took" not in headline(summary)


def test_the_baseline_is_that_of_the_same_seed():
    easy = simple_arms(seed=1)
    easy[1] = ArmResult("alone", "alone", 1, {"berlin": site((100, 2.6)), "tokyo": site((100, 2.6))})
    sites = [
        arm["sites"]
        for arm in summarise("pair", simple_arms() + easy, 100)["arms"]
        if arm["kind"] == "codistilled"
    ]
    assert sites[0]["berlin"]["steps_to_baseline_loss_ratio"] == 1.0
    assert sites[1]["berlin"]["steps_to_baseline_loss_ratio"] == 0.5


def test_a_seed_that_failed_leaves_the_spread_untold():
    arms = simple_arms(seed=0) + simple_arms(seed=1)[:2]
    summary = summarise("pair", arms, 100)
    assert summary["over_seeds"]["gap_closed_ratio"] is None
    assert "There is no pooled arm, seed 1." in summary["notes"]
    assert headline(summary).startswith("Held-out losses end")


def test_what_travelled_is_compared_with_fp16():
    arms = simple_arms()
    berlin, tokyo = arms[0].sites.values()
    assert summarise("pair", arms, 100)["bytes_vs_fp16_ratio"] is None
    berlin.num_fp16_bytes = tokyo.num_fp16_bytes = 100
    berlin.fetched["tokyo"] = Fetched({(1, 25), (1, 50), (1, 100)}, 20)
    berlin.swapped["tokyo"] = {(1, 50), (1, 100)}
    summary = summarise("pair", arms, 100)
    assert summary["bytes_vs_fp16_ratio"] == pytest.approx(10)
    sites = summary["arms"][0]["sites"]
    assert sites["tokyo"]["bytes_vs_fp16_ratio"] == pytest.approx(10)
    assert sites["berlin"]["bytes_vs_fp16_ratio"] is None, "nobody has fetched anything of it"
    tokyo.fetched["berlin"] = Fetched({(1, 50), (1, 100)}, 80)
    tokyo.swapped["berlin"] = {(1, 50), (1, 100)}
    assert summarise("pair", arms, 100)["bytes_vs_fp16_ratio"] == pytest.approx(4)
    assert "travelled 4.0 times smaller" in headline(summarise("pair", arms, 100))


def test_arms_of_one_kind_are_not_averaged_and_the_first_is_compared():
    other = replace(simple_arms(berlin=1.5, tokyo=1.5)[0], name="ternary")
    twin = replace(simple_arms()[1], name="twin", sites={"berlin": site((100, 9.0))})
    arms = [*simple_arms(), other, twin]
    summary, plain = summarise("pair", arms, 100), summarise("pair", simple_arms(), 100)
    assert {name: summary[name] for name in HEADLINES} == {name: plain[name] for name in HEADLINES}
    assert summary["final_val_loss"] == plain["final_val_loss"]
    assert summary["by_seed"] == plain["by_seed"]
    [ternary] = summary["other_arms"]
    assert ternary["name"] == "ternary"
    assert ternary["final_val_loss"] == summary["final_val_loss"] | {"codistilled": 1.5}
    assert ternary["gap_closed_ratio"] == pytest.approx(0.5)
    assert [arm["name"] for arm in summary["arms"]] == ["codistilled", "alone", "pooled", "ternary", "twin"]
    assert plain["other_arms"] == []


def test_further_arms_have_their_own_spread():
    arms = []
    for seed, loss in ((0, 1.5), (1, 1.7)):
        arms += [*simple_arms(seed=seed), replace(simple_arms(loss, loss, seed=seed)[0], name="exact")]
    [exact] = summarise("pair", arms, 100)["other_arms"]
    assert exact["gap_closed_ratio"] == pytest.approx(0.4)
    assert exact["over_seeds"]["gap_closed_ratio"]["half_range"] == pytest.approx(0.1)


def test_refusals_are_noted():
    arms = simple_arms()
    arms[0].sites["berlin"].num_refusals = 3
    assert any("berlin (codistilled) refused 3" in note for note in summarise("pair", arms, 100)["notes"])


def test_teachers_that_were_kept_from_teaching_are_noted_and_counted():
    arms = simple_arms()
    arms[0].sites["berlin"].num_gatings["tokyo"] = 2
    arms[0].sites["berlin"].num_expiries["oslo"] = 3
    summary = summarise("pair", arms, 100)
    berlin = summary["arms"][0]["sites"]["berlin"]
    assert (berlin["num_gatings_by_teacher"], berlin["num_expiries_by_teacher"]) == (
        {"tokyo": 2},
        {"oslo": 3},
    )
    assert (
        "berlin (codistilled) gated its teacher tokyo off 2 time(s); its events say why." in summary["notes"]
    )
    assert any("did not learn from 3 version(s) of oslo" in note for note in summary["notes"])

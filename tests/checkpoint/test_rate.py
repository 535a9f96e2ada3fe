"""Rate control: the estimate is right, targets are met, and surprises are learnt from."""

import io

import pytest
import torch

from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.quantize import ALPHABETS, Quantizer
from p2pcodistill.checkpoint.rate import MAX_LEFT_SHARE, RateControl, sample_difference
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig

NUM_ELEMENTS = 300_000


def make_pair(change, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(NUM_ELEMENTS, generator=generator)
    return weights, (weights + change * torch.randn(NUM_ELEMENTS, generator=generator)).half()


def plan_for(weights, reference, **config):
    return RateControl(FramesConfig(**config)).plan([sample_difference(weights, reference, 1 << 15)], 0)


@pytest.mark.parametrize("name", ALPHABETS)
def test_the_sample_tells_what_will_be_left(name):
    weights, reference = make_pair(0.2)
    sample = sample_difference(weights, reference, 1 << 15)
    plan = RateControl(FramesConfig(delta=name, target_error=0.1)).plan([sample], 0)
    Quantizer(torch.device("cpu")).encode(weights, reference, plan.alphabet, plan.step * sample.rms)
    error = torch.dist(weights, reference.float()) / torch.linalg.norm(weights)
    assert float(error) == pytest.approx(plan.error, rel=0.03)


@pytest.mark.parametrize("target_error", [0.15, 0.1, 0.05, 0.01, 0.002])
def test_a_stricter_target_is_met_by_more_bits(target_error):
    plan = plan_for(*make_pair(0.2), target_error=target_error)
    assert plan.error <= target_error
    looser = plan_for(*make_pair(0.2), target_error=target_error * 1.3)
    assert looser.num_bytes < plan.num_bytes


@pytest.mark.parametrize("name", ["adaptive", "ternary", "3-bit", "4-bit"])
def test_no_frame_is_much_finer_than_its_target(name):
    plan = plan_for(*make_pair(0.2), delta=name, target_error=0.1)
    assert 0.097 < plan.error <= 0.1


def test_what_the_links_carry_bounds_a_frame_that_wants_more_and_no_other():
    sample = sample_difference(*make_pair(0.4), 1 << 15)
    rate = RateControl(FramesConfig(target_error=0.05))
    wanted = rate.plan([sample], 1000)
    rate.limit_bytes = int(wanted.num_bytes) + 2000
    assert rate.plan([sample], 1000) == wanted
    rate.limit_bytes = int(wanted.num_bytes / 2)
    limited = rate.plan([sample], 1000)
    assert 0.7 * rate.limit_bytes < limited.num_bytes + 1000 <= rate.limit_bytes
    assert limited.error > wanted.error
    budgeted = RateControl(FramesConfig(exchange_budget_bytes=int(wanted.num_bytes)))
    budgeted.limit_bytes = rate.limit_bytes
    assert budgeted.plan([sample], 1000) == limited


@pytest.mark.parametrize("limit", [0, 1000, 16_500])
@pytest.mark.parametrize("delta", ["adaptive", "3-bit", "8-bit"])
def test_one_element_that_moves_far_beyond_all_levels_has_a_plan_under_any_limit(delta, limit):
    """No alphabet of several levels reaches it, and the exact tensors alone are over the limit."""
    encoder = FrameEncoder(FramesConfig(delta=delta))
    generator = torch.Generator().manual_seed(0)
    weights, running_mean = torch.randn(1024, 1024, generator=generator), torch.randn(4000)
    buffers = frozenset({"mean"})
    encoder.encode(Snapshot(0, {"w": weights.clone(), "mean": running_mean}, {}, buffers), io.BytesIO())
    weights[0, 5] += 3.0
    encoder.limit(limit)
    frame = encoder.encode(Snapshot(1, {"w": weights, "mean": running_mean + 1}, {}, buffers), io.BytesIO())
    assert frame.base_step == 0
    assert frame.num_bytes < 20_000
    before = float(weights[0, 5]) - 3.0
    assert abs(float(encoder.reference.tensors["w"][0, 5]) - before) > 0.1, "it is on its way"


def test_a_small_change_is_followed_though_the_target_is_met_without():
    plan = plan_for(*make_pair(0.01), target_error=0.1)
    assert plan.left_share <= MAX_LEFT_SHARE
    assert plan.num_bytes > 0


def test_the_more_the_weights_move_the_more_bits_they_get():
    costs = [plan_for(*make_pair(change), target_error=0.1).num_bytes for change in (0.12, 0.2, 0.4, 0.8)]
    assert costs == sorted(costs)
    assert costs[-1] > 3 * costs[0]


@pytest.mark.parametrize("budget", [20_000, 60_000, 150_000])
def test_frames_come_to_the_budget(budget):
    """From the third frame on: the first ones tell what the estimate is worth."""
    encoder = FrameEncoder(FramesConfig(exchange_budget_bytes=budget))
    weights = torch.randn(500, 600, generator=torch.Generator().manual_seed(0))
    sizes = []
    for step in range(6):
        weights += 0.1 * torch.randn(500, 600, generator=torch.Generator().manual_seed(step))
        frame = encoder.encode(Snapshot(step, {"weight": weights.clone()}, {}), io.BytesIO())
        sizes.append(frame.num_bytes)
    assert all(0.75 * budget <= size <= 1.05 * budget for size in sizes[2:]), sizes


def test_a_budget_below_everything_sends_next_to_nothing():
    plan = plan_for(*make_pair(0.2), exchange_budget_bytes=1)
    assert plan.num_bytes < NUM_ELEMENTS / 8 * 0.01


def test_exact_tensors_count_against_the_budget_only_when_they_travel():
    torch.manual_seed(0)
    encoder = FrameEncoder(FramesConfig(exchange_budget_bytes=30_000))
    weights, mask = torch.randn(500, 600), torch.ones(1000, 1000, dtype=torch.bool)
    for step in range(6):
        weights += 0.1 * torch.randn(500, 600)
        tensors = {"w": weights.clone(), "mask": mask}
        frame = encoder.encode(Snapshot(step, tensors, {}, frozenset({"mask"})), io.BytesIO())
    assert 20_000 < frame.num_bytes < 33_000
    left = torch.dist(weights, encoder.reference.tensors["w"].float())
    assert float(left) < 0.15 * float(torch.linalg.norm(weights))


def test_what_is_over_the_budget_by_itself_does_not_stop_the_rest():
    weights, reference = make_pair(0.2)
    sample = sample_difference(weights, reference, 1 << 15)
    plan = RateControl(FramesConfig(exchange_budget_bytes=1000)).plan([sample], num_other_bytes=2000)
    assert plan.left_share <= MAX_LEFT_SHARE


@pytest.mark.parametrize("num_elements", [1, 100, 255, 256, 257, 3000])
@pytest.mark.parametrize("num_samples", [1, 64, 256, 1000])
def test_tensors_of_any_size_can_be_sampled(num_elements, num_samples):
    sample = sample_difference(torch.ones(num_elements), torch.zeros(num_elements).half(), num_samples)
    assert (sample.num_elements, sample.rms) == (num_elements, 1.0)


def test_what_is_only_rounded_away_has_not_moved():
    weights = torch.randn(10_000)
    assert sample_difference(weights, weights.half(), 1000).rms == 0


def test_nothing_has_moved():
    weights, _ = make_pair(0.0)
    plan = plan_for(weights.half().float(), weights.half())
    assert (plan.error, plan.num_bytes) == (0.0, 0.0)


def test_a_sample_of_a_long_tensor_is_spread_over_it():
    weights, reference = torch.arange(1_000_000.0), torch.zeros(1_000_000)
    sample = sample_difference(weights, reference, 10_000)
    assert len(sample.values) == pytest.approx(10_000, abs=256)
    assert sample.values.min() < 30_000
    assert sample.values.max() > 950_000
    assert sample.num_elements == 1_000_000

"""The arithmetic of codes: closed loop, dead zone, and both sides the same to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcodistill.checkpoint.quantize import (
    ALPHABETS,
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    Quantizer,
    decode_int8,
    decode_lossless,
    encode_int8,
    encode_lossless,
    num_blocks,
)
from p2pcodistill.errors import MalformedError

CPU = torch.device("cpu")
SIZES = [
    1,
    7,
    BLOCK_ELEMENTS - 1,
    BLOCK_ELEMENTS,
    5000,
    CHUNK_ELEMENTS,
    CHUNK_ELEMENTS + 1,
    3 * CHUNK_ELEMENTS - 5,
]


def make_pair(num_elements, dtype=torch.float16, seed=0):
    """(weights, reference) that differ by about a tenth."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_elements, generator=generator)
    return weights, (weights + 0.1 * torch.randn(num_elements, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ALPHABETS)
@pytest.mark.parametrize("num_elements", SIZES)
def test_both_sides_move_the_reference_alike(num_elements, name, dtype):
    weights, sender = make_pair(num_elements, dtype)
    receiver, before = sender.clone(), sender.clone()
    scales, symbols = Quantizer(CPU).encode(weights, sender, ALPHABETS[name], 0.1)
    assert scales.dtype == torch.bfloat16
    assert len(scales) == num_blocks(num_elements)
    assert int(symbols.max()) < ALPHABETS[name].num_symbols
    Quantizer(CPU).decode(symbols, scales, receiver, ALPHABETS[name])
    assert torch.equal(sender.view(torch.uint8), receiver.view(torch.uint8))
    assert torch.dist(sender.float(), weights) <= torch.dist(before.float(), weights)


@pytest.mark.parametrize("name", ALPHABETS)
def test_the_arithmetic_is_one_rounding_of_an_exact_product(name):
    """Against fp64, where product and sum are exact: fused or not, any processor must give this."""
    weights, reference = make_pair(5000)
    alphabet = ALPHABETS[name]
    before = reference.double()
    scales, symbols = Quantizer(CPU).encode(weights, reference, alphabet, 0.05)
    digits = [symbols.long() // alphabet.base**i % alphabet.base for i in range(alphabet.num_digits)]
    codes = torch.stack(digits, dim=1).flatten()[:5000] - alphabet.num_levels
    step = scales.double().repeat_interleave(BLOCK_ELEMENTS)[:5000]
    assert torch.equal(reference, (before + codes * step).float().half())


def test_what_the_dead_zone_keeps_back_comes_with_the_next_frames():
    """Closed loop: the weights stand still, and frame by frame the reference gets there."""
    weights, reference = make_pair(20_000)
    quantizer = Quantizer(CPU)
    for _ in range(12):
        left = weights - reference.float()
        quantizer.encode(weights, reference, ALPHABETS["ternary"], 1.5 * float(left.square().mean().sqrt()))
    first = weights - make_pair(20_000)[1].float()
    assert torch.linalg.norm(weights - reference.float()) < 0.15 * torch.linalg.norm(first)


def test_ternary_codes_are_what_is_beyond_the_threshold_and_its_mean():
    reference = torch.zeros(BLOCK_ELEMENTS, dtype=torch.float16)
    weights = torch.zeros(BLOCK_ELEMENTS)
    weights[:4] = torch.tensor([1.0, -3.0, 0.4, -0.5])
    scales, symbols = Quantizer(CPU).encode(weights, reference, ALPHABETS["ternary"], 0.5)
    assert scales.tolist() == [2.0]
    assert reference[:5].tolist() == [2.0, -2.0, 0.0, 0.0, 0.0]
    # Digits 2, 0, 1, 1, lowest first; then nothing but zeros.
    assert symbols.tolist() == [2 + 0 * 3 + 1 * 9 + 1 * 27] + [40] * (BLOCK_ELEMENTS // 4 - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALPHABETS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_what_is_only_rounded_away_has_not_moved(scale, name, dtype):
    """Whether weights are rounded first, or the dead zone is as wide as the rounding of the largest one."""
    weights = scale * make_pair(3 * BLOCK_ELEMENTS + 7)[0]
    reference = weights.to(dtype)
    largest = float(weights.abs().max())
    widest = float((weights - reference.float()).abs().max())
    for step in (widest / 3, widest, 2 * widest, largest):
        moved = reference.clone()
        _, symbols = Quantizer(CPU).encode(weights, moved, ALPHABETS[name], step, largest=largest)
        assert (symbols == ALPHABETS[name].zero_symbol).all()
        assert torch.equal(moved, reference)


def test_blocks_in_which_nothing_moves_have_no_scale():
    weights, reference = make_pair(4 * BLOCK_ELEMENTS)
    weights[BLOCK_ELEMENTS : 3 * BLOCK_ELEMENTS] = reference[BLOCK_ELEMENTS : 3 * BLOCK_ELEMENTS].float()
    for alphabet in ALPHABETS.values():
        scales, symbols = Quantizer(CPU).encode(weights, reference.clone(), alphabet, 0.05)
        assert (scales != 0).tolist() == [True, False, False, True]
        quiet = symbols.view(4, -1)[1:3]
        assert (quiet == alphabet.zero_symbol).all()


def test_a_reference_never_leaves_the_range_of_its_dtype():
    reference = torch.full((BLOCK_ELEMENTS,), 65_000.0).half()
    receiver = reference.clone()
    weights = torch.full((BLOCK_ELEMENTS,), 65_504.0)
    weights[0] = 1e6
    scales, symbols = Quantizer(CPU).encode(weights, reference, ALPHABETS["ternary"], 1.0)
    Quantizer(CPU).decode(symbols, scales, receiver, ALPHABETS["ternary"])
    assert torch.isfinite(reference).all()
    assert torch.equal(reference, receiver)
    Quantizer(CPU).decode(symbols, torch.full_like(scales, 3e38), receiver, ALPHABETS["ternary"])
    assert torch.isfinite(receiver).all()


def test_a_symbol_beyond_the_alphabet_is_refused():
    _, reference = make_pair(BLOCK_ELEMENTS)
    symbols = torch.full((ALPHABETS["ternary"].block_symbols,), 81, dtype=torch.uint8)
    with pytest.raises(MalformedError, match="code that its alphabet does not have"):
        Quantizer(CPU).decode(symbols, torch.ones(1, dtype=torch.bfloat16), reference, ALPHABETS["ternary"])


@pytest.mark.parametrize("num_elements", [1, 1000, 5000])
def test_int8_is_within_half_a_step_of_the_block_maximum(num_elements):
    weights, _ = make_pair(num_elements)
    weights[: num_elements // 2] *= 100
    codes, scales = encode_int8(weights)
    decoded = torch.empty(num_elements)
    decode_int8(codes, scales, decoded)
    step = scales.float().repeat_interleave(BLOCK_ELEMENTS)[:num_elements]
    assert ((decoded - weights).abs() <= step * 1.01).all()
    assert (
        (decoded - weights).abs() <= step * 0.51
    ).float().mean() > 0.99  # the scale itself is rounded to bf16


def test_int8_of_nothing_but_zeros():
    codes, scales = encode_int8(torch.zeros(3))
    decoded = torch.ones(3, dtype=torch.float16)
    decode_int8(codes, scales, decoded)
    assert decoded.tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(width=16, allow_nan=False), st.floats(width=16, allow_nan=False)), min_size=1
    ),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_lossless_is_lossless_for_all_numbers(pairs, dtype):
    target, reference = (torch.tensor(numbers).to(dtype) for numbers in zip(*pairs, strict=True))
    zigzag = encode_lossless(target, reference)
    decode_lossless(zigzag, reference)
    assert torch.equal(reference.view(torch.uint8), target.view(torch.uint8))


def test_lossless_differences_of_neighbours_are_small():
    target = torch.tensor([1.0, -1.0, 0.0]).half()
    up = torch.nextafter(target, torch.full_like(target, 9.0))
    assert encode_lossless(up, target).tolist() == [2, 2, 2]
    assert encode_lossless(target, up).tolist() == [1, 1, 1]

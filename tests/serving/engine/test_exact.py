"""The exact primitives against rational arithmetic, and under every reordering."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.models import ModelSpec
from serving.engine.exact import (
    FIXED_POINT_BITS,
    ExactNumerics,
    exp_nonpositive,
    input_bits,
    power_above,
    round_rows,
    round_weight,
    softmax_terms,
    to_fixed,
)
from serving.engine.place import SoloCommunicator

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)


def spec(**changes: int) -> ModelSpec:
    fields = {
        "layers": 1,
        "hidden": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 16,
        "vocab": 8,
        "max_positions": 64,
    } | changes
    return ModelSpec(name="test", family="llama", **fields)


def wild(shape: tuple[int, ...], seed: int, spread: int = 20) -> Tensor:
    """float32 of magnitudes 2^-spread … 2^spread, some zeros: float32 sums of these depend on their order."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-spread, spread + 1, shape, generator=generator).float())
    keep = torch.rand(shape, generator=generator) > 0.1
    return torch.randn(shape, generator=generator) * scale * keep


def exact_dot(first: Tensor, second: Tensor) -> Fraction:
    return sum((Fraction(a) * Fraction(b) for a, b in zip(first.tolist(), second.tolist(), strict=True)), Fraction())


@given(st.floats(0, 1e300))
def test_power_above(bound: float) -> None:
    power = power_above(torch.tensor([bound], dtype=torch.float64)).item()
    assert math.frexp(power)[0] == 0.5
    assert bound < power
    assert power <= max(2 * bound, 2.0**-499)


@given(SEEDS, st.integers(1, 300))
@few
def test_linear_products_are_exact_sums(seed: int, width: int) -> None:
    """The float64 product of rounded operands is the rational one: there was nothing to round."""
    bits = input_bits(width)
    x, weight = round_rows(wild((2, width), seed), bits), round_weight(wild((3, width), seed + 1), 53 - bits)
    product = x @ weight.t()
    for row in range(2):
        for column in range(3):
            assert Fraction(product[row, column].item()) == exact_dot(x[row], weight[column])


@given(st.integers(1, 4000))
@few
def test_worst_case_operands_stay_within_the_mantissa(width: int) -> None:
    """All elements at the top of their range and of one sign: the largest sum the bit budget allows for."""
    bits = input_bits(width)
    below = torch.full((1, width), math.nextafter(1.0, 0.0), dtype=torch.float64)
    x, weight = round_rows(below, bits), round_weight(below, 53 - bits)
    assert Fraction((x @ weight.t()).item()) == exact_dot(x[0], weight[0])


@given(SEEDS, st.integers(2, 200))
@few
def test_linear_does_not_depend_on_the_order_of_terms(seed: int, width: int) -> None:
    numerics = ExactNumerics(spec())
    x, weight, order = wild((3, width), seed), wild((5, width), seed + 1), torch.randperm(width)
    straight = numerics.column_linear(weight, None)(x)
    assert torch.equal(straight, numerics.column_linear(weight[:, order], None)(x[:, order]))


@given(SEEDS, st.integers(1, 400))
@few
def test_linear_is_as_accurate_as_float32(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, width, generator=generator), torch.randn(3, width, generator=generator)
    result = ExactNumerics(spec()).column_linear(weight, None)(x)
    size = x.double().norm(dim=-1)[:, None] * weight.double().norm(dim=-1)
    assert ((result - x.double() @ weight.double().t()).abs() <= size * 2.0**-21).all()


class Pieces:
    """A communicator that keeps what it is asked to add."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.long)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.total = self.total + tensor
        return self.total.clone()

    def gather(self, tensor: Tensor, sizes: object) -> Tensor | None:
        raise NotImplementedError


@given(SEEDS, st.lists(st.integers(1, 9), min_size=2, max_size=8), st.data())
@few
def test_row_linear_does_not_depend_on_the_cut(seed: int, granules: list[int], data: st.DataObject) -> None:
    numerics = ExactNumerics(spec(heads=8))
    width = sum(granules)
    x, weight, bias = wild((3, width), seed, 4), wild((5, width), seed + 1, 4), wild((5,), seed + 2, 4)
    whole = numerics.row_linear(weight, bias, granules, SoloCommunicator())(x)
    cut = data.draw(st.integers(1, len(granules) - 1))
    at, pieces = sum(granules[:cut]), Pieces()
    numerics.row_linear(weight[:, at:], bias, granules[cut:], pieces)(x[:, at:])
    assert torch.equal(whole, numerics.row_linear(weight[:, :at], bias, granules[:cut], pieces)(x[:, :at]))


@given(SEEDS)
@few
def test_fixed_point_saturates_instead_of_wrapping(seed: int) -> None:
    huge = wild((64,), seed).double() * 1e12
    fixed = to_fixed(huge, 64)
    assert fixed.abs().max() <= 2**56
    assert Fraction(int(fixed.sum())) == sum(Fraction(value) for value in fixed.tolist())
    small = huge.clamp(-(2.0**19), 2.0**19)
    assert (to_fixed(small, 64).double() * 2.0**-FIXED_POINT_BITS - small).abs().max() <= 2.0 ** -(FIXED_POINT_BITS + 1)


@given(st.lists(st.floats(-40, 0), min_size=1, max_size=50))
def test_exp(values: list[float]) -> None:
    result = exp_nonpositive(torch.tensor(values, dtype=torch.float64))
    for got, value in zip(result.tolist(), values, strict=True):
        assert got == pytest.approx(math.exp(value), rel=2.0**-36)


@given(SEEDS, st.integers(1, 70), st.integers(0, 7))
@few
def test_exp_does_not_depend_on_position(seed: int, count: int, offset: int) -> None:
    """The tail of a tensor, a view at an odd offset and a strided view give the bits of the vectorised body."""
    values = -wild((count,), seed, 5).abs().double()
    padded = torch.cat((torch.zeros(offset), values, torch.zeros(3)))
    strided = torch.stack((values, values), 1)[:, 0]
    one_by_one = torch.cat([exp_nonpositive(value[None]) for value in values])
    for other in (exp_nonpositive(padded)[offset : offset + count], exp_nonpositive(strided), one_by_one):
        assert torch.equal(exp_nonpositive(values), other)


@given(SEEDS, st.integers(1, 200), st.integers(0, 60))
@few
def test_softmax_ignores_hidden_entries_and_order(seed: int, visible: int, hidden: int) -> None:
    scores = wild((2, visible), seed, 3).double()
    padded = torch.cat((scores, torch.full((2, hidden), -math.inf, dtype=torch.float64)), 1)
    order = torch.randperm(visible + hidden)
    terms, total = softmax_terms(scores)
    shuffled, same = softmax_terms(padded[:, order])
    assert torch.equal(total, same)
    assert torch.equal(torch.cat((terms, torch.zeros(2, hidden)), 1)[:, order], shuffled)


@given(SEEDS, st.integers(1, 40), st.integers(0, 30))
@few
def test_attention_ignores_padding_order_and_company(seed: int, context: int, padding: int) -> None:
    numerics = ExactNumerics(spec())
    q, k, v = (
        wild((2, 3, 2, 2, 8), seed, 2),
        wild((2, context, 2, 8), seed + 1, 2),
        wild((2, context, 2, 8), seed + 2, 9),
    )
    k, v = (part.view(2, context, 2, 8) for part in numerics.cacheable(k, v))
    visible = torch.rand(2, 3, context, generator=torch.Generator().manual_seed(seed)) > 0.3
    visible[:, :, 0] = True
    whole = numerics.attend(q, k, v, visible)
    order = torch.randperm(context + padding)
    stale = wild((2, padding, 2, 8), seed + 3, 20)
    wider = [torch.cat((part, stale), 1)[:, order] for part in (k, v)]
    mask = torch.cat((visible, torch.zeros(2, 3, padding, dtype=torch.bool)), 2)[:, :, order]
    assert torch.equal(whole, numerics.attend(q, wider[0], wider[1], mask))
    alone = numerics.attend(q[1:, 2:], k[1:], v[1:], visible[1:, 2:])
    assert torch.equal(whole[1:, 2:], alone)


@given(SEEDS, st.integers(1, 200))
@few
def test_attention_is_accurate(seed: int, context: int) -> None:
    numerics, generator = ExactNumerics(spec()), torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator) for shape in ((1, 1, 2, 2, 8), (1, context, 2, 8), (1, context, 2, 8))
    )
    result = numerics.attend(q, *numerics.cacheable(k, v), torch.ones(1, 1, context, dtype=torch.bool))
    scores = torch.einsum("stkgd,sckd->stkgc", q.double(), k.double()) / math.sqrt(8)
    expected = torch.einsum("stkgc,sckd->stkgd", scores.softmax(-1), v.double())
    assert (result - expected).abs().max() < 2e-6


@given(SEEDS, st.integers(2, 300))
@few
def test_norms_do_not_depend_on_order_and_are_accurate(seed: int, width: int) -> None:
    numerics, order = ExactNumerics(spec()), torch.randperm(width)
    x, weight, bias = wild((3, width), seed, 4), torch.ones(width), torch.zeros(width)
    x[:, 0] = 1.0
    for norm, reference in (
        (lambda x: numerics.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x.double(), (width,), eps=1e-5)),
        (
            lambda x: numerics.layer_norm(x, weight, bias, 1e-5),
            torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-5),
        ),
    ):
        assert torch.equal(norm(x)[:, order], norm(x[:, order]))
        assert (norm(x) - reference).abs().max() < 1e-5


def test_gate_is_silu() -> None:
    gate, up = torch.linspace(-60, 60, 1001), torch.linspace(-3, 3, 1001)
    expected = torch.nn.functional.silu(gate.double()) * up
    assert (ExactNumerics(spec()).gate(gate, up) - expected).abs().max() < 1e-5

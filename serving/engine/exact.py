"""Numerics whose every sum is exact, so that its order cannot matter. See docs/exactness.md.

Method: operands are rounded to a few bits below a power of two above the largest of their row. All
products and all partial sums of such rows are then multiples of one common unit and smaller than
2^53 units: float64 represents each of them exactly, whatever the order, blocking or use of fused
multiply-add. This is the first slice of the error-free splitting of Ozaki, Ogita, Oishi and Rump
(Numerical Algorithms 59, 2012) taken for the product. Whatever rounds besides (one rounding of the
result, and elementwise add, multiply, divide and square root) is fixed bit for bit by IEEE 754.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.models import ModelSpec
from serving.engine.numerics import Linear
from serving.engine.place import Communicator

FIXED_POINT_BITS = 36
"""Partial sums of row-parallel linears are int64 multiples of 2^-36."""

_MANTISSA = 53
_FLOAT32 = 24
_EXPONENT_MASK = 0x7FF0000000000000
_ROUND_BITS = 48
_SUM_BITS = 30
_MEAN_GAIN = 3  # log2(largest / mean magnitude) of a typical row of weights, with slack for powers of two
_SMALLEST = 2.0**-500
_ROUNDER = 1.5 * 2.0**52
_PROBABILITY_BITS = 30
_WEIGHT_BITS = _MANTISSA - _FLOAT32 - 1  # a cached value may round up to its power of two: one bit more
_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_TAYLOR = tuple(1.0 / math.factorial(degree) for degree in range(9, -1, -1))


def operand_bits(terms: int) -> int:
    """Bits both factors may have so that a sum of `terms` products stays within 53 bits (at most 24)."""
    return min((_MANTISSA - _log2_ceil(terms)) // 2, _FLOAT32)


def input_bits(width: int) -> int:
    """Bits of the inputs of a linear over `width` columns; its weights get the rest of 53, see `round_weight`."""
    return min((_MANTISSA - _log2_ceil(width) + _MEAN_GAIN) // 2, _FLOAT32)


def power_above(bound: Tensor) -> Tensor:
    """The power of two p with bound < p ≤ 2 · bound, elementwise, for float64 bound ≥ 0 (0 counts as 2^-500)."""
    exponent = bound.clamp_min(_SMALLEST).view(torch.int64).bitwise_and(_EXPONENT_MASK)
    return exponent.view(torch.float64) * 2.0


def round_to(x: Tensor, power: Tensor, bits: int) -> Tensor:
    """x as float64, rounded to multiples of 2^-bits · power, ties to even; |x| ≤ power, bits ≤ 48.

    Adding and subtracting 1.5 · 2^(52 - bits) · power rounds exactly there.
    """
    anchor = power * (1.5 * 2.0 ** (52 - bits))
    return (x + anchor).sub_(anchor)


def round_rows(x: Tensor, bits: int) -> Tensor:
    """`round_to` the power above the largest of each row (last dimension)."""
    return round_to(x, power_above(x.abs().amax(-1, keepdim=True).double()), bits)


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Rows rounded so that the *sum* of their magnitudes is at most 2^bits units.

    Products with inputs of at most 2^(53 - bits) units then add up to at most 2^53, whatever the
    order. The sum, rather than the largest times the width, saves two bits on typical rows. It is
    itself exact, being taken over 30-bit values; the margin covers the rounding that follows.
    """
    total = round_rows(weight, _SUM_BITS).abs().sum(-1, keepdim=True)
    return round_to(weight, power_above(total * (1.0 + 2.0**-10)), bits)


def to_fixed(x: Tensor, terms: int) -> Tensor:
    """float64 → int64 multiples of 2^-36, saturating so that a sum of `terms` of them cannot overflow.

    Values up to 2^26 / terms in magnitude are kept; int64 addition is associative.
    """
    limit = 2.0 ** (62 - _log2_ceil(terms))
    return x.mul(2.0**FIXED_POINT_BITS).clamp_(-limit, limit).round_().to(torch.int64)


def exp_nonpositive(x: Tensor) -> Tensor:
    """exp(x) for float64 x ≤ 0 with relative error below 2^-36; arguments below -40 count as -40.

    Only single adds and multiplies and shifts of exponents, each fixed by IEEE 754: the framework's
    exp may differ in the last bit between the vectorised body and the tail of a tensor.
    """
    shifted = x.clamp_min(-40.0).mul_(_LOG2_E).add_(_ROUNDER)
    whole = shifted - _ROUNDER
    rest = x.clamp_min(-40.0).sub_(whole.mul_(_LN_2))
    result = torch.full_like(rest, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        result.mul_(rest).add_(coefficient)
    # The low bits of `shifted` are the whole power of two: add them to the exponent.
    return (result.view(torch.int64) + (shifted.view(torch.int64) << 52)).view(torch.float64)


def softmax_terms(scores: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores - max) on a grid of 2^-30 and its exact sum, over the last dimension of float64 scores.

    Entries of -inf become exact zeros; a row needs one finite entry.
    """
    terms = exp_nonpositive(scores - scores.amax(-1, keepdim=True))
    grid = 1.5 * 2.0 ** (52 - _PROBABILITY_BITS)
    terms.add_(grid).sub_(grid)
    return terms, terms.sum(-1, keepdim=True)


class ExactNumerics:
    """float32 in, float32 out, exact sums between; results do not depend on layout, batch or padding."""

    dtype = torch.float32
    paged = False

    def __init__(self, spec: ModelSpec) -> None:
        self._score_bits = operand_bits(spec.head_dim)
        self._scale = 1.0 / math.sqrt(spec.head_dim)
        self._granules = spec.heads

    def column_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See `Numerics.column_linear`; the weight is rounded once, here."""
        bits = input_bits(weight.shape[1])
        columns = round_weight(weight, _MANTISSA - bits).t()
        offset = None if bias is None else bias.double()

        def apply(x: Tensor) -> Tensor:
            out = round_rows(x, bits) @ columns
            return (out if offset is None else out.add_(offset)).float()

        return apply

    def row_linear(self, weight: Tensor, bias: Tensor | None, granules: Sequence[int], comm: Communicator) -> Linear:
        """Each granule's product is exact, rounded once to fixed point, and added as an integer.

        Granules are the same in every layout, so the integers are, and so is their sum.
        """
        pieces = _Granules(granules, weight.device)
        bits = input_bits(pieces.width)
        columns = round_weight(pieces.split(weight), _MANTISSA - bits).permute(1, 2, 0).contiguous()
        offset = None if bias is None else bias.double()

        def apply(x: Tensor) -> Tensor:
            partial = torch.bmm(round_rows(pieces.split(x), bits).transpose(0, 1), columns)
            total = comm.all_reduce(to_fixed(partial, self._granules).sum(0))
            out = total.double().mul_(2.0**-FIXED_POINT_BITS)
            return (out if offset is None else out.add_(offset)).float()

        return apply

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Numerics.rms_norm`; the sum of squares is exact."""
        return (x.double() / _root_mean_square(x, eps)).mul_(weight).float()

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Numerics.add_rms_norm`."""
        total = hidden + delta
        return total, self.rms_norm(total, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """See `Numerics.layer_norm`; both sums are exact, in two passes."""
        width = x.shape[-1]
        mean = round_rows(x, min(_MANTISSA - _log2_ceil(width), _ROUND_BITS)).sum(-1, keepdim=True) / width
        centred = x - mean
        return (centred / _root_mean_square(centred, eps)).mul_(weight).add_(bias).float()

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up, as gate · up · (1 or e^-|gate|) / (1 + e^-|gate|)."""
        decay = exp_nonpositive(-gate.abs().double())
        return (torch.where(gate < 0, decay, 1.0) / decay.add(1.0)).mul_(gate).mul_(up).float()

    def cacheable(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded to bits that products can bear; at most 24, so float32 holds them."""
        return round_rows(k, self._score_bits).float(), round_rows(v, _FLOAT32).float()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """See `Numerics.attend`. Hidden and padded entries contribute exact zeros to every sum.

        The scale of each token's value is moved into its probability, so that all products of a
        query share one unit; the probabilities' exact sum bounds the sum of the products.
        """
        sequences, tokens, kv_heads, group, head_dim = q.shape
        queries = round_rows(q.double().mul_(self._scale), self._score_bits)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, group * tokens, head_dim)
        keys = k.transpose(1, 2).double()
        values = v.transpose(1, 2).double()
        scores = (queries @ keys.transpose(-1, -2)).view(sequences, kv_heads, group, tokens, -1)
        shown = visible[:, None, None]
        terms, total = softmax_terms(scores.masked_fill_(~shown, -math.inf))
        unit = power_above(values.abs().amax(-1, keepdim=True))
        scale = unit.view(sequences, kv_heads, 1, 1, -1)
        bound = power_above(torch.where(shown, scale, 0.0).amax(-1, keepdim=True) * total * (1.0 + 2.0**-10))
        weights = round_to(terms.mul_(scale), bound, _WEIGHT_BITS)
        mixed = weights.view(sequences, kv_heads, group * tokens, -1) @ values.div_(unit)
        out = mixed.view(sequences, kv_heads, group, tokens, head_dim).div_(total)
        return out.permute(0, 3, 1, 2, 4).float()


class _Granules:
    """Cuts the last dimension into granules, as `[…, granules, width]` with zeros after shorter ones."""

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        self.count, self.width = len(widths), max(widths)
        self._index: Tensor | None = None
        if min(widths) != self.width:
            index, start, end = [], 0, sum(widths)
            for width in widths:
                index += [*range(start, start + width), *[end] * (self.width - width)]
                start += width
            self._index = torch.tensor(index, device=device)

    def split(self, x: Tensor) -> Tensor:
        if self._index is not None:
            zero = torch.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=x.device)
            x = torch.cat((x, zero), -1).index_select(-1, self._index)
        return x.unflatten(-1, (self.count, self.width))


def _root_mean_square(x: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    rounded = round_rows(x, operand_bits(width))
    return torch.sqrt((rounded * rounded).sum(-1, keepdim=True).div_(width).add_(eps))


def _log2_ceil(value: int) -> int:
    return max(value - 1, 0).bit_length()

"""Every own kernel against the framework's arithmetic: on CUDA, or on a CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from serving.engine.kv_cache import KvCache
from serving.engine.layers import rotate
from serving.engine.native import NativeNumerics, attend_to_past
from tests.serving.engine.cells import extract

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter

BLOCK_TOKENS = 4
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def filled_cache(heads: int, head_dim: int, blocks: int, dtype: torch.dtype, device: torch.device) -> KvCache:
    cache = KvCache((0, 1), (0, heads), head_dim, blocks, BLOCK_TOKENS, dtype, device)
    for pages in cache.pages(0):
        pages.normal_()
    return cache


def reference(
    q: Tensor, cache: KvCache, tables: Tensor, lengths: Tensor, window: int | None, served: list[int]
) -> Tensor:
    """`NativeNumerics.attend` in float32, one KV head per query head."""
    keys, values = (x.index_select(2, torch.tensor(served, device=q.device)) for x in cache.read(0, tables.long()))
    context = torch.arange(keys.shape[1], device=q.device)
    visible = context < lengths[:, None]
    if window is not None:
        visible &= context >= lengths[:, None] - window
    queries = q.float()[:, None, :, None]
    return NativeNumerics(torch.float32).attend(queries, keys.float(), values.float(), visible[:, None])[:, 0, :, 0]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "groups", "lengths", "window"),
    [
        pytest.param(torch.float32, 16, (4, 4), (1, 4, 5, 33), None, id="even groups, lengths around a block"),
        pytest.param(torch.float32, 24, (3, 5), (7, 40), None, id="uneven groups, odd head size"),
        pytest.param(torch.float32, 16, (1, 1, 1), (2, 39, 17), 8, id="no groups, sliding window"),
        pytest.param(torch.float32, 32, (20,), (300,), 130, id="one KV head, window over several tiles"),
        pytest.param(torch.float16, 64, (2, 2), (3, 70), None, id="half precision"),
        pytest.param(torch.bfloat16, 128, (4, 4), (9, 150), None, id="as served"),
    ],
)
def test_paged_attention(
    dtype: torch.dtype,
    head_dim: int,
    groups: tuple[int, ...],
    lengths: tuple[int, ...],
    window: int | None,
    kernel_device: torch.device,
) -> None:
    from serving.engine.attention import paged_attention

    if dtype == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    torch.manual_seed(1)
    each = -(-max(lengths) // BLOCK_TOKENS)
    cache = filled_cache(len(groups), head_dim, each * len(lengths), dtype, kernel_device)
    tables = torch.randperm(cache.blocks).view(len(lengths), each).int().to(kernel_device)
    served = [head for head, group in enumerate(groups) for _ in range(group)]
    starts = torch.tensor([0, *groups]).cumsum(0).int().to(kernel_device)
    q = torch.randn(len(lengths), 2, len(served), head_dim, device=kernel_device).to(dtype)[:, 0]  # rows apart
    held = torch.tensor(lengths, dtype=torch.int32, device=kernel_device)
    expected = reference(q, cache, tables, held, window, served)
    out = paged_attention(
        q, *cache.pages(0), tables=tables, lengths=held, served=starts, most_served=max(groups), window=window
    )
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < TOLERANCE[dtype]


def test_what_lies_beyond_a_context_is_not_read(kernel_device: torch.device) -> None:
    from serving.engine.attention import paged_attention

    cache = filled_cache(1, 16, 6, torch.float32, kernel_device)
    for pages in cache.pages(0):
        pages[1, 2:] = torch.nan  # the rest of a block
        pages[2:] = torch.nan  # blocks of others
    tables = torch.tensor([[0, 1, 5]], dtype=torch.int32, device=kernel_device)
    lengths = torch.tensor([6], dtype=torch.int32, device=kernel_device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=kernel_device)
    q = torch.randn(1, 1, 16, device=kernel_device)
    out = paged_attention(q, *cache.pages(0), tables=tables, lengths=lengths, served=starts, most_served=1, window=None)
    assert out.isfinite().all()


@pytest.mark.parametrize("programs", [1, 8, 256, 5000])
def test_spans_fill_a_device_and_no_more(programs: int, kernel_device: torch.device) -> None:
    from serving.engine.attention import spans_for

    spans = spans_for(programs)
    assert spans & (spans - 1) == 0
    assert spans == 1 or spans == 64 or 512 <= spans * programs < 1024


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_rows_are_rotated_and_cached(head_dim: int, rotary: bool, kernel_device: torch.device) -> None:
    from serving.engine.fused import cache_rows

    torch.manual_seed(2)
    rows, heads, kv_heads = 3, 4, 2
    joint = torch.randn(rows, heads + 2 * kv_heads, head_dim, device=kernel_device)
    q, k, v = joint.split((heads, kv_heads, kv_heads), 1)
    angles = torch.rand(rows, 1, head_dim // 2, device=kernel_device)
    turn = (angles.cos(), angles.sin()) if rotary else None
    slots = torch.tensor([9, 2, 17], device=kernel_device)
    own, other = (KvCache((0, 1), (0, kv_heads), head_dim, 5, BLOCK_TOKENS, q.dtype, kernel_device) for _ in range(2))
    turned = cache_rows(q, k, v, turn, slots, *own.pages(0))
    other.write(0, slots, rotate(k, turn) if turn else k, v)
    torch.testing.assert_close(turned, rotate(q, turn) if turn else q)
    for mine, expected in zip(own.pages(0), other.pages(0), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("width", [64, 100])
def test_norm_and_gate(width: int, kernel_device: torch.device) -> None:
    from serving.engine.fused import add_rms_norm, gated

    torch.manual_seed(3)
    hidden, delta, joint = (torch.randn(3, size, device=kernel_device) for size in (width, width, 2 * width))
    weight = torch.rand(width, device=kernel_device)
    plain = NativeNumerics(torch.float32)
    torch.testing.assert_close(
        add_rms_norm(hidden, delta, weight, 1e-5), plain.add_rms_norm(hidden, delta, weight, 1e-5)
    )
    torch.testing.assert_close(gated(*joint.chunk(2, -1)), plain.gate(*joint.chunk(2, -1)))


@pytest.mark.parametrize(("tokens", "context"), [(5, 5), (3, 11)])
def test_the_last_rows_of_a_context_need_no_mask(tokens: int, context: int) -> None:
    torch.manual_seed(4)
    shapes: Sequence[tuple[int, ...]] = ((1, tokens, 2, 3, 8), (1, context, 2, 8), (1, context, 2, 8))
    q, k, v = (torch.randn(shape) for shape in shapes)
    visible = torch.ones(tokens, context, dtype=torch.bool).tril(context - tokens)[None]
    torch.testing.assert_close(attend_to_past(q, k, v), NativeNumerics(torch.float32).attend(q, k, v, visible))


@pytest.mark.parametrize(("layers", "heads"), [((2, 5), (0, 3)), ((3, 4), (1, 2)), ((2, 3), (0, 2))])
def test_rows_of_a_cache_are_packed_and_unpacked(
    layers: tuple[int, int], heads: tuple[int, int], kernel_device: torch.device
) -> None:
    source, target = (several_layers(kernel_device) for _ in range(2))
    slots = torch.tensor([3, 4, 5, 21, 0], device=kernel_device)
    data, kept = source.gather(slots, layers, heads), target.gather(slots, layers, heads)
    expected = [extract(source, [slot // BLOCK_TOKENS], BLOCK_TOKENS, layers, heads) for slot in slots.tolist()]
    for index, slot in enumerate(slots.tolist()):
        assert torch.equal(data[:, :, index], expected[index][:, :, slot % BLOCK_TOKENS])
    before = everything(target)
    target.scatter(slots, layers, heads, data)
    assert torch.equal(target.gather(slots, layers, heads), data)
    target.scatter(slots, layers, heads, kept)
    assert torch.equal(everything(target), before)  # nothing else was touched


@pytest.mark.parametrize(("layers", "heads"), [((2, 5), (0, 3)), ((3, 4), (1, 2))])
def test_rows_are_copied_from_cache_to_cache(
    layers: tuple[int, int], heads: tuple[int, int], kernel_device: torch.device
) -> None:
    source, target = (several_layers(kernel_device) for _ in range(2))
    there, here = (torch.tensor(slots, device=kernel_device) for slots in ([3, 4, 5, 21, 0], [7, 1, 20, 2, 9]))
    expected = everything(target)
    box = slice(layers[0] - 2, layers[1] - 2), slice(None), here.cpu(), slice(*heads)
    expected[box] = source.gather(there, layers, heads).to(expected.device)
    target.copy_rows(source.cells(layers, heads), there, here, layers, heads)
    assert torch.equal(everything(target), expected)


def test_rows_are_packed_token_by_token(kernel_device: torch.device) -> None:
    source = several_layers(kernel_device)
    slots = torch.tensor([3, 21, 0], device=kernel_device)
    assert torch.equal(source.pack(slots), source.gather(slots, (2, 5), (0, 3)).permute(2, 0, 1, 3, 4))


def test_rows_that_fill_the_registers_are_packed_too(kernel_device: torch.device) -> None:
    wide = KvCache((0, 1), (0, 40), 256, 2, BLOCK_TOKENS, torch.bfloat16, kernel_device)
    for pages in wide.pages(0):
        pages.normal_()
    slots = torch.tensor([3, 1, 7], device=kernel_device)
    expected = extract(wide, range(2), 2 * BLOCK_TOKENS, (0, 1), (0, 40))[:, :, slots.cpu()]
    assert torch.equal(wide.gather(slots, (0, 1), (0, 40)).to(expected.device), expected)


def several_layers(device: torch.device) -> KvCache:
    cache = KvCache((2, 5), (0, 3), 24, 6, BLOCK_TOKENS, torch.bfloat16, device)
    for layer in range(2, 5):
        for pages in cache.pages(layer):
            pages.normal_()
    return cache


def everything(cache: KvCache) -> Tensor:
    return extract(cache, range(cache.blocks), cache.blocks * BLOCK_TOKENS, (2, 5), (0, 3))

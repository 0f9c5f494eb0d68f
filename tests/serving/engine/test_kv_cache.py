import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.blocks import BlockAllocator
from serving.engine.kv_cache import KvCache
from tests.serving.engine.cells import extract, insert


def make_cache() -> KvCache:
    return KvCache((2, 5), (1, 4), 8, 12, 4, torch.float32, "cpu")


def test_a_box_that_moves_arrives_under_other_blocks() -> None:
    source, target = make_cache(), make_cache()
    k, v = torch.randn(10, 3, 8), torch.randn(10, 3, 8)
    blocks = [7, 2, 9]
    slots = torch.tensor([blocks[at // 4] * 4 + at % 4 for at in range(10)])
    source.write(3, slots, k, v)
    box = extract(source, blocks, 10, (3, 5), (2, 4))
    assert box.shape == (2, 2, 10, 2, 8)
    assert box.is_contiguous()
    assert torch.equal(box[0, 0], k[:, 1:])
    insert(target, [0, 1, 2], 10, (3, 5), (2, 4), box)
    keys, values = target.read(3, torch.tensor([[0, 1, 2]]))
    assert torch.equal(keys[0, :10, 1:], k[:, 1:])
    assert torch.equal(values[0, :10, 1:], v[:, 1:])
    assert not keys[0, 10:].any()
    assert not keys[0, :, 0].any()


def test_sizes_and_wrong_boxes() -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match="not within"):
        cache.gather(torch.tensor([0]), (0, 3), (1, 2))
    with pytest.raises(ValueError, match="do not fit"):
        cache.slots([0], 0, 5)


@given(st.lists(st.integers(0, 6), max_size=30))
def test_blocks_have_one_owner(wishes: list[int]) -> None:
    allocator = BlockAllocator(10)
    owned: list[list[int]] = []
    for wish in wishes:
        if allocator.can_allocate(wish):
            owned.append(allocator.allocate(wish))
        elif owned:
            allocator.free(owned.pop(0))
        used = [block for blocks in owned for block in blocks]
        assert len(used) == len(set(used)) == 10 - allocator.available
        assert allocator.usage == pytest.approx(len(used) / 10)
    with pytest.raises(ValueError, match="wanted"):
        allocator.allocate(11)
    with pytest.raises(ValueError, match="not in use"):
        allocator.free([99])


@pytest.mark.parametrize("slots", [[], [5], [4, 5, 6, 7], [9, 3, 4, 5, 0, 1, 11]])
def test_slots_are_packed_and_unpacked_in_their_order(slots: list[int]) -> None:
    source, target = (KvCache((1, 3), (0, 2), 3, 3, 4, torch.float32, "cpu") for _ in range(2))
    for layer in (1, 2):
        for pages in source.pages(layer):
            pages.normal_()
    index = torch.tensor(slots, dtype=torch.int64)
    data = source.gather(index, (1, 3), (1, 2))
    whole = extract(source, range(3), 12, (1, 3), (1, 2))
    assert torch.equal(data, whole.index_select(2, index))
    target.scatter(index, (1, 3), (1, 2), data)
    found = extract(target, range(3), 12, (1, 3), (0, 2))
    assert torch.equal(found[..., 1:, :].index_select(2, index), data)
    assert found.count_nonzero() == data.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_log_takes_tokens_in_any_order(dtype: torch.dtype) -> None:
    source = KvCache((1, 3), (0, 2), 3, 3, 4, dtype, "cpu")
    log = KvCache((1, 3), (0, 2), 3, 3, 4, dtype, "cpu", log=True)
    for layer in (1, 2):
        for pages in source.pages(layer):
            pages.normal_()
    here, there = torch.tensor([9, 3, 4, 5, 0]), torch.tensor([2, 11, 10, 0, 7])
    log.unpack(there, source.pack(here))
    assert torch.equal(log.gather(there, (1, 3), (0, 2)), source.gather(here, (1, 3), (0, 2)))
    assert source.gather(here, (1, 3), (0, 2)).count_nonzero()


def test_memory_that_is_given_back_is_gone_and_can_be_used_again() -> None:
    cache = KvCache((0, 2), (0, 4), 64, 2048, 16, torch.float32, "cpu")
    cache._flat.fill_(1.0)
    before = psutil.Process().memory_info().rss
    cache.give_back()
    assert before - psutil.Process().memory_info().rss > 0.9 * cache._flat.nbytes
    cache._flat.fill_(2.0)
    assert int(cache._flat[-1, -1, -1, -1, -1]) == 2

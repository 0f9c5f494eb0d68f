from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InvalidInput
from data.layout import Device, Layout, ParallelConfig, Position

degrees = st.integers(1, 4)


@given(degrees, degrees, degrees)
def test_positions_come_replica_by_replica_stage_by_stage(replicas: int, stages: int, shards: int) -> None:
    config = ParallelConfig(replicas, stages, shards, 1)
    positions = list(config.positions())
    assert positions == sorted(set(positions))
    assert len(positions) == config.devices == replicas * config.replica_devices


@given(degrees, degrees, degrees, degrees, st.booleans())
def test_keys_say_everything(replicas: int, stages: int, shards: int, batch: int, uneven: bool) -> None:
    config = ParallelConfig(replicas, stages, shards, batch, tuple(range(1, stages + 1)) if uneven else ())
    assert ParallelConfig.from_key(config.key) == config


@pytest.mark.parametrize("key", ["", "D1·P1·T1", "D1·P1·T1·B0", "D1·P2·T1·B1·L3", "D1·P1·T1·B1 "])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidInput):
        ParallelConfig.from_key(key)


@given(stages=st.integers(1, 8), extra=st.integers(0, 20))
def test_balanced_stages_cover_the_layers(stages: int, extra: int) -> None:
    layers = stages + extra
    ranges = [ParallelConfig(1, stages, 1, 1).stage_layers(stage, layers) for stage in range(stages)]
    sizes = [stop - start for start, stop in ranges]
    assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), layers]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_a_partition_rules_the_stages() -> None:
    config = ParallelConfig(1, 2, 1, 1, partition=(1, 3))
    assert [config.stage_layers(stage, 4) for stage in range(2)] == [(0, 1), (1, 4)]
    with pytest.raises(InvalidInput, match="does not add up to 5"):
        config.stage_layers(0, 5)


@pytest.mark.parametrize("fields", [(0, 1, 1, 1), (1, 1, 1, 0), (1, 2, 1, 1, (4,)), (1, 2, 1, 1, (4, 0))])
def test_impossible_configurations_are_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput):
        ParallelConfig(*fields)


@pytest.mark.parametrize(("stage", "layers"), [(2, 4), (-1, 4), (0, 1)])
def test_a_stage_that_does_not_exist(stage: int, layers: int) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        ParallelConfig(1, 2, 1, 1).stage_layers(stage, layers)


def test_json_round_trip() -> None:
    config = ParallelConfig(2, 2, 1, 8, partition=(3, 5))
    assert ParallelConfig.from_json(config.to_json()) == config
    with pytest.raises(InvalidInput, match="not a parallel configuration"):
        ParallelConfig.from_json({"replicas": 1})


def test_a_layout_binds_positions_in_order() -> None:
    devices = tuple(Device("a", index) for index in range(4))
    layout = Layout(ParallelConfig(2, 1, 2, 1), devices)
    assert list(layout.bound())[2] == (Position(1, 0, 0), Device("a", 2))
    assert layout.replica_devices(1) == devices[2:]
    assert str(devices[0]) == "a/0"


def test_impossible_layouts_are_refused() -> None:
    config = ParallelConfig(1, 1, 2, 1)
    with pytest.raises(InvalidInput, match="needs 2 devices, not 1"):
        Layout(config, (Device("a", 0),))
    with pytest.raises(InvalidInput, match="two positions"):
        Layout(config, (Device("a", 0), Device("a", 0)))

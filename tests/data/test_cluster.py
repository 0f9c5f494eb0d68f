from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.errors import InvalidInput

SMALL = InstanceType("small", 1, "CPU", 1 << 30, 1e9, 1e9, 1.0, 0.5)
LARGE = replace(SMALL, name="large", devices=4)
FLEET = ClusterSpec("fleet", (SMALL, LARGE), (2, 3))
names = st.text(st.characters(categories=("L", "N"), include_characters="-."), min_size=1).filter(
    lambda n: n != "empty"
)


@given(st.dictionaries(names, st.integers(0, 99)))
def test_a_state_is_its_counts_and_its_key(counts: dict[str, int]) -> None:
    state = ClusterState.of(counts)
    assert state == ClusterState.of(dict(reversed(counts.items())))
    assert state.instances == sum(counts.values())
    assert ClusterState.from_key(state.key) == state


@pytest.mark.parametrize("key", ["", "small", "small=x", "small=1=2", "small=-1", "small=1,"])
def test_a_bad_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput):
        ClusterState.from_key(key)


def test_the_states_of_a_fleet() -> None:
    states = FLEET.states()
    assert len(set(states)) == len(states) == 3 * 4
    assert ClusterState(()) in states
    assert max(FLEET.devices(state) for state in states) == 2 + 3 * 4


def test_a_type_that_the_fleet_lacks_is_named() -> None:
    with pytest.raises(InvalidInput, match="no instance type huge; it has small, large"):
        FLEET.devices(ClusterState.of({"huge": 1}))


@pytest.mark.parametrize(
    ("counts", "devices", "price"),
    [
        ({"small": 2, "large": 1}, None, 1.5),
        ({"small": 2, "large": 1}, 4, 0.5),
        ({"small": 2, "large": 1}, 5, 1.0),
        ({"small": 2, "large": 1}, 1, 0.5),
        ({"small": 2}, 1, 0.5),
        ({}, None, 0.0),
    ],
)
def test_the_price_of_what_is_occupied(counts: dict[str, int], devices: int | None, price: float) -> None:
    """A device of a large instance is cheaper here, so those are taken first."""
    assert FLEET.price_usd_h(ClusterState.of(counts), devices) == pytest.approx(price)


def test_fleets_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="one maximum for each"):
        ClusterSpec("x", (SMALL,), (1, 2))
    with pytest.raises(InvalidInput, match="distinct"):
        ClusterSpec("x", (SMALL, SMALL), (1, 2))
    with pytest.raises(InvalidInput, match="at least one device"):
        replace(SMALL, devices=0)


def test_json_round_trip() -> None:
    assert ClusterSpec.from_json(FLEET.to_json()) == FLEET
    with pytest.raises(InvalidInput, match="not a cluster spec"):
        ClusterSpec.from_json({"name": "x"})

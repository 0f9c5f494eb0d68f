from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.deployment import Deployment, Hosted, SharedGroup, split_name, tensor_name
from data.errors import InvalidInput
from data.layout import ParallelConfig
from data.placement import Shape

SMALL, LARGE = Hosted("small", 8, 0.25), Hosted("large", 4, 0.75, (3, 5))


@st.composite
def configs(draw: st.DrawFn) -> ParallelConfig:
    replicas, stages, shards, batch = (draw(st.integers(1, 4)) for _ in range(4))
    partition = draw(st.just(()) | st.lists(st.integers(1, 3), min_size=stages, max_size=stages).map(tuple))
    return ParallelConfig(replicas, stages, shards, batch, partition)


@given(config=configs())
def test_a_fleet_of_one_model_is_its_configuration(config: ParallelConfig) -> None:
    deployment = Deployment.of(config)
    assert deployment.uniform == config
    assert deployment.devices == config.devices
    assert str(deployment) == str(config)


def test_groups_are_values_whatever_the_order_they_are_given_in() -> None:
    group, alone = SharedGroup(2, 1, (SMALL, LARGE)), SharedGroup(1, 1, (SMALL,))
    assert group == SharedGroup(2, 1, (LARGE, SMALL))
    deployment = Deployment((group, alone, group))
    assert deployment == Deployment((alone, group, group))
    assert [deployment.batch(model) for model in ("small", "large", "other")] == [24, 8, 0]
    assert (deployment.devices, deployment.models, deployment.uniform) == (5, ("large", "small"), None)
    assert str(deployment) == "P1·T1(small·B8) + 2×P2·T1(large·B4, small·B8)"
    assert group.shape == Shape(shards=1, stages=2)
    assert group.config(LARGE) == ParallelConfig(1, 2, 1, 4, (3, 5))
    assert SharedGroup.from_json(json.loads(json.dumps(group.to_json()))) == group


@pytest.mark.parametrize(
    ("hosted", "why"),
    [((), "at least one model"), ((SMALL, SMALL), "'small' is there twice"), ((LARGE, Hosted("x", 1)), "more than 1")],
)
def test_impossible_groups_are_refused(hosted: tuple[Hosted, ...], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        SharedGroup(2, 1, hosted)


def test_nothing_impossible_is_hosted() -> None:
    with pytest.raises(InvalidInput, match="above 0"):
        Hosted("a", 4, 0.0)
    with pytest.raises(InvalidInput, match="every one of 2 stages"):
        SharedGroup(2, 1, (Hosted("a", 4, 1.0, (8,)),))


@given(model=st.sampled_from(["", "a", "org/model"]), tensor=st.sampled_from(["lm_head.weight", "model.norm.weight"]))
def test_tensor_names_say_whose_they_are(model: str, tensor: str) -> None:
    assert split_name(tensor_name(model, tensor)) == (model, tensor)

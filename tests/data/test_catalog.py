from __future__ import annotations

import pytest

from data.catalog import instance_names, instance_sources, instance_type, model_names, model_shape
from data.errors import InvalidInput

# Published parameter counts, in billions.
PARAMETERS = {
    "opt-6.7b": 6.658,
    "llama-30b": 32.529,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "qwen3-8b": 8.191,
    "qwen3-32b": 32.762,
}


@pytest.mark.parametrize(("name", "billions"), PARAMETERS.items())
def test_shapes_have_the_published_parameter_counts(name: str, billions: float) -> None:
    model = model_shape(name)
    assert model.weight_bytes / model.dtype_bytes / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize(("name", "gib"), [("gpt-20b", 74.5), ("llama-30b-spotserve", 111.8)])
def test_spotserve_shapes_have_the_published_sizes(name: str, gib: float) -> None:
    assert model_shape(name).weight_bytes / 2**30 == pytest.approx(gib, rel=0.02)


def test_every_entry_loads_under_its_name() -> None:
    assert [model_shape(name).name for name in model_names()] == list(model_names())
    assert [instance_type(name).name for name in instance_names()] == list(instance_names())


@pytest.mark.parametrize("name", instance_names())
def test_every_price_has_a_source(name: str) -> None:
    kind, sources = instance_type(name), instance_sources(name)
    assert all(sources[field] for field in ("hardware", "price_on_demand_usd_h", "price_spot_usd_h"))
    assert 0 <= kind.price_spot_usd_h <= kind.price_on_demand_usd_h


def test_the_prices_of_the_spotserve_evaluation() -> None:
    kind = instance_type("g4dn.12xlarge")
    assert (kind.price_on_demand_usd_h, kind.price_spot_usd_h, kind.devices) == (3.912, 1.9046, 4)
    assert kind.network_bytes_per_s * 8 == 50e9


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(InvalidInput, match=r"no 'p9'; it has g4dn\.12xlarge, "):
        instance_type("p9")
    with pytest.raises(InvalidInput, match=r"no 'gpt-9'; it has opt-6\.7b, "):
        model_shape("gpt-9")

"""SpotServe's published cost model, search and arranger on numbers printed in the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import CorruptData, InvalidInput
from planning.arrangement import slot_times_s, steps_that_fit, stop_threshold_s
from planning.static_batch import StaticBatchProfile, StaticConfig, first_best

GPT_20B = StaticBatchProfile.from_json({
    "stored_layers": 48, "computed_layers": 44, "min_gpus": 12, "max_M": 8, "fix": 1.1,
    "stage_comm_prefill_ms": 7.0, "stage_comm_decode_ms": 0.1,
    "embed_ms": {"1": 0.318, "2": 0.471, "4": 0.607},
    "layer_ms": {
        "M=1": {"1": [107.203, 7.144], "2": [224.025, 7.259], "4": [454.014, 7.949]},
        "M=2": {"1": [54.478, 3.808], "2": [115.698, 3.759], "4": [244.748, 4.076]},
        "M=4": {"1": [37.562, 1.968], "2": [64.61, 1.938], "4": [132.855, 2.13]},
        "M=8": {"1": [32.2, 1.758], "2": [42.778, 1.764], "4": [80.624, 1.932]},
    },
})  # fmt: skip


def test_single_request_latency_of_table_1() -> None:
    assert GPT_20B.latency_ms(StaticConfig(1, 3, 4, 1, 1, 1)) == pytest.approx(14372.827, abs=1e-3)


@pytest.mark.parametrize(
    ("instances", "required", "chosen", "latency_s"),
    [
        (3, 0.4, (1, 3, 4, 4, 4, 1), 14.459),
        (5, 0.4, (1, 2, 8, 4, 4, 1), 12.961),
        (9, 0.8, (3, 3, 4, 4, 4, 1), 14.459),
        (12, 0.35, (3, 2, 8, 2, 2, 1), 12.116),
    ],
)
def test_choices_printed_in_the_reference(
    instances: int, required: float, chosen: tuple[int, ...], latency_s: float
) -> None:
    choice = GPT_20B.choose(4 * instances, 4, required)
    assert choice is not None
    assert choice.config == StaticConfig(*chosen)
    assert choice.latency_ms == pytest.approx(latency_s * 1e3, abs=0.5)


def test_too_few_devices() -> None:
    assert GPT_20B.choose(11, 4, 0.4) is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1), st.integers(1, 5))
def test_first_best_is_algorithm_1(pairs: list[tuple[int, int]], required: int) -> None:
    chosen = first_best(((latency, rate, index) for index, (latency, rate) in enumerate(pairs)), required)
    assert chosen is not None
    met, index = chosen
    enough = [latency for latency, rate in pairs if rate >= required]
    assert met == bool(enough)
    key = (lambda i: pairs[i][0]) if met else (lambda i: -pairs[i][1])
    allowed = [i for i, (_, rate) in enumerate(pairs) if rate >= required or not met]
    assert index == min(allowed, key=lambda i: (key(i), i))


def test_damaged_profiles_and_unknown_sizes() -> None:
    with pytest.raises(CorruptData, match="not a static-batch profile"):
        StaticBatchProfile.from_json({"fix": 1.0})
    with pytest.raises(InvalidInput, match="not profiled"):
        GPT_20B.latency_ms(StaticConfig(1, 2, 16, 1, 1, 1))


def test_arranger_examples_of_the_reference() -> None:
    config = StaticConfig(1, 2, 8, 4, 4, 1)
    assert slot_times_s(GPT_20B, config, acquisition=False) == pytest.approx((0.976, 0.0936), abs=1e-3)
    found = [
        [steps_that_fit(GPT_20B, config, slot, acquisition=acquisition) for acquisition in (False, True)]
        for slot in (5.0, 10.0, 15.0)
    ]
    assert found == [[41, 55], [95, 119], [None, None]]


@given(st.floats(-5, 40), st.sampled_from([1, 2, 4]), st.booleans())
def test_steps_before_a_preemption_end_in_time(slot_s: float, batch: int, stop_rule: bool) -> None:
    config = StaticConfig(1, 3, 4, batch, 4, 1)
    prefill, decode = slot_times_s(GPT_20B, config, acquisition=False)
    steps = steps_that_fit(GPT_20B, config, slot_s, acquisition=False, stop_rule=stop_rule)
    if steps is None:
        assert prefill + 128 * decode <= slot_s
    elif steps:
        assert prefill + steps * decode <= slot_s < prefill + (steps + 2) * decode
    if stop_rule and slot_s <= stop_threshold_s(GPT_20B, config):
        assert steps == 0


def test_micro_batches_that_do_not_divide_the_batch_are_not_used() -> None:
    config = StaticConfig(1, 2, 8, 2, 4, 1)
    single = replace(config, prefill_micro=1)
    times = (slot_times_s(GPT_20B, one, acquisition=True) for one in (config, single))
    assert len(set(times)) == 1

"""SpotServe's published placement and estimate: every reference case, and what must hold for any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.spotserve_mapping import read_config
from data.errors import Infeasible
from data.layout import ParallelConfig, Position
from planning.edge_weights import GptShape, InterruptedBatches
from planning.spotserve_switch import Gpu, Switch, first_placement, place, traffic_mbit, transfer_s

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cases" / "spotserve"
GPT_20B = GptShape(48, 51200, 6144, 640)


def _placed(assignment: dict[str, list[list[int] | None]]) -> dict[Gpu, Position]:
    return {(int(h), g): Position(*p) for h, row in assignment.items() for g, p in enumerate(row) if p is not None}


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="reference cases are not beside the repository")
def test_estimates_and_traffic_of_the_reference_cases() -> None:
    for case in json.loads((REFERENCE / "device_mapping.json").read_text())["cases"]:
        model, expected = case["model"], case["expected"]
        batches = InterruptedBatches(
            case["kv_batch_per_old_pipeline"] or (), case["kv_len"], case["inherits_old_pipeline"]
        )
        switch = Switch(
            GptShape(model["layers"], model["vocab"], model["hidden"], model["max_seq"]),
            read_config(case["old_config"]),
            read_config(case["new_config"]),
            _placed(case["old_assignment"]),
            case["available_instances"],
            case["gpus_per_instance"],
            batches,
        )
        given = _placed(expected["assignment"])
        assert transfer_s(switch, given) == pytest.approx(expected["estimate_s"], abs=1e-8)
        for host, mbit in traffic_mbit(switch, given).items():
            assert mbit == pytest.approx(expected["nic_Mb"][str(host)], abs=0.01)
        if case["matching"] != "flat":
            assert transfer_s(switch, place(switch)) == pytest.approx(expected["estimate_s"], rel=0.1)


def test_growth_moves_nobody_and_newcomers_take_the_free_slots() -> None:
    old, new = ParallelConfig(1, 2, 8, 4), ParallelConfig(2, 2, 8, 4)
    before = first_placement(old, range(4), 4)
    switch = Switch(GPT_20B, old, new, before, range(9), 4, InterruptedBatches((4,), 640, (0, 1)))
    after = place(switch)
    assert switch.grows_only
    assert {gpu: after[gpu] for gpu in before} == before
    assert {host for host, _ in after} == set(range(8))
    # Every newcomer receives its embeddings and its share of 24 layers.
    assert max(mbit for mbit, _ in traffic_mbit(switch, after).values()) > 0


def test_too_few_devices() -> None:
    config = ParallelConfig(1, 2, 8, 4)
    with pytest.raises(Infeasible, match="16 devices"):
        first_placement(config, range(3), 4)

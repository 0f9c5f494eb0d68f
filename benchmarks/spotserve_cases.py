"""Checkers of SpotServe's reference cases: its control plane's published inputs against ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.checks import Checker, Document, Folder, Verdict, at_least, close, exact, together
from benchmarks.spotserve_mapping import MappingCase, read_config
from benchmarks.spotserve_simulation import check_simulation
from data.availability import read_spotserve_cases
from planning.arrangement import steps_that_fit, stop_threshold_s
from planning.ordering import layer_order, natural_peak
from planning.static_batch import StaticBatchProfile, StaticChoice, StaticConfig

_TIGHT = 1e-6  # latencies are printed with six to nine digits
_CONFIG = ("D", "P", "M", "B", "mb_prefill", "mb_decode")


def profiles_of(folder: Folder) -> dict[str, StaticBatchProfile]:
    """The folder's `profiles.json` by model name."""
    entries = folder.load("profiles.json")["profiles"]
    return {name: StaticBatchProfile.from_json(entry) for name, entry in entries.items()}


def _rows(document: Document) -> Iterator[dict[str, Any]]:
    for row in document["rows"]:
        yield dict(zip(document["columns"], row, strict=True))


def _devices_per_instance(folder: Folder, model: str) -> int:
    return int(folder.load("profiles.json")["profiles"][model]["gpus_per_instance"])


def _as_tuple(config: StaticConfig) -> tuple[int, ...]:
    return (
        config.replicas, config.stages, config.shards, config.batch, config.prefill_micro, config.decode_micro
    )  # fmt: skip


def check_optimizer(document: Document, folder: Folder) -> Iterator[Verdict]:
    """The published policy chooses the reference configuration, with its latency and throughput."""
    profiles = profiles_of(folder)
    for row in _rows(document):
        devices = row["n_instances"] * _devices_per_instance(folder, row["model"])
        chosen = profiles[row["model"]].choose(devices, row["max_batch"], row["required_rps"])
        name = f"{row['model']} n={row['n_instances']} B≤{row['max_batch']} {row['required_rps']} req/s"
        yield together(name, _optimizer_checks(chosen, row))


def _optimizer_checks(chosen: StaticChoice | None, row: Mapping[str, Any]) -> Iterator[Verdict]:
    wanted = tuple(row[name] for name in _CONFIG)
    if chosen is None:
        yield exact("infeasible", config=((0,) * len(_CONFIG), wanted), rule=("infeasible", row["rule"]))
        return
    yield exact("config", config=(_as_tuple(chosen.config), wanted))
    yield exact("rule", rule=("min_latency" if chosen.met else "max_throughput", row["rule"]))
    yield close("latency", _TIGHT, ms=(chosen.latency_ms, row["latency_ms"]))
    yield close("throughput", _TIGHT, rps=(chosen.throughput_rps, row["throughput_rps"]))
    config = chosen.config
    yield exact("devices", used=(config.replicas * config.stages * config.shards, row["gpus_used"]))


def check_latency(document: Document, folder: Folder) -> Iterator[Verdict]:
    """The cost model gives the reference latency, prefill and decode times of every configuration."""
    profiles = profiles_of(folder)
    for row in _rows(document):
        profile = profiles[row["model"]]
        config = StaticConfig(1, row["P"], row["M"], row["B"], row["mb_prefill"], row["mb_decode"])
        yield close(
            f"{row['model']} {_as_tuple(config)}",
            _TIGHT,
            latency_ms=(profile.latency_ms(config), row["latency_ms"]),
            t1_ms=(profile.prefill_ms(config), row["t1_ms"]),
            t2_ms=(profile.decode_ms(config), row["t2_ms"]),
        )


def check_mapping(document: Document, folder: Folder) -> Iterator[Verdict]:
    """Our mapping reuses at least what the reference does, and the free matching is the flat optimum."""
    for case in document["cases"]:
        mapping = MappingCase.read(case, case["model"], case["old_config"], case["new_config"])
        yield together(case["id"], _mapping_checks(mapping, case["expected"], case["matching"]))


def _mapping_checks(mapping: MappingCase, expected: Mapping[str, Any], matching: str) -> Iterator[Verdict]:
    ours = mapping.match()
    yield at_least("reuse", 1e-9, weight=(mapping.weight(ours), expected["total_weight"]))
    yield close("flat optimum", 1e-9, weight=(mapping.flat_optimum(), expected["flat_optimum"]))
    theirs = mapping.rows_of(expected["assignment"])
    yield close("weight of the given placement", 1e-9, weight=(mapping.weight(theirs), expected["total_weight"]))
    if mapping.grows_only:
        yield exact("growth", moved=(mapping.moved(ours), 0))
    yield exact("kind", grows_only=(mapping.grows_only, matching == "none_scale_out"))
    yield from _crossing_checks(mapping, ours, theirs, expected.get("bounds", {}))
    order = layer_order(mapping.model.layers, mapping.old, mapping.new, mapping.survivors(theirs), mapping.tolerance)
    yield exact("layer order", order=(list(order.order), expected["layer_order"]))
    if "early_unlock_gpus" in expected:
        yield exact("early unlock", devices=(mapping.unlocked(theirs), expected["early_unlock_gpus"]))
    if "weight_matrix" in expected:
        found, wanted = mapping.matrix(expected["weight_rows"]), np.array(expected["weight_matrix"])
        yield close("matrix", 1e-9, largest_difference=(1 + float(np.abs(found - wanted).max()), 1.0))


def _crossing_checks(
    mapping: MappingCase, ours: Sequence[int], theirs: Sequence[int], bounds: Mapping[str, float]
) -> Iterator[Verdict]:
    """Layer bytes between instances: exact for the given placement, no more for ours."""
    if "inter_layer_bytes" in bounds:
        expected = bounds["inter_layer_bytes"]
        yield close("bytes of the given placement", _TIGHT, crossing=(mapping.crossing_bytes(theirs), expected))
        yield at_least("bytes of our placement", _TIGHT, saved=(2 * expected - mapping.crossing_bytes(ours), expected))


def check_layer_order(document: Document, folder: Folder) -> Iterator[Verdict]:
    """The memory-aware order is the reference's, and its peak no higher."""
    for case in document["cases"]:
        expected = case["expected"]
        old, new = (read_config(case[name]) for name in ("old_config", "new_config"))
        survivors = [(tuple(have), tuple(want) if want else None) for have, want in case["survivors_pm"]]
        found = layer_order(case["layers"], old, new, survivors, case["tolerance"])
        natural = natural_peak(case["layers"], old, new, survivors)
        yield together(case["id"], [
            exact("order", order=(list(found.order), expected["order"])),
            exact("limit", hit=(found.limited, expected["limit_hit"])),
            close("peak", 1e-9, order=(found.peak_layers, expected["peak_extra_layers"])),
            close("peak", 1e-9, natural=(natural, expected["natural_order_peak"])),
        ])  # fmt: skip


def check_arranger(document: Document, folder: Folder) -> Iterator[Verdict]:
    """The arranger runs exactly the reference's number of steps in every slot."""
    profiles = profiles_of(folder)
    for case in document["cases"]:
        profile = profiles[case["model"]]
        for batch, expected in case["expected_by_batch"].items():
            config = StaticConfig(1, case["P"], case["M"], int(batch), case["mb_prefill"], case["mb_decode"])
            threshold = stop_threshold_s(profile, config)
            yield close(f"{case['id']} B={batch} stop", _TIGHT, threshold_s=(threshold, case["stop_threshold_s"]))
            for slot_s, *steps in expected["steps"]:
                found = [
                    steps_that_fit(profile, config, slot_s, acquisition=acquisition, stop_rule=stop_rule)
                    for stop_rule in (False, True)
                    for acquisition in (False, True)
                ]
                shown = [-1 if count is None else count for count in found]
                yield exact(f"{case['id']} B={batch} {slot_s} s", steps=(shown, steps))


def check_replay(document: Document, folder: Folder) -> Iterator[Verdict]:
    """Along the traces: the configuration, whether to switch, and the mapping of every switch."""
    profiles = profiles_of(folder)
    placed: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for record in document["records"]:
        run = record["model"], record["trace"], record["kv"]
        name = f"{' '.join(run)} {record['op']} at {record['t_s']:g} s"
        checks = [_replayed_config(profiles[record["model"]], document, record)]
        if run in placed:
            checks.append(_replayed_action(record, placed[run]))
        if record["action"] == "switch":
            checks += _replayed_switch(document, record)
        placed[run] = record["expected"]["assignment"] if record["action"] == "switch" else record.get(
            "assignment", placed.get(run, {})
        )  # fmt: skip
        yield together(name, checks)


def _replayed_config(profile: StaticBatchProfile, document: Document, record: Mapping[str, Any]) -> Verdict:
    """When deployed, the batch is overwritten by the largest one."""
    devices, most = record["n_instances"] * document["gpus_per_instance"], document["max_batch"]
    chosen = profile.choose(devices, most, record["required_rps"])
    found = _as_tuple(chosen.config) if chosen else (0,) * len(_CONFIG)
    found = (*found[:3], most, *found[4:])
    return exact("config", config=(found, tuple(record["next_config"][name] for name in _CONFIG)))


def _replayed_action(record: Mapping[str, Any], placed: Mapping[str, Sequence[Any]]) -> Verdict:
    """A switch happens if the configuration changes or an instance in use leaves."""
    lost = any(any(placed.get(str(instance), ())) for instance in record["removed"])
    changed = record["prev_config"] != record["next_config"]
    return exact("action", action=("switch" if lost or changed else "none", record["action"]))


def _replayed_switch(document: Document, record: Mapping[str, Any]) -> list[Verdict]:
    old, new = ([record[name][key] for key in "DPM"] for name in ("prev_config", "next_config"))
    case = {
        "gpus_per_instance": document["gpus_per_instance"],
        "kv_len": document["models"][record["model"]]["max_seq"],
        "removed_instances": record["removed"],
        **record,
    }
    mapping = MappingCase.read(case, document["models"][record["model"]], old, new)
    expected = record["expected"]
    available = record["n_instances"] * document["gpus_per_instance"]
    return [
        *_mapping_checks(mapping, expected, expected["matching"]),
        exact("idle", devices=(available - mapping.new.devices, expected["idle_gpus"])),
        # The artifact takes more devices than are in use for an acquisition, whatever happened.
        exact("sign", sign=(-1 if available > mapping.old.devices else 1, expected["sign"])),
    ]


def check_rerouting(document: Document, folder: Folder) -> Iterator[Verdict]:
    """The pinned shape is what the published policy chooses on the full host list."""
    profiles, most = profiles_of(folder), _deployed_batch(folder)
    for case in document["cases"]:
        model, per_instance = case["model"], _devices_per_instance(folder, case["model"])
        chosen = profiles[model].choose(case["hosts_at_start"] * per_instance, most, case["required_rps"])
        shape = (chosen.config.stages, chosen.config.shards) if chosen else (0, 0)
        size = case["P"] * case["M"]
        pipelines = {count: int(count) * per_instance // size for count in case["pipelines_by_instances"]}
        yield exact(
            f"{model} {case['experiment']}",
            shape=(shape, (case["P"], case["M"])),
            pipelines=(pipelines, case["pipelines_by_instances"]),
        )


def _deployed_batch(folder: Folder) -> int:
    """Largest batch of the published runs (4), as the folder's replay states it if it has one."""
    try:
        return int(folder.load("replay.json")["max_batch"])
    except (FileNotFoundError, KeyError):
        return 4


def check_traces(document: Document, folder: Folder) -> Iterator[Verdict]:
    """Our reader of availability traces finds the stated counts, extremes and instance-minutes."""
    entries = document.get("traces")
    for name, trace in read_spotserve_cases(folder.path / folder.file).items():
        entry = entries[name] if entries else document
        events = entry["events"]
        after = [len(trace.usable(event["t_s"])) for event in events if event["op"] != "end"]
        checks = [exact("counts", available=(after, [e["available_after"] for e in events if e["op"] != "end"]))]
        for field, found in (("min", trace.least), ("max", trace.most)):
            if field in entry:
                checks.append(exact(field, instances=(found, entry[field])))
        if "instance_minutes" in entry:
            checks.append(close("area", _TIGHT, minutes=(trace.instance_minutes, entry["instance_minutes"])))
        for field, op in (("n_adds", "add"), ("n_removes", "remove")):
            if field in entry:
                total = sum(len(c.instances) for c in trace.changes if c.kind == op)
                checks.append(exact(field, instances=(total, entry[field])))
        yield together(name, checks)


def check_arrivals(document: Document, folder: Folder) -> Iterator[Verdict]:
    """Statistics of the included arrival times, computed as for any workload: gaps from time 0."""
    arrays = np.load(folder.path / "arrivals.npz")
    yield exact("maf rates", rates=(arrays["maf_rate_per_minute"].tolist(), document["maf_rate_per_minute"]))
    for row in document["rows"]:
        if row["array"] is not None:
            times = arrays[row["array"]]
            gaps = np.diff(times, prepend=0.0)
            found = {"n": len(times), "last_s": times[-1], "min_gap_s": gaps.min(), "max_gap_s": gaps.max()}
            fine = {"rate_rps": len(times) / times[-1], "mean_gap_s": gaps.mean(), "sd_gap_s": gaps.std()}
            yield exact(
                row["file"],
                **{name: (round(float(value), 3), row[name]) for name, value in found.items()},
                **{name: (round(float(value), 4), row[name]) for name, value in fine.items()},
                cv=(round(float(gaps.std() / gaps.mean()), 4), row["cv"]),
            )


def check_published(document: Document, folder: Folder) -> Iterator[Verdict]:
    """Table 1: the cost model's single-request latencies. Everything else in the file was measured."""
    profiles = {profile["model"]["name"]: key for key, profile in folder.load("profiles.json")["profiles"].items()}
    costs = profiles_of(folder)
    for row in document["table1"]:
        found = costs[profiles[row["model"]]].latency_ms(StaticConfig(1, row["P"], row["M"], 1, 1, 1))
        yield close(row["model"], _TIGHT, latency_ms=(found, row["cost_model_ms"]))


CHECKERS: dict[str, tuple[str, Checker]] = {
    "optimizer.json": ("rows", check_optimizer),
    "latency_table.json": ("rows", check_latency),
    "device_mapping.json": ("cases", check_mapping),
    "layer_order.json": ("cases", check_layer_order),
    "arranger.json": ("cases", check_arranger),
    "replay.json": ("records", check_replay),
    "rerouting.json": ("cases", check_rerouting),
    "simulation.json": ("spotserve", check_simulation),
    "traces.json": ("traces", check_traces),
    "traces_extra.json": ("traces", check_traces),
    "trace_g4dn_full.json": ("events", check_traces),
    "arrival_stats.json": ("rows", check_arrivals),
    "published.json": ("table1", check_published),
}
"""Checkers by file name, with the key that tells that the file has SpotServe's format."""

"""From what a user has (files, names, numbers) to a study as a value."""

# No postponed annotations: Prefect evaluates a flow's parameters where this module's names are unknown.

from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from data.availability import AvailabilityTrace, read_availability
from data.canonical import checksum
from data.catalog import instance_type, published_profile
from data.cluster import InstanceType
from data.errors import InvalidInput
from data.profile import Profile
from data.workload import Workload, read_workload
from planning.availability import RECORDED, Process, generate, steady
from planning.availability_fit import fit
from planning.costs import CostModel
from planning.mixing import Market, Mixing, solve_mixing
from planning.spot_policy import Book, Load, build
from planning.study.case import Model
from planning.study.measured import Demand, measured_model, published_model
from planning.study.study import Study

DEFAULT_POLICIES = [
    "perennial",
    "perennial-mixed",
    "spotserve-new",
    "spotserve-old",
    "reparallelization-new",
    "rerouting-new",
    "skyserve",
]
# Dollars for a second of a request's latency, to draw the frontier with.
LATENCY_USD = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.05)
# Losses per instance and hour of the synthetic fleets: as often as in SpotServe's segments, and three times as often.
SYNTHETIC = {"calm": 2.0, "stormy": 6.0}
_RETURN_S = 180.0
_ALONG = 0.05  # chance of each other instance of a zone to go with one that is lost
_FLOORS = Path(__file__).resolve().parent.parent


class EvaluateRequest(BaseModel):
    """What to simulate; everything has a default.

    `profile` is a folder of one's own measurements (without: `model` of the published profile), `availability` files of
    traces (of tables of many the one that `select` names; without: synthetic fleets of about `instances` in so many
    `zones`), `workload` a file of requests (without: Gamma
    arrivals with `cv`). `rate_rps` is the rate of arrivals: of a workload, of the published profile, or 1.
    Prices of 0 are those of `instance_type` in the catalog; `latency_usd` is what a second of a request's latency is
    held to cost where instances are bought for it, `miss_usd` a request that takes longer than `slo_s`. `input_tokens`
    and `output_tokens` are used with a profile.
    """

    model: str = "20B"
    profile: str = ""
    instance_type: str = ""
    instances: int = Field(default=8, ge=1)
    availability: list[str] = Field(default_factory=list)
    select: dict[str, str] = Field(default_factory=dict)
    zones: int = Field(default=1, ge=1)
    workload: str = ""
    duration_s: float = Field(default=1800.0, gt=0)
    rate_rps: float | None = Field(default=None, gt=0)
    cv: float = Field(default=1.0, ge=0)
    input_tokens: int | None = Field(default=None, ge=1)
    output_tokens: int | None = Field(default=None, ge=1)
    spot_usd_h: float = Field(default=0.0, ge=0)
    on_demand_usd_h: float = Field(default=0.0, ge=0)
    latency_usd: float = Field(default=0.01, gt=0)
    slo_s: float | None = Field(default=None, gt=0)
    miss_usd: float = Field(default=0.0, ge=0)
    policies: list[str] = Field(default=DEFAULT_POLICIES, min_length=1)
    seeds: int = Field(default=3, ge=1)
    workers: int = Field(default=2, ge=1)
    home: str = ".perennial"
    registry: str = ""
    out: str = ""

    def simulated(self) -> dict[str, Any]:
        """What results depend on, besides the files' contents."""
        return self.model_dump(exclude={"workers", "home", "registry", "out", "policies", "seeds"})


def study_key(request: EvaluateRequest) -> str:
    """What results are known by: the request, the contents of its files, and the simulator itself."""
    files = [*request.availability, request.workload]
    if request.profile:
        files += [str(Path(request.profile) / name) for name in ("profile.json", "steps.parquet", "links.parquet")]
    contents = [sha256(Path(file).read_bytes()).hexdigest() for file in files if file and Path(file).is_file()]
    return checksum([request.simulated(), contents, _simulator_sha256()])


@lru_cache(maxsize=4)
def _study(request_json: str, key: str) -> Study:
    return make_study(EvaluateRequest.model_validate_json(request_json))


def study_of(request: EvaluateRequest, key: str) -> Study:
    """The study of a request, made once per process and `study_key`."""
    return _study(request.model_dump_json(), key)


def make_study(request: EvaluateRequest) -> Study:
    """Read the files, fit the availability process and solve our policy. Raises `InvalidInput`, `CorruptData`."""
    traces = _traces(request)
    workload = _workload(request, max(trace.duration_s for trace in traces.values()))
    load = replace(_load(request, workload), slo_s=request.slo_s)
    model = _model(request, load, workload)
    most = max(*(trace.most for trace in traces.values()), model.wanted)
    process = _process(list(traces.values())).sized(most)
    book = build(model.costs, process, load)
    mixings = _mixings(request, book, process, model) if "perennial-mixed" in request.policies else {}
    recorded = np.array([one.arrival_s for one in workload.requests]) if workload else None
    seeds = 1 if workload else request.seeds
    return Study(model, traces, tuple(dict.fromkeys(request.policies)), seeds, book, load.cv, recorded, mixings)


def _mixings(request: EvaluateRequest, book: Book, process: Process, model: Model) -> dict[float, Mixing]:
    """Policies by the price of a second, that of the request first."""
    market = Market(model.kind.price_spot_usd_h / 3600, model.kind.price_on_demand_usd_h / 3600)
    prices = dict.fromkeys((request.latency_usd, *LATENCY_USD))
    miss = request.miss_usd
    return {usd: solve_mixing(book, process, market, usd, model.wanted, miss_usd=miss) for usd in prices}


def _traces(request: EvaluateRequest) -> dict[str, AvailabilityTrace]:
    found: dict[str, AvailabilityTrace] = {}
    for file in request.availability:
        found.update(read_availability(file, **request.select))
    if request.availability:
        return {name: trace for name, trace in found.items() if trace.most and trace.duration_s}
    most = request.instances + max(request.instances // 4, 1)
    fleets = {}
    for seed, (name, losses) in enumerate(SYNTHETIC.items()):
        process = steady(most, losses / 3600, 1 / _RETURN_S, along=_ALONG, zones=request.zones)
        fleets[name] = replace(generate(process, seed, request.duration_s, request.instances), name=name)
    return fleets


def _workload(request: EvaluateRequest, duration_s: float) -> Workload | None:
    """The requests of the file that arrive while the traces last, at the rate asked for."""
    if not request.workload:
        return None
    workload = read_workload(request.workload)
    if request.rate_rps and workload.rate_rps:
        workload = workload.scaled(request.rate_rps / workload.rate_rps)
    workload = workload.first(duration_s)
    if not workload.rate_rps:
        raise InvalidInput(f"{request.workload} has fewer than two requests within {duration_s:g} s; give another rate")
    return workload


def _load(request: EvaluateRequest, workload: Workload | None) -> Load:
    if workload is not None:
        return Load(workload.rate_rps, workload.cv)
    if request.rate_rps is not None:
        return Load(request.rate_rps, request.cv)
    published = 1.0 if request.profile else float(published_profile(request.model)["arrival_rate_rps"])
    return Load(published, request.cv)


def _model(request: EvaluateRequest, load: Load, workload: Workload | None) -> Model:
    kind = _kind(request)
    if not request.profile:
        if request.input_tokens or request.output_tokens:
            raise InvalidInput(
                "requests of the published profile have 512 and 128 tokens; other lengths need --profile"
            )
        return published_model(published_profile(request.model), kind, load, request.instances)
    inputs = request.input_tokens or (round(workload.input_tokens.mean) if workload else 64)
    outputs = request.output_tokens or (round(workload.output_tokens.mean) if workload else 64)
    costs = CostModel.fit(Profile.read(request.profile))
    return measured_model(costs, kind, Demand(load.rate_rps, load.cv, inputs, outputs), request.instances)


def _kind(request: EvaluateRequest) -> InstanceType:
    kind = instance_type(request.instance_type or ("local-cpu" if request.profile else "g4dn.12xlarge"))
    return replace(
        kind,
        price_spot_usd_h=request.spot_usd_h or kind.price_spot_usd_h,
        price_on_demand_usd_h=request.on_demand_usd_h or kind.price_on_demand_usd_h,
    )


def _process(traces: list[AvailabilityTrace]) -> Process:
    """Fitted to the traces; what is too short to be fitted is held to be like SpotServe's recording."""
    try:
        return fit(traces)
    except InvalidInput:
        return RECORDED


def _simulator_sha256() -> str:
    """Of the source that simulates: results of another simulator are not taken for this one's."""
    digest = sha256()
    for floor in ("data", "planning"):
        for file in sorted((_FLOORS / floor).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()

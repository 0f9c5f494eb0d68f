"""What the demo runs: model, fleet, objective and scenario for each kind of device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data.catalog import instance_type
from data.cluster import ClusterSpec
from perennial.scenario import GPU, SHORT, SHORT_GPU, Shape
from serving.settings import EngineSettings, Timeouts


@dataclass(frozen=True, slots=True)
class Setting:
    """One kind of demo. `model` are the arguments of `create_checkpoint`; `tokens_per_request` is what
    plans size KV for, `kv_memory_bytes` what each device may then use for it.
    """

    name: str
    model: dict[str, Any]
    type_name: str
    instances: int
    device_memory_bytes: int
    kv_memory_bytes: int
    tokens_per_request: int
    shape: Shape
    device: str
    dtype: str
    numerics: str
    budget_s: float

    @property
    def cluster(self) -> ClusterSpec:
        """The fleet that plans are made for."""
        kind = replace(instance_type(self.type_name), memory_bytes=self.device_memory_bytes)
        return ClusterSpec(f"{self.type_name}-{self.instances}", (kind,), (self.instances,))

    @property
    def engine(self) -> EngineSettings:
        """How workers compute."""
        return EngineSettings(
            device=self.device, dtype=self.dtype, numerics=self.numerics, kv_memory_bytes=self.kv_memory_bytes
        )

    @property
    def exact(self) -> bool:
        """Whether tokens may not depend on the layout: then every stream must be the undisturbed one."""
        return self.numerics == "exact"

    @property
    def timeouts(self) -> Timeouts:
        """The defaults."""
        return Timeouts()


# Five layers of equal weight: a device of 10.4 MB holds neither the model nor three layers with an end of it, so
# two devices must cut layers into shards, and three or four need not. The memory is a limit set for the demo.
CPU = Setting(
    name="demo-llama-5x256",
    model={
        "family": "llama",
        "layers": 5,
        "hidden": 256,
        "heads": 8,
        "kv_heads": 2,
        "ffn": 512,
        "vocab": 512,
        "max_positions": 1024,
    },
    type_name="local-cpu",
    instances=4,
    device_memory_bytes=10_400_000,
    kv_memory_bytes=1_640_000,
    tokens_per_request=160,
    shape=Shape(),
    device="cpu",
    dtype="float32",
    numerics="exact",
    budget_s=12.0,
)

# Of 2.09 GB the weights alone take 2.01 on one device: there it can only run one request at a time, so two devices
# do better together (a NCCL group) than apart. Again the memory is a limit set for the demo.
CUDA = Setting(
    name="demo-llama-16x2048",
    model={
        "family": "llama",
        "layers": 16,
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 8,
        "ffn": 8192,
        "vocab": 8192,
        "max_positions": 4096,
        "dtype": "bfloat16",
    },
    type_name="local-cuda",
    instances=2,
    device_memory_bytes=2_085_000_000,
    kv_memory_bytes=70_000_000,
    tokens_per_request=1024,
    shape=GPU,
    device="cuda",
    dtype="bfloat16",
    numerics="native",
    budget_s=15.0,
)

CUDA_EXACT = replace(
    CUDA,
    name="demo-llama-8x1024-exact",
    model={**CUDA.model, "layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 4, "ffn": 4096, "dtype": "float32"},
    device_memory_bytes=598_000_000,
    kv_memory_bytes=44_000_000,
    dtype="float32",
    numerics="exact",
)


def setting(device: str, *, exact: bool, short: bool) -> Setting:
    """The setting of a device kind; a short one has fewer requests and shorter pauses. The CPU's is always exact."""
    if device == "cpu":
        chosen, brief = CPU, SHORT
    else:
        chosen, brief = (CUDA_EXACT if exact else CUDA), SHORT_GPU
    if not short:
        return chosen
    return replace(chosen, shape=brief, budget_s=min(chosen.budget_s, 8.0))

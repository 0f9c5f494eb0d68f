"""What is to be measured, on what: the command line and what follows from it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from tempfile import gettempdir
from typing import Any

import msgspec

from data.models import ModelSpec
from profiling.fingerprint import device_count
from serving.settings import EngineSettings, ServingSettings, Timeouts

CASES = ("planned", "kill", "replication", "fleet")
_SLOW_STARTS = {"join_s": 120.0, "gather_s": 120.0, "prepare_s": 180.0, "switch_s": 30.0, "collective_s": 20.0}

_SPARE = 1.2  # room for a checkpoint, as a multiple of its weights

_CUDA: dict[str, Any] = {
    "cases": "planned,kill,replication", "requests": 32, "context": 2048, "max_tokens": 4096, "step_tokens": 2048,
    "before_s": 2.0, "after_s": 4.0, "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336,
    "vocab": 128256, "dtype": "bfloat16", "changes": 0, "kills": 4, "batches": "32,128",
    "replication_context": 1024, "link_bytes": 1 << 30, "scratch": "/dev/shm",
}  # fmt: skip
_CPU: dict[str, Any] = {
    "cases": "fleet", "requests": 8, "context": 32, "max_tokens": 224, "step_tokens": 256,
    "before_s": 0.7, "after_s": 1.2, "layers": 5, "hidden": 256, "heads": 8, "kv_heads": 2, "ffn": 512,
    "vocab": 512, "dtype": "float32", "changes": 30, "kills": 20, "batches": "4,8", "replication_context": 16,
    "link_bytes": 32 << 20, "scratch": "/tmp",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """One run. `gpus` is how many devices may be used, on CPU how many instances; `checkpoint` empty: one is made."""

    device: str
    out: Path
    scratch: Path
    checkpoint: str
    cases: tuple[str, ...]
    gpus: int
    requests: int
    context: int
    max_tokens: int
    step_tokens: int
    before_s: float
    after_s: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    dtype: str
    changes: int
    kills: int
    batches: tuple[int, ...]
    replication_context: int
    link_bytes: int
    timeout_s: float

    @property
    def model(self) -> dict[str, Any]:
        """The arguments of `create_checkpoint`."""
        names = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "dtype")
        geometry = {name: getattr(self, name) for name in names}
        return {"family": "llama", "max_positions": self.context + self.max_tokens, **geometry}

    @property
    def folder(self) -> Path:
        """Where the checkpoint is made: `scratch`, or the system's temporary folder if that lacks room."""
        model = {name: value for name, value in self.model.items() if name != "family"}
        size = ModelSpec("", "llama", head_dim=self.hidden // self.heads, **model).weight_bytes
        return self.scratch if disk_usage(self.scratch).free > _SPARE * size else Path(gettempdir())

    @property
    def instance_type(self) -> str:
        """The name of the fleet's instance type."""
        return f"local-{self.device}"

    def timeouts(self) -> Timeouts:
        """The defaults, with more patience for a model of gigabytes."""
        return Timeouts(**_SLOW_STARTS) if self.device == "cuda" else Timeouts()

    def engine(self, spec: ModelSpec, batch: int, tokens: int, **more: Any) -> EngineSettings:
        """KV memory for `batch` requests of `tokens` tokens on one device."""
        return EngineSettings(
            device=self.device,
            dtype=self.dtype,
            kv_memory_bytes=batch * (tokens + 16) * spec.kv_token_bytes,
            step_tokens=max(self.step_tokens, batch + 16),
            **more,
        )


def has_residency() -> bool:
    """Whether the engine can keep the whole model on every device."""
    return "residency" in EngineSettings.__struct_fields__


def replication(enabled: bool) -> dict[str, Any] | None:
    """The setting of `ServingSettings` that turns KV replication on or off; None if there is none."""
    if "replication" not in ServingSettings.__struct_fields__:
        return None
    default = ServingSettings(checkpoint="", journal="", token="").replication  # type: ignore[attr-defined]
    return {"replication": msgspec.structs.replace(default, enabled=enabled)}


def parse(arguments: list[str] | None = None) -> Options:
    """The options of a command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconfiguration", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for reconfiguration.json and the logs")
    parser.add_argument("--checkpoint", default="", help="a checkpoint of the given geometry; made when there is none")
    parser.add_argument("--gpus", type=int, default=0, help="devices to use at most; 0: all, on CPU four")
    parser.add_argument("--timeout-s", type=float, default=240.0, help="for each case")
    parser.add_argument("--cases", help=f"a list of {', '.join(CASES)}")
    parser.add_argument("--batches", help="batch sizes of the replication case")
    for name, default in _CUDA.items():
        if name not in ("cases", "batches"):
            kind = Path if name == "scratch" else type(default)
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"default: {default}, {_CPU[name]}")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    chosen: dict[str, Any] = {**(_CUDA if given["device"] == "cuda" else _CPU), **given}
    chosen["cases"] = tuple(chosen["cases"].split(","))
    chosen["batches"] = tuple(int(batch) for batch in chosen["batches"].split(","))
    chosen["scratch"] = Path(chosen["scratch"])
    chosen["gpus"] = chosen["gpus"] or (device_count("cuda") if chosen["device"] == "cuda" else 4)
    unknown = sorted(set(chosen["cases"]) - set(CASES))
    if unknown:
        parser.error(f"there is no case {unknown[0]}; choose from {', '.join(CASES)}")
    return Options(**chosen)

"""Which machine and software measurements hold for."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from data.errors import InvalidInput
from data.fingerprint import Fingerprint


def device_count(device: str) -> int:
    """Devices of this machine that workers can take; on CPU the cores. Raises `InvalidInput` without CUDA."""
    if device == "cpu":
        return os.cpu_count() or 1
    if device != "cuda":
        raise InvalidInput(f"device {device!r} is unknown; choose cpu or cuda")
    if not torch.cuda.is_available():
        raise InvalidInput("this machine has no usable CUDA device; use --device cpu")
    return torch.cuda.device_count()


def take_fingerprint(*, device: str, dtype: str, numerics: str, threads: int) -> Fingerprint:
    """The fingerprint of this machine for measurements made with these engine settings."""
    return this_machine(device, dtype=dtype, numerics=numerics, threads=str(threads), numpy=version("numpy"))


def this_machine(device: str = "cpu", **extra: str) -> Fingerprint:
    """The fingerprint of this machine for a result on `device`; `extra` says what else it depends on."""
    count = device_count(device)
    cuda = device == "cuda"
    if cuda:
        extra |= {"cuda": str(torch.version.cuda), "nccl": ".".join(str(part) for part in torch.cuda.nccl.version())}
    return Fingerprint.of(
        device=torch.cuda.get_device_name(0) if cuda else "cpu",
        devices=count,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(cuda=cuda),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        extra=extra,
    )


def _memory_bytes(*, cuda: bool) -> int:
    """Memory of one device; on CPU of the machine."""
    return torch.cuda.get_device_properties(0).total_memory if cuda else int(psutil.virtual_memory().total)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""The machine and software that a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from data.profile import Fingerprint


def this_machine(**extra: str) -> Fingerprint:
    """The fingerprint of this host; `extra` says what else the result depends on."""
    cuda = torch.cuda.is_available()
    return Fingerprint.of(
        device=torch.cuda.get_device_name(0) if cuda else "cpu",
        devices=torch.cuda.device_count() if cuda else 0,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        extra=extra,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

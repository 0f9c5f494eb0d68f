"""Where own kernels run."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def fused_on(device: torch.device) -> bool:
    """Whether Triton kernels work there: on CUDA, or under the interpreter; torch for CUDA brings Triton along."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and find_spec("triton") is not None

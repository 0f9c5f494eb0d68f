"""Where own kernels run: on CUDA if there is any, else under Triton's interpreter."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch

HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON and not torch.cuda.is_available():
    # Triton decides when it is imported; whoever imports it afterwards gets the interpreter too.
    os.environ["TRITON_INTERPRET"] = "1"
    for kernels in ("attention", "fused"):
        import_module(f"serving.engine.{kernels}")
    del os.environ["TRITON_INTERPRET"]


def _interpreter_runs() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(np.ones(1)) == 1
        except TypeError:
            return False


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not HAS_TRITON:
        pytest.skip("Triton is not installed here, so there are no kernels to test")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not _interpreter_runs():
        pytest.skip("Triton's interpreter does not run with numpy 2.4 or later; install an older one to test kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")

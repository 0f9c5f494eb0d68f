"""What the import linter cannot see: that heavy imports are lazy where a lower floor may make them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAN_EXTRA = ("prefect", "mlflow", "cvxpy", "pulp", "numba", "fastapi", "matplotlib")

IMPORT_ALL = """
import importlib, importlib.util, pathlib, sys
kernels = {"serving.engine." + name for name in ("attention", "fused", "rows")}
kernels = kernels if importlib.util.find_spec("triton") is None else set()
root, packages, blocked = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
for name in blocked:
    sys.modules[name] = None  # any import of it now fails
for package in packages:
    for path in sorted((root / package).rglob("*.py")):
        if path.name != "__main__.py":
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if name not in kernels:  # torch brings Triton along only where there is a device for it
                importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        pytest.param(("data", "planning"), (*PLAN_EXTRA, "torch", "grpc"), id="values-without-torch"),
        pytest.param(("serving", "profiling"), (*PLAN_EXTRA, "transformers"), id="a-gpu-node-without-the-plan-extra"),
    ],
)
def test_modules_import_without(packages: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, str(ROOT), ",".join(packages), ",".join(blocked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_line_starts_without_the_plan_extra() -> None:
    script = IMPORT_ALL.split("for package", maxsplit=1)[0] + "import perennial.cli"
    command = [sys.executable, "-c", script, str(ROOT), "-", ",".join(PLAN_EXTRA)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

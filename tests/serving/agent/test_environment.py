"""What the environment of a worker is for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serving.agent.environment import gpu_allocator, worker_environment

ROUNDS = 500
PAGES = 75  # of 300 kB
# As a step does: something that is needed for a moment, again and again.
FAULTS = f"""
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    bytearray(300_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(environment: dict[str, str]) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")
def test_a_worker_keeps_the_memory_of_what_it_needs_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    worker = worker_environment()
    hasty = {name: value for name, value in worker.items() if name != "MALLOC_TRIM_THRESHOLD_"}
    assert _faults(worker) < 10 * PAGES
    assert _faults(hasty) > 100 * PAGES, "the allocator has become patient by itself; the setting may go"


def test_what_was_set_outside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environment()["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("framework", "reserves"), [("2.8.0", False), ("2.10.1+cu128", False), ("2.11.0+cu130", True), ("3.0.0a0", True)]
)
def test_a_framework_is_told_no_option_that_it_does_not_know(framework: str, reserves: bool) -> None:
    options = gpu_allocator(framework).split(",")
    assert options[0] == "max_split_size_mb:2048"
    assert any(option.startswith("pinned_reserve") for option in options) is reserves

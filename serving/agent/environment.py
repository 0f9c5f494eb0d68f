"""What the process of a worker finds in its environment."""

from __future__ import annotations

import os
from importlib.metadata import version

_QUIET = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
_MEMORY = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
_SPLIT, _RESERVE = "max_split_size_mb:2048", "pinned_reserve_segment_size_mb:256"
_RESERVE_SINCE = (2, 11)  # of the framework: one that does not know an option refuses to touch the GPU


def worker_environment() -> dict[str, str]:
    """This process's environment, with what it does not say itself.

    NCCL's watchdog must not end a process whose peers are gone; torch's own warnings about that are noise.

    A worker makes and drops caches and weights in a new thread at every change. With an arena for each thread and
    large buffers in the arenas, glibc keeps more and more of what was freed. What steps use for a moment is the
    opposite: given back at once, which is what glibc does with more than 128 KiB when one of these sizes is set, it
    costs more than a thousand page faults for every token (`benchmarks.page_faults`).

    On a GPU, a large block that is free must stay whole for the next layout's cache. Host memory that the device reads
    from directly comes out of one segment: to get some from the driver takes milliseconds, in which no step is
    launched, and dozens while the driver clears up after a process that was killed. Groups are connected when they
    are made, because their first kernels must not run beside those of another.
    """
    gpu = {"PYTORCH_ALLOC_CONF": gpu_allocator(version("torch")), "NCCL_RUNTIME_CONNECT": "0"}
    return {**_QUIET, **_MEMORY, **gpu, **os.environ}


def gpu_allocator(framework: str) -> str:
    """Options of the GPU's allocator that this version of the framework knows."""
    major, minor = (int(part) for part in framework.split(".")[:2])
    return f"{_SPLIT},{_RESERVE}" if (major, minor) >= _RESERVE_SINCE else _SPLIT

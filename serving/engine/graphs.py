"""Decode steps recorded once per batch size and replayed: a launch per step instead of one per kernel.

A recording reads static buffers: ids, positions, slots, lengths, block tables and, after the first
stage, activations. A smaller batch is padded with rows that write to the cache's block of nobody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from serving.engine.batch import StepPlan
from serving.engine.kv_cache import KvCache
from serving.engine.own_stream import own_stream
from serving.engine.step import SHORT_TOKENS, DecodeRows, StepTensors

Compute = Callable[[StepTensors, Tensor | None], Tensor | None]
"""A step of one place: its tensors and the activations before it → activations or logits."""


class Recording(Protocol):
    """A computation that can be repeated; a CUDA graph is one."""

    def replay(self) -> None:
        """Compute again what is in the static buffers."""

    def reset(self) -> None:
        """Let go of it: it cannot be replayed any more."""


Record = Callable[[Callable[[], Tensor | None]], tuple[Recording, Tensor | None]]
"""Turns a computation into its recording and its static output."""

_ALIGNED = 4  # ids that start on 16 bytes: other addresses would be compiled for once more


def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """Batch sizes worth recording. Padding adds at most 32 rows, which cost next to nothing where reading the weights
    is most of a step; a recording costs a tenth of a second of every preparation.
    """
    sizes = [1, 8, *range(32, max_batch, 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)


class DecodeGraphs:
    """The recordings of one place.

    `width` is that of activations handed to `compute`, None for a first stage; `most_blocks` that of the
    longest block table. In `rehearsal` a computation waits for no other shard.
    """

    def __init__(
        self,
        compute: Compute,
        cache: KvCache,
        *,
        width: int | None,
        most_blocks: int,
        rehearsal: Callable[[], AbstractContextManager[None]] = nullcontext,
        record: Record | None = None,
    ) -> None:
        self._compute, self._cache, self._width, self._most_blocks = compute, cache, width, most_blocks
        self._record = record or GraphRecorder(cache.device, rehearsal).record
        self._steps: dict[int, _RecordedStep] = {}

    def capture(self, sizes: Sequence[int]) -> dict[int, float]:
        """Record `sizes` that are not yet; collective over the shards. Milliseconds each took.

        Touches nobody's KV. The largest comes first, so that the others fit in its memory.
        """
        taken_ms = {}
        for size in sorted(set(sizes) - self._steps.keys(), reverse=True):
            begun = time.perf_counter()
            step = _StepBuffers(size, self._most_blocks, self._cache)
            hidden = None
            if self._width is not None:
                hidden = torch.zeros((size, self._width), dtype=self._cache.dtype, device=self._cache.device)
            self._steps[size] = _RecordedStep(step, hidden, *self._record(self._computation(step.tensors, hidden)))
            taken_ms[size] = (time.perf_counter() - begun) * 1e3
        return taken_ms

    def close(self) -> None:
        """Let go of all recordings one by one: left to the interpreter, they would go while it holds everybody up."""
        for step in self._steps.values():
            step.recording.reset()

    def step_for(self, plan: StepPlan) -> _RecordedStep | None:
        """The smallest recording that holds a plan; None if its rows, or those of one sequence, are too many."""
        rows = sum(len(sequence.tokens) for sequence in plan.sequences)
        if any(len(sequence.tokens) > SHORT_TOKENS for sequence in plan.sequences):
            return None
        size = min((size for size in self._steps if size >= rows), default=None)
        return None if size is None else self._steps[size]

    def _computation(self, step: StepTensors, hidden: Tensor | None) -> Callable[[], Tensor | None]:
        return lambda: self._compute(step, hidden)


class GraphRecorder:
    """Records CUDA graphs on a stream of its own; they share one memory pool and are replayed one at a time."""

    def __init__(
        self, device: torch.device, rehearsal: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._rehearsal = rehearsal
        # A recording keeps the priority: what is replayed goes before what others do beside it.
        self._stream = own_stream(self, device, priority=-1)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], Tensor | None]) -> tuple[Recording, Tensor | None]:
        """Run `compute` once in rehearsal, which compiles and loads kernels, then record it.

        Other threads may go on using the device: only this one's calls are watched. `torch.cuda.graph`
        would collect garbage and empty the allocator's cache first, which they would feel.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            with self._rehearsal():
                compute()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = compute()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what broke the capture is the error to report
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, output


class _RecordedStep:
    def __init__(self, step: _StepBuffers, hidden: Tensor | None, recording: Recording, output: Tensor | None) -> None:
        self._step, self._hidden, self.recording, self._output = step, hidden, recording, output

    def run(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """The output's rows of the plan; valid until the next step of this place."""
        rows = self._step.fill(plan)
        if self._hidden is not None and hidden is not None:
            self._hidden[:rows].copy_(hidden)
        self.recording.replay()
        return None if self._output is None else self._output[:rows]


class _StepBuffers:
    """Static tensors of a step of `size` rows, filled from one host array in one copy."""

    def __init__(self, size: int, most_blocks: int, cache: KvCache) -> None:
        self._block_tokens = cache.block_tokens
        self._padding = (0, 0, cache.blocks * cache.block_tokens, 1)  # id, position, slot, length
        width = -(-size // _ALIGNED) * _ALIGNED
        self._host = np.zeros(4 * width + size * most_blocks, np.int32)
        self._device = torch.zeros(self._host.shape, dtype=torch.int32, device=cache.device)
        cut = 4 * width
        self._columns = self._host[:cut].reshape(4, width)[:, :size]
        self._columns[:] = np.array(self._padding)[:, None]
        self._tables = self._host[cut:].reshape(size, most_blocks)
        self._tables[:] = cache.blocks
        self._known: list[list[int]] = [[cache.blocks]] * size
        tokens, positions, slots, lengths = self._device[:cut].view(4, width)[:, :size].unbind()
        tables = self._device[cut:].view(size, most_blocks)
        every = torch.arange(size, device=cache.device)
        self.tensors = StepTensors(tokens, positions, slots, every, (), DecodeRows(None, tables, lengths))
        self._upload()

    def fill(self, plan: StepPlan) -> int:
        """Put a plan of at most `size` rows in, which are counted; the rest become padding."""
        tables = [one.blocks for one in plan.sequences for _ in one.tokens]
        for row, blocks in enumerate(tables):
            if blocks != self._known[row]:
                self._know(row, blocks)
        rows = len(tables)
        places = [one.start + more for one in plan.sequences for more in range(len(one.tokens))]
        positions = np.array(places, np.int32)
        blocks_at = self._tables[np.arange(rows), positions // self._block_tokens]
        tokens, *rest = self._columns
        tokens[:rows] = [token for one in plan.sequences for token in one.tokens]
        slots = blocks_at * self._block_tokens + positions % self._block_tokens
        for column, values in zip(rest, (positions, slots, positions + 1), strict=True):
            column[:rows] = values
        self._columns[:, rows:] = np.array(self._padding)[:, None]
        for row in range(rows, len(self._known)):
            self._tables[row, 0] = self._padding[2] // self._block_tokens
            self._known[row] = []
        self._upload()
        return rows

    def _know(self, row: int, blocks: list[int]) -> None:
        """Most tables are those of the step before; writing one takes longer than comparing it."""
        self._tables[row, : len(blocks)] = blocks
        self._known[row] = list(blocks)

    def _upload(self) -> None:
        host = torch.from_numpy(self._host)
        # Pinned anew for every step: the copy of the step before may not have happened yet.
        self._device.copy_(host.pin_memory() if self._device.is_cuda else host, non_blocking=True)

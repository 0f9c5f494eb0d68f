"""The reading side of `benchmarks.control_plane`: a process that does nothing but hold many streams."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time

import numpy as np

from serving.api.client import Client
from serving.requests import Limits

_WARM_UP_S = 2.0


def main() -> int:
    """Read for a while, then print what the tokens after the warm-up say as one JSON object."""
    parser = argparse.ArgumentParser(prog="benchmarks.stream_reader", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--clock-s", type=float, required=True, help="log-probabilities are the draw time modulo this")
    arguments = parser.parse_args()
    gc.freeze()  # the instrument's own garbage collection is not the service's latency
    asyncio.run(_measure(arguments))
    return 0


async def _measure(arguments: argparse.Namespace) -> None:
    receipts: list[tuple[float, tuple[float, ...]]] = []  # when, and the draw clocks of the tokens
    ends_at = time.monotonic() + _WARM_UP_S + arguments.seconds
    async with Client(arguments.address) as client:
        streams = (_read(client, index, arguments.max_tokens, ends_at, receipts) for index in range(arguments.streams))
        await asyncio.gather(*streams)
        cpu_s = time.process_time()
    window = [(at, clocks) for at, clocks in receipts if ends_at - arguments.seconds <= at < ends_at]
    ages_ms = 1e3 * np.concatenate([(at - np.array(clocks)) % arguments.clock_s for at, clocks in window])
    quantiles = {f"p{q}": round(float(np.percentile(ages_ms, q)), 2) for q in (50, 90, 99)}
    measured = {
        "tokens_per_s": round(len(ages_ms) / arguments.seconds),
        "messages_per_s": round(len(window) / arguments.seconds),
        "added_latency_ms": {**quantiles, "max": round(float(ages_ms.max()), 2)},
        "client_cores_used": round(cpu_s / (_WARM_UP_S + arguments.seconds), 2),
    }
    print(json.dumps(measured))


async def _read(
    client: Client, index: int, max_tokens: int, ends_at: float, receipts: list[tuple[float, tuple[float, ...]]]
) -> None:
    limits = Limits(max_tokens=max_tokens, ignore_eos=True)
    async for chunk in client.stream([index % 256, 7], limits=limits, resumable=False):
        now = time.monotonic()
        receipts.append((now, chunk.logprobs))
        if now >= ends_at:
            return


if __name__ == "__main__":
    sys.exit(main())

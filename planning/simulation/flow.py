"""Clients that send one request after the other, for ever: how quick tokens come once steps queue behind each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

from data.layout import ParallelConfig
from planning.simulation.batching import BatchLimits, Job
from planning.simulation.lines import Line
from planning.simulation.machine import Agenda, Machine, Queue, run
from planning.step_laws import StepLaw

LONG_S = 1.0, 40.0  # a flow that has settled, for long enough that single requests do not matter


def flow_token_s(
    law: StepLaw,
    config: ParallelConfig,
    limits: BatchLimits,
    clients: int,
    draw: Callable[[], tuple[int, int]],
    *,
    span_s: tuple[float, float] = LONG_S,
) -> float:
    """Seconds from one token of a client to its next, on average, on the replicas of `config` and nothing else.

    `draw` says the prompt and output tokens of the next request; tokens count that come in `span_s`, on a clock that
    begins when the clients do.
    """
    warm_s, until_s = span_s
    agenda, machine, queue, keys = Agenda(), Machine[Line](), Queue(), count()
    alone = replace(config, replicas=1)
    machine.lines = {number: Line(number, alone, (), law, limits) for number in range(config.replicas)}
    tokens = 0

    def send() -> None:
        job = Job(next(keys), *draw())
        agenda.after(law.overhead_s, lambda: queue.jobs.append(job))

    def told(job: Job) -> None:
        nonlocal tokens
        tokens += agenda.now_s > warm_s
        if job.done:
            send()

    for _ in range(clients):
        send()
    run(agenda, machine, lambda: queue.hand_out(list(machine.lines.values())), told, until_s)
    return clients * (until_s - warm_s) / max(tokens, 1)

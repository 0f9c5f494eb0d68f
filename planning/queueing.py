"""How long requests wait for a free server."""

from __future__ import annotations

from math import inf


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival of an M/M/m queue has to wait; `load` = rate × service time, in servers.

    A. K. Erlang (1917), through the stable recursion of Erlang B. 1 if the load is not below `servers`.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    utilisation = load / servers
    return blocked / (1 - utilisation * (1 - blocked))


def waiting_s(
    rate_rps: float, service_s: float, servers: int, *, arrival_cv: float = 1.0, service_cv: float = 1.0
) -> float:
    """Mean seconds a request waits in a G/G/m queue; infinite from full utilisation on.

    Allen–Cunneen approximation: M/M/m waiting time × (arrival CV² + service CV²) / 2
    (A. O. Allen, Probability, Statistics and Queueing Theory, 2nd ed., 1990, §6).
    """
    load = rate_rps * service_s
    if load <= 0:
        return 0.0
    if load >= servers:
        return inf
    variability = (arrival_cv**2 + service_cv**2) / 2
    return variability * erlang_c(servers, load) * service_s / (servers - load)

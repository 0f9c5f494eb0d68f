"""How long requests wait for a free server."""

from __future__ import annotations

from math import exp, inf


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival of an M/M/m queue has to wait; `load` = rate × service time, in servers.

    A. K. Erlang (1917), through the stable recursion of Erlang B. 1 if the load is not below `servers`.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
        if not blocked:  # too small for a number, and smaller with every further server
            break
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


def late_share(
    rate_rps: float,
    service_s: float,
    servers: int,
    patience_s: float,
    *,
    arrival_cv: float = 1.0,
    service_cv: float = 1.0,
) -> float:
    """Share of requests that wait longer than `patience_s` in a G/G/m queue; 1 where there is no patience left.

    Those who wait at all (Erlang C) are taken to wait exponentially long, as in M/M/m and, for heavy traffic, in
    general (J. F. C. Kingman, 1962), with the mean of `waiting_s`.
    """
    if patience_s < 0:
        return 1.0
    mean_s = waiting_s(rate_rps, service_s, servers, arrival_cv=arrival_cv, service_cv=service_cv)
    if mean_s == inf:
        return 1.0
    delayed = erlang_c(servers, rate_rps * service_s)
    return delayed * exp(-patience_s * delayed / mean_s) if mean_s > 0 else 0.0

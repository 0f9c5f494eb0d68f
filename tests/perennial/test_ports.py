"""Ports stay free until the service listens, and while it is away."""

from __future__ import annotations

import socket

import pytest

from perennial import ports


def test_no_outgoing_connection_can_be_given_the_port() -> None:
    first = ports._first_outgoing()
    if first < 12_000:
        pytest.skip("this system gives low ports to outgoing connections")
    assert all(10_000 <= ports.free_port() < first for _ in range(200))


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        drawn = iter([busy, busy, ports.free_port()])
        monkeypatch.setattr(ports.random, "randrange", lambda low, high: next(drawn))
        assert ports.free_port() != busy


def test_without_a_range_of_its_own_any_free_port_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_first_outgoing", lambda: 1024)
    with socket.create_server(("127.0.0.1", ports.free_port())):
        pass

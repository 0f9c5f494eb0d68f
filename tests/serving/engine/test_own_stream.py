"""Streams are not shared, and are used again."""

from __future__ import annotations

import gc
from collections import defaultdict
from typing import Any

import pytest
import torch

from serving.engine.own_stream import own_stream


class Owner:
    pass


def test_a_stream_has_one_owner_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The framework would hand out the first one again after 32; here it is never asked for more than are in use."""
    made: list[Any] = []

    def make(device: torch.device, priority: int) -> object:
        made.append((device, priority, object()))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr("serving.engine.own_stream._idle", defaultdict(list))
    device = torch.device("meta")  # nobody else's here
    lasting = Owner()
    kept = own_stream(lasting, device)
    for _ in range(100):
        passing = Owner()
        assert own_stream(passing, device) is not kept
        del passing
        gc.collect()
    assert len(made) == 2
    urgent = own_stream(lasting, device, priority=-1)
    assert urgent not in made[:2]
    assert [priority for _, priority, _ in made] == [0, 0, -1]

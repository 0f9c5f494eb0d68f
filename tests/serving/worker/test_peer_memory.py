from __future__ import annotations

import torch

from serving.worker.peer_memory import Sight, tensor_at


def test_what_lies_at_an_address_is_seen_in_place() -> None:
    whole = torch.arange(24.0).view(4, 6)
    part = whole[1:3, 2:5]
    sight = Sight(b"", 0, tuple(part.shape), tuple(part.stride()))
    seen = tensor_at(part.data_ptr(), sight, torch.float32, torch.device("cpu"))
    assert torch.equal(seen, part)
    whole[2, 4] = -1.0
    assert seen[1, 2] == -1.0
    del seen
    assert torch.equal(whole[0], torch.arange(6.0))  # nobody freed it

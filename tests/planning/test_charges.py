"""Charges by name: what is told replaces what was measured, and nothing else passes."""

from __future__ import annotations

import pytest

from data.errors import InvalidInput
from planning.charges import Traffic, charged
from planning.simulation.serving_perennial import Charges


def test_what_is_not_named_stays_as_measured() -> None:
    assert charged({}) == (Charges(), Traffic())
    charges, traffic = charged({"cut_s": 2.5, "background": 1.0, "link_bytes_per_s": 1e9, "usd_per_gb": 0.02})
    assert charges == Charges(cut_s=2.5, background=1.0)
    assert traffic == Traffic(1e9, 0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [("slowdown", 0.9), ("background", 0.0), ("background", 1.1), ("cut_s", -1.0), ("link_bytes_per_s", 0.0)],
)
def test_impossible_values_are_refused_with_the_way_out(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"{name} cannot be {value:g}; give"):
        charged({name: value})


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="not charged for arranger; known are start_s"):
        charged({"arranger": 0.0})

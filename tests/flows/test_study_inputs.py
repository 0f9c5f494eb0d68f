"""From files, names and numbers to a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import InvalidInput
from flows.study_inputs import EvaluateRequest, make_study
from tests.planning.test_costs import profile

pytestmark = pytest.mark.slow  # solves policies, with kernels to compile


def test_the_defaults_are_a_study_of_the_published_profile() -> None:
    study = make_study(EvaluateRequest())
    assert study.model.name == "GPT-20B"
    assert (study.model.rate_rps, study.model.required_rps, study.seeds) == (0.35, 0.4, 3)
    assert list(study.traces) == ["calm", "stormy"]
    assert all(4 <= trace.least <= trace.most <= 10 for trace in study.traces.values())
    assert study.traces["stormy"].counts != study.traces["calm"].counts


def test_a_workload_is_stretched_to_the_rate_and_gives_the_lengths(tmp_path: Path) -> None:
    profile().write(tmp_path / "profile")
    rows = "".join(f"{10 * index},{100 + index % 2},{20}\n" for index in range(200))
    (tmp_path / "work.csv").write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    request = EvaluateRequest(
        profile=str(tmp_path / "profile"), workload=str(tmp_path / "work.csv"), rate_rps=2.0, duration_s=50.0, seeds=4
    )
    study = make_study(request)
    assert study.recorded_s is not None
    assert np.allclose(study.recorded_s, np.arange(100) / 2)
    assert study.seeds == 1
    assert study.model.rate_rps == pytest.approx(2.0)
    assert study.model.costs.kv_bytes == pytest.approx(2 * 4 * 8 * 4 * 8 * (100 + 20))
    with pytest.raises(InvalidInput, match="fewer than two requests"):
        make_study(request.model_copy(update={"rate_rps": None, "duration_s": 5.0}))


def test_lengths_are_asked_for_with_a_profile_only() -> None:
    with pytest.raises(InvalidInput, match="other lengths need --profile"):
        make_study(EvaluateRequest(input_tokens=10))

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import CorruptData, InvalidInput
from data.workload import Request, Workload, read_azure, read_burstgpt, read_mooncake, read_workload

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
COMPACT = "arrival_s,input_tokens,output_tokens\n0.0,374,44\n4.314579,396,109\n"
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}

{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 2353]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,API log
120,GPT-4,417,0,417,API log
"""
TRACES = Path(__file__).parents[2] / ".." / "shared" / "data"
traces = pytest.mark.skipif(not TRACES.exists(), reason=f"the public traces are not at {TRACES}")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        return path

    return write


Write = Callable[[str, str], Path]


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
@pytest.mark.parametrize("content", [AZURE, COMPACT, "\ufeff" + AZURE, AZURE.replace("\n", "\r\n")])
def test_azure_as_published_and_compact(file: Write, name: str, content: str) -> None:
    workload = read_workload(file(name, content))
    assert workload.name == "trace"
    assert [astuple(one)[1:] for one in workload.requests] == [(374, 44), (396, 109)]
    assert workload.duration_s == pytest.approx(4.314579)


def test_azure_with_a_time_zone_and_out_of_order(file: Write) -> None:
    rows = "2024-05-10 00:00:02+00:00,3,4\n2024-05-10 00:00:00.5+00:00,1,2\n"
    workload = read_azure(file("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert workload.requests == (Request(0.0, 1, 2), Request(1.5, 3, 4))


def test_mooncake_lines(file: Write) -> None:
    workload = read_workload(file("t.jsonl", MOONCAKE))
    assert [astuple(one)[1:] for one in workload.requests] == [(6955, 52), (6472, 26)]
    assert workload.duration_s == pytest.approx(3.053)


def test_mooncake_ticks_are_spread(file: Write) -> None:
    ticks = [0.0] * 5 + [2.999] * 4 + [6.001] * 6
    rows = "".join(f"{tick},{100 + index},1,2,0\n" for index, tick in enumerate(ticks))
    path = file("t.csv", "arrival_s,input_tokens,output_tokens,prefix_blocks_512,blocks_seen_before\n" + rows)
    workload = read_workload(path)
    assert [request.input_tokens for request in workload.requests] == [100 + index for index in range(15)]
    assert [int(request.arrival_s // 3) for request in workload.requests] == [0] * 5 + [1] * 4 + [2] * 6
    assert len({request.arrival_s for request in workload.requests}) == 15
    assert read_mooncake(path) == workload
    assert [request.arrival_s for request in read_mooncake(path, tick_s=7).requests] == ticks


def test_burstgpt_leaves_failures_out_and_selects(file: Write) -> None:
    path = file("t.csv", BURSTGPT)
    assert read_workload(path).requests == (Request(0, 472, 18), Request(40, 1087, 230), Request(113, 417, 276))
    assert read_burstgpt(path, model="GPT-4").requests == (Request(0, 417, 276),)
    assert len(read_burstgpt(path, log_type="Conversation log").requests) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", AZURE + "yesterday,1,2\n", "line 4: TIMESTAMP 'yesterday'"),
        ("t.csv", AZURE + "2023-11-16 18:15:51,1\n", "line 4: 2 fields where the header has 3"),
        ("t.csv", COMPACT + "9,0,1\n", "line 4: input_tokens must be at least 1, not 0"),
        ("t.csv", COMPACT + "9,1.5,1\n", "line 4: input_tokens must be a whole number"),
        ("t.csv", COMPACT + "nan,1,1\n", "line 4: arrival_s must be at least 0, not nan"),
        ("t.csv", COMPACT + "9,many,1\n", "line 4: input_tokens is not a number"),
        ("t.csv", "a,b\n1,2\n", "line 2: arrival_s is not a number"),
        ("t.csv", "arrival_s,input_tokens,output_tokens\n", "no requests"),
        ("t.csv", "", "no requests"),
        ("t.csv", COMPACT + '9,"1,1\n', "cannot be read"),
        ("t.csv", BURSTGPT + "-1,GPT-4,1,1,2,API log\n", "line 6: Timestamp must be at least 0"),
        ("t.jsonl", MOONCAKE + "{\n", "line 4: not JSON"),
        ("t.jsonl", MOONCAKE + "[1]\n", "line 4: timestamp is not a number"),
        ("t.jsonl", MOONCAKE + '{"timestamp": 1, "input_length": 1}\n', "line 4: output_length is not a number"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(file: Write, name: str, content: str, words: str) -> None:
    path = file(name, content)
    with pytest.raises(CorruptData, match=words) as error:
        read_workload(path)
    assert str(path) in str(error.value)


def test_damaged_files(file: Write, tmp_path: Path) -> None:
    path = file("t.csv.gz", COMPACT + "9,1,1\n" * 50)
    path.write_bytes(path.read_bytes()[:-12])
    (tmp_path / "x.csv.gz").write_bytes(b"not gzip")
    (tmp_path / "y.csv").write_bytes(b"arrival_s,\xff\xfe\n")
    for damaged in (path, tmp_path / "x.csv.gz", tmp_path / "y.csv", tmp_path / "absent.csv"):
        with pytest.raises(CorruptData, match="cannot be read"):
            read_workload(damaged)


@traces
@pytest.mark.parametrize(
    ("name", "requests", "rate_rps", "cv", "inputs", "outputs"),
    [
        ("azure_llm_2023_code", 8819, 2.57, 13.2, (1469, 5188, 7436), (13, 55, 251)),
        ("azure_llm_2023_conv", 19366, 5.53, 1.09, (1020, 2734, 4142), (129, 424, 601)),
        ("mooncake_fast25_conversation", 12031, 3.40, 1.01, (6909, 27367, 85400), (350, 597, 1119)),
        ("mooncake_fast25_synthetic", 3993, 3.91, 1.01, (11587, 38611, 66456), (69, 389, 768)),
    ],
)
def test_public_traces_have_the_known_statistics(
    name: str, requests: int, rate_rps: float, cv: float, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    workload = read_workload(TRACES / f"{name}.csv.gz")
    assert len(workload.requests) == requests
    assert workload.rate_rps == pytest.approx(rate_rps, rel=2e-3)
    assert workload.cv == pytest.approx(cv, rel=5e-3)
    for measured, known in ((workload.input_tokens, inputs), (workload.output_tokens, outputs)):
        assert (measured.p50, measured.p90, measured.p99) == pytest.approx(known, abs=1)


arrivals = st.lists(st.floats(0, 1e4), min_size=2, max_size=50).map(sorted)


@given(arrivals, st.floats(0.1, 10))
def test_scaling_changes_the_rate_and_not_the_cv(times: list[float], factor: float) -> None:
    workload = Workload("w", tuple(Request(time, 1, 1) for time in times))
    scaled = workload.scaled(factor)
    assert scaled.rate_rps == pytest.approx(workload.rate_rps * factor, rel=1e-6)
    assert scaled.cv == pytest.approx(workload.cv, rel=1e-6, abs=1e-9)


def test_a_workload_without_gaps_has_no_rate() -> None:
    for workload in (Workload("w", ()), Workload("w", (Request(1.0, 1, 1),)), Workload("w", (Request(1.0, 1, 1),) * 3)):
        assert (workload.rate_rps, workload.cv, workload.duration_s) == (0, 0, 0)
    with pytest.raises(InvalidInput, match="no requests"):
        _ = Workload("w", ()).input_tokens


def test_the_first_seconds() -> None:
    workload = Workload("w", tuple(Request(float(time), 1, 1) for time in range(5)))
    assert workload.first(2.0) == replace(workload, requests=workload.requests[:2])


def test_workloads_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="sorted by arrival"):
        Workload("w", (Request(1, 1, 1), Request(0, 1, 1)))
    with pytest.raises(InvalidInput, match="at least one token"):
        Request(0, 1, 0)
    with pytest.raises(InvalidInput, match="positive factor"):
        Workload("w", ()).scaled(0)

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.catalog import model_shape
from data.errors import CorruptData, InvalidInput
from data.fingerprint import Fingerprint
from data.profile import LINKS, STEPS, Profile

FINGERPRINT = Fingerprint.of(
    device="cpu",
    devices=2,
    cpu="x86",
    cores=2,
    memory_bytes=1 << 33,
    os="Linux",
    python="3.11",
    torch="2.13.0",
    extra={"numpy": "2", "driver": "none"},
)
STEP: dict[str, Any] = {
    "phase": "decode",
    "part": "layers",
    "layers": 4,
    "shards": 2,
    "batch": 1,
    "tokens": 1,
    "context": 32,
    "time_ms": 1.25,
    "spread_ms": 0.1,
    "repeats": 9,
}
LINK: dict[str, Any] = {"kind": "network", "bytes": 1 << 40, "time_ms": 0.1, "repeats": 5}
PROFILE = Profile.of(model_shape("qwen3-8b"), FINGERPRINT, [STEP, {**STEP, "time_ms": 1 / 3}], [LINK])


def test_a_profile_survives_the_disk(tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "deep" / "profile")
    read = Profile.read(tmp_path / "deep" / "profile")
    assert read == PROFILE
    assert read.sha256 == PROFILE.sha256
    assert read.steps.schema == STEPS
    assert read.links.schema == LINKS


def test_writing_again_replaces(tmp_path: Path) -> None:
    PROFILE.write(tmp_path)
    other = Profile.of(PROFILE.model, FINGERPRINT, [STEP], [])
    other.write(tmp_path)
    assert Profile.read(tmp_path) == other


def test_the_checksum_covers_every_part() -> None:
    others = [
        replace(PROFILE, model=model_shape("qwen3-32b")),
        replace(PROFILE, fingerprint=replace(FINGERPRINT, cores=3)),
        replace(PROFILE, steps=PROFILE.steps.slice(1)),
        replace(PROFILE, links=PROFILE.links.slice(1)),
    ]
    assert len({profile.sha256 for profile in (PROFILE, *others)}) == 5


def test_the_checksum_does_not_depend_on_chunks() -> None:
    chunked = pa.concat_tables([PROFILE.steps.slice(0, 1), PROFILE.steps.slice(1)])
    assert replace(PROFILE, steps=chunked).sha256 == PROFILE.sha256


@pytest.mark.parametrize("name", ["steps.parquet", "links.parquet", "profile.json"])
@pytest.mark.parametrize("keep", [0, 10, -5])
def test_a_truncated_file_is_corrupt(tmp_path: Path, name: str, keep: int) -> None:
    PROFILE.write(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:keep])
    with pytest.raises(CorruptData):
        Profile.read(tmp_path)


@pytest.mark.parametrize("name", ["steps.parquet", "links.parquet", "profile.json"])
def test_an_absent_file_is_corrupt(tmp_path: Path, name: str) -> None:
    PROFILE.write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorruptData, match=r"measure the profile|perennial profile"):
        Profile.read(tmp_path)


def test_tables_of_another_profile_are_noticed(tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "a")
    Profile.of(PROFILE.model, FINGERPRINT, [STEP], [LINK]).write(tmp_path / "b")
    (tmp_path / "b" / "steps.parquet").replace(tmp_path / "a" / "steps.parquet")
    with pytest.raises(CorruptData, match="checksum"):
        Profile.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "newer version"),
        ({"fingerprint": {}}, "fingerprint lacks"),
        ({"model": {}}, "cannot be read"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
def test_the_header_is_checked(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    PROFILE.write(tmp_path)
    header = json.loads((tmp_path / "profile.json").read_bytes())
    (tmp_path / "profile.json").write_text(json.dumps({**header, **change}))
    with pytest.raises(CorruptData, match=words):
        Profile.read(tmp_path)


@pytest.mark.parametrize(
    ("steps", "links", "words"),
    [
        ([{**STEP, "phase": "warm-up"}], [], "phase 'warm-up'"),
        ([{**STEP, "part": "attention"}], [], "part 'attention'"),
        ([], [{**LINK, "kind": "pigeon"}], "kind 'pigeon'"),
        ([{**STEP, "colour": 1}], [], "needs the columns"),
        ([], [{**LINK, "bytes": "many"}], "wrong type"),
    ],
)
def test_measurements_are_checked(steps: list[dict[str, Any]], links: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Profile.of(PROFILE.model, FINGERPRINT, steps, links)


def test_a_table_needs_the_schema() -> None:
    with pytest.raises(InvalidInput, match="links table"):
        replace(PROFILE, links=PROFILE.steps)


def test_a_fingerprint_is_its_fields() -> None:
    assert Fingerprint.from_json(FINGERPRINT.to_json()) == FINGERPRINT
    assert FINGERPRINT.extra == (("driver", "none"), ("numpy", "2"))
    assert replace(FINGERPRINT, torch="2.14.0").sha256 != FINGERPRINT.sha256

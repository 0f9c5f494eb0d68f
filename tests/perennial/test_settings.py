import stat
from pathlib import Path

import pytest

from data.errors import CorruptData, InvalidInput
from perennial.settings import Settings, load_settings
from serving.settings import EngineSettings, ServingSettings, dump, load


def test_everything_is_under_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path / "home"))
    settings = load_settings()
    serving = settings.serving(checkpoint="model")
    for path in (serving.journal, serving.ready_file, settings.token_file, settings.plans, settings.profiles):
        assert Path(path).is_relative_to(tmp_path / "home")
    assert settings.registry_uri == f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"
    assert serving.host == "127.0.0.1"


def test_the_join_token_is_made_once_and_is_private(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    token = settings.join_token()
    assert len(token) >= 24
    assert settings.join_token() == token == settings.serving(checkpoint="model").token
    assert stat.S_IMODE(settings.token_file.stat().st_mode) == 0o600


def test_an_empty_join_token_is_an_error(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.token_file.write_text("")
    with pytest.raises(CorruptData, match="delete it"):
        settings.join_token()


def test_sections_are_overridden_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    monkeypatch.setenv("PERENNIAL_TIMEOUTS", '{"lease_s": 9.5}')
    monkeypatch.setenv("PERENNIAL_ENGINE", '{"step_tokens": 32}')
    serving = load_settings().serving(checkpoint="model", engine=EngineSettings(device="cuda"))
    assert serving.timeouts.lease_s == 9.5
    assert (serving.engine.step_tokens, serving.engine.device) == (32, "cuda")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PERENNIAL_TIMEOUTS", '{"least_s": 1}', "has no setting least_s"),
        ("PERENNIAL_CAPACITY", '{"queue": 1.5}', "PERENNIAL_CAPACITY is not valid"),
        ("PERENNIAL_TIMEOUTS", "soon", "is not valid"),
        ("PERENNIAL_DEBUG", "perhaps", "PERENNIAL_DEBUG is not valid"),
    ],
)
def test_a_wrong_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput, match=message):
        load_settings().serving(checkpoint="model")


def test_a_dtype_that_nothing_computes_in_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(dump(ServingSettings(checkpoint="c", journal="j", token="t", engine=EngineSettings(dtype="int3"))))
    with pytest.raises(InvalidInput, match="'int3' is unknown; choose float32, bfloat16 or float16"):
        load(str(path))

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.canonical import canonical_json
from data.plan import PlanBook
from perennial import cli
from perennial.testing import given_plans
from serving.engine.checkpoint import create_checkpoint


def perennial(
    home: Path, *arguments: str, timeout_s: float = 60.0, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PERENNIAL_HOME": str(home), "PYTHONPATH": os.getcwd(), **variables}
    command = [sys.executable, "-m", "perennial.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    create_checkpoint(str(path), family="llama", layers=2, hidden=32, ffn=64)
    return path


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['perennial', '--help']\n"
        "from perennial import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'scipy', 'pyarrow', 'prefect', 'mlflow', 'grpc', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    commands = "demo make-checkpoint profile plan plan-groups plans serve agent generate notify status drain"
    assert all(command in done.stdout for command in commands.split())


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["bogus"], 2, "No such command"),
        (["notify", "i0", "soon"], 2, "number"),
        (["status"], 1, "start one with `perennial serve`"),
        (["generate", "hello"], 1, "no service runs in"),
        (["generate", "hello", "--resume-from", "3"], 2, "needs the --request-id"),
        (["demo", "--device", "abacus"], 2, "--device takes cpu or cuda"),
        (["demo", "--device", "cuda"], 2, "this demo needs 2 GPUs"),
        (["serve", "--checkpoint", "nowhere"], 2, "is not a checkpoint"),
        (["serve", "--checkpoint", "nowhere", "--token-file", "away"], 2, "cannot read a join token from away"),
        (["agent", "--checkpoint", ".", "--type", "x", "--controller", "here"], 2, "takes host:port"),
        (["agent", "--checkpoint", "nowhere", "--type", "x", "--controller", "h:1"], 2, "is not a checkpoint"),
        (["plan-groups", "nowhere", "--checkpoint", "a=nowhere", "--out", "x"], 2, "is not a checkpoint"),
        (["make-checkpoint", "model", "--family", "rnn"], 2, "rnn"),
    ],
)
def test_errors_are_sentences(tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    if arguments[-1] == "cuda":
        import torch

        if torch.cuda.device_count() >= 2:
            pytest.skip("this machine has the GPUs that the error is about")
    if arguments[0] == "make-checkpoint":
        arguments = [arguments[0], str(tmp_path / arguments[1]), *arguments[2:]]
    done = perennial(tmp_path / "home", *arguments)
    assert done.returncode == code, done.stderr
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_agent_hands_its_notice_sources_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["--checkpoint", str(tmp_path), "--type", "x", "--controller", "127.0.0.1:1", "--notices", "aws,oracle"]
    done = perennial(tmp_path, "agent", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'oracle' is no source of notices" in done.stderr


def test_a_wrong_variable_is_a_usage_error_and_debug_shows_where(tmp_path: Path) -> None:
    wrong = '{"least_s": 1}'
    done = perennial(tmp_path, "status", PERENNIAL_DEBUG="perhaps")
    assert (done.returncode, "PERENNIAL_DEBUG" in done.stderr) == (2, True)
    done = perennial(
        tmp_path, "--debug", "agent", "--checkpoint", ".", "--type", "x", "--controller", "", PERENNIAL_TIMEOUTS=wrong
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_make_checkpoint_writes_once(tmp_path: Path) -> None:
    path = tmp_path / "model"
    size = ["--layers", "1", "--hidden", "32", "--ffn", "64"]
    done = perennial(tmp_path, "make-checkpoint", str(path), *size)
    assert done.returncode == 0, done.stderr
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 1
    again = perennial(tmp_path, "make-checkpoint", str(path), *size)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


def spoiled(book: PlanBook, fault: str) -> bytes:
    if fault == "checksum":
        return book.to_bytes().replace(b'"max_batch":8', b'"max_batch":9')
    if fault == "schema":
        return canonical_json({**json.loads(book.to_bytes()), "schema_version": 99})
    return book.to_bytes()[:-20]


@pytest.mark.parametrize(
    ("fault", "sentence"), [("checksum", "checksum is wrong"), ("schema", "newer version"), ("cut", "is not JSON")]
)
def test_serve_refuses_a_damaged_plan(tmp_path: Path, checkpoint: Path, fault: str, sentence: str) -> None:
    from serving.engine.weights import read_spec

    plan = tmp_path / "plan.json"
    plan.write_bytes(spoiled(given_plans(read_spec(str(checkpoint)), {1: "1x1x1"}), fault))
    done = perennial(tmp_path, "serve", "--checkpoint", str(checkpoint), "--plan", str(plan), "--local", "1")
    assert done.returncode == 1, done.stderr
    assert sentence in " ".join(done.stderr.split())


def test_a_bug_is_said_to_be_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("1/0")

    monkeypatch.delenv("PERENNIAL_DEBUG", raising=False)
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "a bug" in capsys.readouterr().err

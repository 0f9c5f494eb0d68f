"""Regenerates the protobuf and gRPC stubs: `python -m serving.api.generate [--check]`.

Needs grpcio-tools (a development dependency). The stubs are committed, so running the service does not.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

API = Path(__file__).parent
PROTO = API / "proto"
GENERATED = API / "generated"
_PACKAGE = "serving.api.generated"
_SIBLING = re.compile(r"^from (?:perennial\.v1|ray\.rpc) import (\w+_pb2)", re.MULTILINE)


def main() -> int:
    """Write the stubs, or with `--check` only compare them; 1 if they are not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="verify instead of writing")
    stubs = render()
    if parser.parse_args().check:
        stale = outdated(stubs)
        sys.stderr.write("".join(f"{name} is not current: run python -m serving.api.generate\n" for name in stale))
        return 1 if stale else 0
    for name, text in stubs.items():
        (GENERATED / name).write_text(text)
    return 0


def outdated(stubs: dict[str, str]) -> list[str]:
    """Names of committed stubs that differ from `stubs`, are missing, or have no source any more."""
    committed = {path.name: path.read_text() for path in GENERATED.glob("*_pb2*.py*")}
    names = committed.keys() | stubs.keys()
    return sorted(name for name in names if committed.get(name) != stubs.get(name))


def render() -> dict[str, str]:
    """File name → text of every stub, with imports that are absolute in this package."""
    from grpc_tools import protoc

    sources = [str(path) for path in sorted(PROTO.rglob("*.proto"))]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        includes = [f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}"]
        if protoc.main(["protoc", *includes, *outputs, *sources]):
            raise SystemExit("protoc failed; its message is above")
        return {path.name: _absolute(path.read_text()) for path in sorted(Path(folder).rglob("*_pb2*.py*"))}


def _absolute(text: str) -> str:
    return _SIBLING.sub(rf"from {_PACKAGE} import \1", text)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.fidelity.alone SCRIPT SEED FILE`: play one script and append it to a file of recorded runs.

A process of its own, so that the fleet, its clients and what samples them can be confined to some processors.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

from benchmarks.fidelity.play import play
from benchmarks.fidelity.recording import Recorded, Recording, SharedRecording, append
from benchmarks.fidelity.scripts import SCRIPTS, Script
from benchmarks.fidelity.shared_play import play_shared
from benchmarks.fidelity.shared_scripts import MODELS, SHARED_SCRIPTS, SharedScript
from perennial.demo.setting import CPU
from perennial.nursery import Nursery
from perennial.processes import Start
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint
from serving.errors import PerennialError
from serving.lifeline import watch_stdin

NAMED: dict[str, Script | SharedScript] = {one.name: one for one in (*SCRIPTS, *SHARED_SCRIPTS)}


def main(arguments: list[str]) -> int:
    """0 if the run was recorded."""
    name, seed, path = arguments
    watch_stdin()  # whoever plays several fleets holds the other side
    # a killed instance makes gRPC and asyncio complain; the results say what matters
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="perennial-fidelity-") as folder, Nursery(Path(folder)) as nursery:
        try:
            append(Path(path), asyncio.run(_record(NAMED[name], int(seed), Path(folder), nursery.start)))
        except (PerennialError, TimeoutError, OSError, ExceptionGroup) as error:
            print(f"{name}, seed {seed}: {error!r}", file=sys.stderr)
            return 1
    return 0


async def _record(script: Script | SharedScript, seed: int, folder: Path, start: Start) -> Recorded:
    home, machine = folder / "fleet", this_machine().to_json()
    if isinstance(script, Script):
        create_checkpoint(str(folder / "model"), seed=0, **CPU.model)
        return Recording(script.name, seed, machine, *await play(script, seed, str(folder / "model"), home, start))
    checkpoints = create_models(folder, list(script.shapes))
    return SharedRecording(script.name, seed, machine, await play_shared(script, seed, checkpoints, home, start))


def create_models(folder: Path, names: list[str]) -> dict[str, str]:
    """Checkpoints of the models of scripts, by name."""
    for number, name in enumerate(names):
        create_checkpoint(str(folder / name), seed=number, **MODELS[name])
    return {name: str(folder / name) for name in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

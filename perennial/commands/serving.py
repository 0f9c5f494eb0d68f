"""`perennial serve` and `perennial agent`: the processes of the service."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; empty: the device's usual one.")]
TokenFile = Annotated[Path | None, typer.Option(help="Join token; by default the one of this home.")]
Checkpoint = Annotated[
    list[str], typer.Option(help="Folder of a Hugging Face checkpoint; for several models NAME=FOLDER, repeated.")
]
InstanceType = Annotated[str, typer.Option("--type", help="Instance type, as the plan book names it.")]
Devices = Annotated[int, typer.Option(min=1, help="Devices of each instance.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(serve)
    app.command()(agent)


def serve(
    checkpoint: Checkpoint,
    plan: Annotated[Path | None, typer.Option(help="Serve this plan book.")] = None,
    registry: Annotated[str, typer.Option(help="MLflow URI; by default the registry of this home.")] = "",
    model: Annotated[str, typer.Option(help="Registered plan whose champion is followed; may be left out.")] = "",
    local: Annotated[int, typer.Option(min=0, help="Instances to run on this machine.")] = 0,
    devices: Devices = 1,
    type_name: InstanceType = "",
    device: Device = "cpu",
    dtype: Dtype = "",
    kv_memory_mb: Annotated[
        int, typer.Option(min=0, help="Memory for KV on each device; 0: 64 on cpu, a quarter of the device on cuda.")
    ] = 0,
    host: Annotated[str, typer.Option(help="Address of this machine to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC; 0: a free one.")] = 50051,
    control_port: Annotated[int, typer.Option(min=0, max=65535, help="For agents; 0: a free one.")] = 0,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus; 0: a free one.")] = 0,
    token_file: TokenFile = None,
    leave_agents: Annotated[
        bool,
        typer.Option("--leave-agents", help="Drain and dismiss nobody at the end: the next start goes on."),
    ] = False,
) -> None:
    """Serve checkpoints by a plan book; Ctrl-C drains, a second one stops at once."""
    from perennial.serve import ServeOptions, run
    from perennial.settings import read_token

    sys.exit(
        run(
            ServeOptions(
                checkpoint=checkpoint,
                plan=plan,
                registry=registry,
                model=model,
                local=local,
                devices=devices,
                type_name=type_name,
                device=device,
                dtype=dtype,
                kv_memory_bytes=kv_memory_mb << 20,
                host=host,
                port=port,
                control_port=control_port,
                metrics_port=metrics_port,
                token=read_token(token_file) if token_file else "",
                leave_agents=leave_agents,
            )
        )
    )


def agent(
    controller: Annotated[str, typer.Option(help="host:port of the controller's control address.")],
    checkpoint: Checkpoint,
    type_name: InstanceType,
    instance: Annotated[str, typer.Option(help="Name of this instance.")] = socket.gethostname(),
    devices: Devices = 1,
    device: Device = "cpu",
    dtype: Dtype = "",
    host: Annotated[
        str, typer.Option(help="Address of this machine at which the workers of others reach its.")
    ] = "127.0.0.1",
    token_file: TokenFile = None,
    zone: Annotated[str, typer.Option(help="Where this machine is; copies of its KV are kept in another zone.")] = "",
    notices: Annotated[
        str, typer.Option(help="Who announces the end: aws, gcp, azure, ray, file:PATH; separated by commas.")
    ] = "",
    grace_s: Annotated[float, typer.Option(help="Seconds left at SIGTERM, or when a notice does not say.")] = 30.0,
) -> None:
    """Join this machine to a service as one instance. SIGTERM is a preemption notice."""
    from data.errors import InvalidInput
    from perennial.models import checkpoint_fields
    from perennial.settings import load_settings, read_token
    from serving.settings import EngineSettings, dump, usual_dtype

    settings = load_settings()
    if not controller.rpartition(":")[2].isdigit():
        raise InvalidInput(f"--controller takes host:port, not {controller!r}")
    models = checkpoint_fields(checkpoint)
    configuration = settings.serving(
        **models,
        host=host,
        token=read_token(token_file) if token_file else settings.join_token(),
        engine=EngineSettings(device=device, dtype=dtype or usual_dtype(device)),
    )
    file = settings.service / f"agent-{instance}.json"
    file.touch(0o600)
    file.write_bytes(dump(configuration))
    command = [sys.executable, "-m", "serving.agent", "--settings", str(file.absolute()), "--instance", instance]
    command += ["--type", type_name, "--devices", str(devices), "--controller", controller]
    command += ["--zone", zone, "--notices", notices, "--grace-s", str(grace_s)]
    # The agent takes the place of this process, so that its signals and its exit code are those of the command.
    os.execv(sys.executable, command)

"""What `perennial serve` does: start the service, keep its controller alive, drain at the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data.cluster import ClusterSpec
from data.errors import InvalidInput
from perennial.fleet import Fleet, with_ports
from perennial.models import checkpoint_fields
from perennial.settings import Settings, load_settings
from serving.errors import PerennialError
from serving.settings import EngineSettings, ServingSettings, usual_dtype

_POLL_S = 0.2
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_STABLE_S = 60.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of `perennial serve`."""

    checkpoint: list[str]
    plan: Path | None
    registry: str
    model: str
    local: int
    devices: int
    type_name: str
    device: str
    dtype: str
    kv_memory_bytes: int
    host: str
    port: int
    control_port: int
    metrics_port: int
    token: str
    leave_agents: bool


def usual_kv_bytes(device: str, cluster: ClusterSpec) -> int:
    """Memory for KV on each device: 64 MB on cpu; on cuda a quarter of the smallest device that the plan counts with.

    While a layout is changed, weights and caches of the old and the new one are in memory together.
    """
    if device == "cpu":
        return EngineSettings().kv_memory_bytes
    return min(kind.memory_bytes for kind in cluster.types) // 4


def run(options: ServeOptions) -> int:
    """Serve until a signal; returns the exit code."""
    settings = load_settings()
    usual_dtype(options.device)  # a wrong device is said before a plan is looked for
    models = checkpoint_fields(options.checkpoint)
    if options.leave_agents and not options.control_port:
        raise InvalidInput("agents find the next controller at the same port: --leave-agents needs a --control-port")
    source = _source(options, settings)
    cluster = _cluster_of(source)
    fleet = Fleet(
        with_ports(_configuration(options, settings, models, source, cluster)),
        home=settings.service,
        instance_type=options.type_name or cluster.types[0].name,
        devices_per_instance=options.devices,
    )
    return asyncio.run(_serve(fleet, options.local))


def _configuration(
    options: ServeOptions, settings: Settings, models: dict[str, Any], source: dict[str, str], cluster: ClusterSpec
) -> ServingSettings:
    engine = EngineSettings(
        device=options.device,
        dtype=options.dtype or usual_dtype(options.device),
        kv_memory_bytes=options.kv_memory_bytes or usual_kv_bytes(options.device, cluster),
    )
    return settings.serving(
        engine=engine,
        **models,
        **source,
        **({"token": options.token} if options.token else {}),
        host=options.host,
        grpc_port=options.port,
        control_port=options.control_port,
        metrics_port=options.metrics_port,
        dismiss=not options.leave_agents,
    )


def _source(options: ServeOptions, settings: Settings) -> dict[str, str]:
    """Where the plan book comes from, as fields of `ServingSettings`: a file, or a registered plan."""
    if options.plan is None:
        uri = options.registry or settings.registry_uri
        return {"registry": uri, "registry_model": options.model or _only_plan(options, settings)}
    if not options.plan.is_file():
        raise InvalidInput(f"there is no plan book {options.plan}; make one with `perennial plan`")
    return {"plan": str(options.plan.absolute())}


def _only_plan(options: ServeOptions, settings: Settings) -> str:
    """The registered plan for this checkpoint's model, or these models, if there is just one."""
    from data.shared_plan import fleet_title
    from flows.registry import Registry, plan_name
    from serving.engine.weights import read_spec

    several = checkpoint_fields(options.checkpoint).get("checkpoints")
    title = fleet_title(several) if several else read_spec(options.checkpoint[0]).name
    prefix = plan_name(title, "x").removesuffix("x")
    registry = Registry(options.registry or settings.registry_uri, settings.home / "mlflow-artifacts")
    names = sorted({one.name for one in registry.list_plans() if one.name.startswith(prefix)})
    if len(names) != 1:
        known = f"choose one with --model: {', '.join(names)}" if names else "make one with `perennial plan`"
        raise InvalidInput(f"{len(names)} registered plans are for {title}; {known}, or serve a file with --plan")
    return names[0]


def _cluster_of(source: dict[str, str]) -> ClusterSpec:
    """The fleet that the plan book was made for."""
    from serving.controller.plans import PlanSource, read_plan_file

    if "plan" in source:
        return read_plan_file(Path(source["plan"])).cluster
    found = PlanSource(source["registry"], source["registry_model"], "champion").poll()
    if found is None:
        raise PerennialError(f"no plan is champion in {source['registry']}; promote one with `perennial plans promote`")
    return found[0].cluster


async def _serve(fleet: Fleet, local: int) -> int:
    console, stopping = Console(), asyncio.Event()
    again = asyncio.Event()

    def stop() -> None:
        (again if stopping.is_set() else stopping).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        with console.status("starting the controller and the instances"):
            await _until(fleet.start(local), stopping)
        if not stopping.is_set():
            _announce(console, fleet, local)
            await _watch(console, fleet, stopping)
            if fleet.settings.dismiss:  # otherwise requests go on after the next start
                await _drain(console, fleet, again)
    finally:
        left = await fleet.close()
    if left:
        console.print(f"[red]had to kill what did not end by itself: {'; '.join(left)}")
    return 1 if left else 0


def _announce(console: Console, fleet: Fleet, local: int) -> None:
    settings = fleet.settings
    console.print(
        f"serving {', '.join(settings.models.values())} at [bold]{fleet.address}[/bold] (gRPC), {local} local instances"
    )
    console.print(f"metrics at http://{settings.host}:{settings.metrics_port}/metrics")
    models = " ".join(f"--checkpoint {name}{'=' if name else ''}{path}" for name, path in settings.models.items())
    joining = f"--controller {settings.host}:{settings.control_port} {models}"
    console.print(f"agents join with: perennial agent {joining} --type {fleet.instance_type}", soft_wrap=True)
    console.print("Ctrl-C drains")


async def _watch(console: Console, fleet: Fleet, stopping: asyncio.Event) -> None:
    """Restart a controller that ended, say which instances ended, until told to stop."""
    loop, backoff_s = asyncio.get_running_loop(), _FIRST_BACKOFF_S
    started_at = loop.time()
    while not stopping.is_set():
        for name in await fleet.reap():
            console.print(f"instance {name} ended")
        controller = fleet.controller
        if controller is not None and not controller.alive:
            backoff_s = _FIRST_BACKOFF_S if loop.time() - started_at > _STABLE_S else backoff_s
            last = controller.tail(1) or f"exit code {controller.returncode}"
            console.print(f"[red]the controller ended ({last}); starting it again in {backoff_s:g} s")
            await _pause(stopping, backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            started_at = loop.time()
            if not stopping.is_set():
                await fleet.restart_controller()
        await _pause(stopping, _POLL_S)


async def _drain(console: Console, fleet: Fleet, again: asyncio.Event) -> None:
    timeout_s = fleet.settings.timeouts.drain_s
    with console.status(f"draining, at most {timeout_s:g} s (Ctrl-C again stops at once)"):
        async with fleet.client(give_up_s=2.0) as client:
            with contextlib.suppress(PerennialError):
                await _until(client.drain(timeout_s), again)


async def _until(work: object, event: asyncio.Event) -> None:
    """Do `work`, or stop doing it when the event comes."""
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        task.cancel()
        waiter.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


async def _pause(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)

"""What `perennial serve` does: start the service, keep its controller alive, drain at the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from data.errors import InvalidInput
from perennial.fleet import Fleet, with_ports
from perennial.models import checkpoint_fields
from perennial.settings import Settings, load_settings
from serving.errors import PerennialError
from serving.settings import EngineSettings, ServingSettings

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


def engine_settings(device: str, dtype: str, kv_memory_bytes: int) -> EngineSettings:
    """Engine settings of a device: float32 on cpu and bfloat16 on cuda unless `dtype` says otherwise."""
    if device not in ("cpu", "cuda"):
        raise InvalidInput(f"--device takes cpu or cuda, not {device!r}")
    usual = "bfloat16" if device == "cuda" else "float32"
    return EngineSettings(device=device, dtype=dtype or usual, kv_memory_bytes=kv_memory_bytes)


def run(options: ServeOptions) -> int:
    """Serve until a signal; returns the exit code."""
    settings = load_settings()
    configuration = _configuration(options, settings)
    fleet = Fleet(
        with_ports(configuration),
        home=settings.service,
        instance_type=options.type_name or _type_of(options, settings),
        devices_per_instance=options.devices,
    )
    return asyncio.run(_serve(fleet, options.local))


def _configuration(options: ServeOptions, settings: Settings) -> ServingSettings:
    models = checkpoint_fields(options.checkpoint)
    if options.plan is not None and not options.plan.is_file():
        raise InvalidInput(f"there is no plan book {options.plan}; make one with `perennial plan`")
    registry = {} if options.plan else {"registry": options.registry or settings.registry_uri}
    model = {} if options.plan else {"registry_model": options.model or _only_plan(options, settings)}
    return settings.serving(
        engine=engine_settings(options.device, options.dtype, options.kv_memory_bytes),
        **models,
        plan=str(options.plan.absolute()) if options.plan else "",
        host=options.host,
        grpc_port=options.port,
        control_port=options.control_port,
        metrics_port=options.metrics_port,
        **registry,
        **model,
    )


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


def _type_of(options: ServeOptions, settings: Settings) -> str:
    """The first instance type of the plan book."""
    from serving.controller.plans import PlanSource, read_plan_file

    if options.plan is not None:
        return read_plan_file(options.plan).cluster.types[0].name
    uri = options.registry or settings.registry_uri
    found = PlanSource(uri, options.model or _only_plan(options, settings), "champion").poll()
    if found is None:
        raise PerennialError(f"no plan is champion in {uri}; promote one with `perennial plans promote`")
    return found[0].cluster.types[0].name


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

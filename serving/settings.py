"""Every timeout, limit and address of the serving tier, with defaults that hold on two cores."""

from __future__ import annotations

import msgspec

from data.errors import InvalidInput


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. Each wait in the serving tier uses one of these and has a next step."""

    agent_heartbeat_s: float = 0.05
    agent_lease_s: float = 0.25  # a silent agent is lost after this, and its instance with it
    unacknowledged_s: float = 0.3  # the same for an agent's kernel, which no load on its machine can silence
    heartbeat_s: float = 0.25  # of workers
    lease_s: float = 5.0  # a silent worker is lost after this; torch may keep its interpreter busy for seconds
    stall_s: float = 1.0  # a replica that has work and does nothing is broken after this; on CUDA five times this
    join_s: float = 60.0  # process start → hello
    gather_s: float = 30.0  # waiting for the expected instances before the first layout
    regather_s: float = 3.0  # the same for a controller that was restarted
    prepare_s: float = 60.0  # groups and weights of the next epoch
    pause_s: float = 10.0  # reaching a step boundary
    switch_s: float = 30.0  # KV transfer and activation
    collective_s: float = 20.0  # one collective operation inside a step
    retry_s: float = 0.2  # before a failed reconfiguration is tried again
    grace_margin_s: float = 1.0  # of a notice's time that is left for the change, when the old layout decodes on
    settle_s: float = 0.05  # collect simultaneous membership changes into one reconfiguration
    controller_gone_s: float = 60.0  # agents without a controller give up after this
    orphan_s: float = 60.0  # a resumable request without a client is aborted after this
    drain_s: float = 30.0
    plan_poll_s: float = 5.0


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of queues and messages."""

    queue: int = 1024  # requests waiting in the controller before RESOURCE_EXHAUSTED
    message_bytes: int = 4 << 20  # gRPC message limit
    frame_bytes: int = 256 << 20  # control-plane frame limit
    finished_kept: int = 4096  # finished requests that can still be attached to
    recoveries: int = 100  # reconfigurations a request may live through before ABORTED
    transfer_bytes: int = 64 << 20  # largest single point-to-point message
    window_bytes: int = 768 << 20  # of GPU memory that workers of other GPUs of the host read
    copy_share: float = 0.5  # of the time, moving KV while replicas decode
    admission: str = "queue"  # refuse when the queue is full; "slo": also what would miss its deadline everywhere


class Replication(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of the KV in the memory of other instances. With `lag_steps` a replica waits where a decoding
    request is that many tokens ahead of its copy, so that no more than one token more has to be computed again
    after a failure; 0: it never waits.
    """

    enabled: bool = True
    lag_steps: int = 1
    frame_bytes: int = 4 << 20  # most that is copied at once: tokens of the next step wait behind it
    link_bytes_per_s: float = 10e9  # what decides whether KV is restored or computed again
    prefill_tokens_per_s: float = 20e3


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker computes. `numerics` exact = results independent of layout and batch (fp32, CPU
    or GPU); native = the framework's own kernels in `dtype`. `auto` = exact on CPU, native on CUDA.
    """

    device: str = "cpu"
    dtype: str = "float32"
    numerics: str = "auto"
    block_tokens: int = 16
    # Weights a device keeps: of its position, of the whole "model", or what the "plan" has memory for beside the
    # KV that it counts with; that is for those who give the cache no more (`kv_memory_bytes`).
    residency: str = "shard"
    kv_blocks: int = 0  # 0: from kv_memory_bytes
    kv_memory_bytes: int = 64 << 20
    step_tokens: int = 256  # prefill + decode tokens of one step
    threads: int = 1
    free_step_s: float = 0.0  # with numerics "free": how long a step takes

    @property
    def element_bytes(self) -> int:
        """Of weights and KV."""
        return 4 if self.dtype == "float32" else 2


def usual_dtype(device: str) -> str:
    """What a device computes in unless somebody says otherwise: float32 on cpu, bfloat16 on cuda."""
    if device not in ("cpu", "cuda"):
        raise InvalidInput(f"--device takes cpu or cuda, not {device!r}")
    return "bfloat16" if device == "cuda" else "float32"


class ServingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Handed to controller, agents and workers as one JSON file.

    A fleet serves one `checkpoint`, or several `checkpoints`: folders by the names that requests ask for.
    """

    checkpoint: str = ""
    checkpoints: dict[str, str] = {}
    journal: str
    token: str  # join token of agents and workers
    host: str = "127.0.0.1"
    grpc_port: int = 0
    control_port: int = 0
    metrics_port: int = 0
    expected_instances: int = 1
    dismiss: bool = True  # agents at the end of the controller; otherwise they wait for the next one
    plan: str = ""  # a plan book file, or
    registry: str = ""  # an MLflow tracking URI with
    registry_model: str = ""  # a registered model, and
    registry_alias: str = "champion"
    ready_file: str = ""  # the controller writes its bound addresses here, atomically, when it serves
    timeouts: Timeouts = Timeouts()
    capacity: Capacity = Capacity()
    replication: Replication = Replication()
    engine: EngineSettings = EngineSettings()

    @property
    def models(self) -> dict[str, str]:
        """Checkpoint folders by model name; the only model has the name ""."""
        return self.checkpoints or {"": self.checkpoint}


def _check(settings: ServingSettings) -> ServingSettings:
    if settings.engine.residency not in ("shard", "model", "plan"):
        raise InvalidInput(f"residency {settings.engine.residency!r} is unknown; choose shard, model or plan")
    if settings.engine.dtype not in ("float32", "bfloat16", "float16"):
        raise InvalidInput(f"dtype {settings.engine.dtype!r} is unknown; choose float32, bfloat16 or float16")
    if settings.capacity.admission not in ("queue", "slo"):
        raise InvalidInput(f"admission {settings.capacity.admission!r} is unknown; choose queue or slo")
    if bool(settings.checkpoint) == bool(settings.checkpoints) or "" in settings.checkpoints:
        raise InvalidInput("the settings need either one checkpoint or several named checkpoints")
    return settings


def load(path: str) -> ServingSettings:
    """Read settings from a JSON file. Raises `InvalidInput` if they cannot be read or make no sense."""
    try:
        with open(path, "rb") as file:
            return _check(msgspec.json.decode(file.read(), type=ServingSettings))
    except OSError as error:
        raise InvalidInput(f"cannot read the settings {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise InvalidInput(f"the settings {path} are not valid: {error}") from error


def dump(settings: ServingSettings) -> bytes:
    """The JSON bytes that `load` reads."""
    return msgspec.json.encode(settings)

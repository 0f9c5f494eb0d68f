"""The control plane's messages: one struct each, one serializer (msgpack), no code in the data.

Devices are written `instance/index`. `replica` is a number that is never used twice, so a late
message of a retired replica cannot be mistaken for a live one; `epoch` likewise. Replicas of several models
that share the devices of a group share a step loop: what concerns the loop may name any of them.
"""

from __future__ import annotations

import msgspec

from planning.resharding import Box
from serving.requests import FinishReason, Limits, Sampling, TopLogprob


class Message(msgspec.Struct, frozen=True, tag=True, tag_field="message", array_like=True):
    """Base of everything that crosses a control connection."""


# -- agents and workers → controller ----------------------------------------------------------


class Notice(Message):
    """An instance goes away in `deadline_s` seconds: said by its agent, or to it if the controller learnt first."""

    instance: str
    deadline_s: float
    source: str


class AgentHello(Message):
    """First message of an agent, with what is known of its instance's end and the sources that advised."""

    token: str
    instance: str
    type: str
    devices: int
    pid: int
    zone: str = ""
    notice: Notice | None = None
    advice: tuple[str, ...] = ()


class WorkerHello(Message):
    """First message of a worker."""

    token: str
    instance: str
    index: int
    pid: int
    kv_address: str = ""  # where other workers' KV is kept


class Heartbeat(Message):
    """Sent every `heartbeat_s` by workers and every `agent_heartbeat_s` by agents, which have nothing to add.

    `steps` counts the engine steps of a worker's step loop for `replica`. `still_s` is for how long that
    loop, having work, has neither finished an operation nor used the processor; `awaits` is the rank that
    it waits for meanwhile, None if it waits for no other.
    """

    steps: int = 0
    replica: int = -1
    still_s: float = 0.0
    awaits: int | None = None


class Advice(Message):
    """An instance may have to go, says `source`: prepare for it; there is no deadline and it stays."""

    instance: str
    source: str


class WorkerExited(Message):
    """An agent saw a worker process end."""

    instance: str
    index: int
    code: int


class WorkerStalled(Message):
    """An agent sees that a worker process will do nothing any more, though its connection is open."""

    instance: str
    index: int
    pid: int
    reason: str


class Prepared(Message):
    """Groups are up and weights are in place for the role in `epoch`; bytes by where they came from.

    Peers' came in `transfer_s`.
    """

    epoch: int
    local_bytes: int
    received_bytes: int
    disk_bytes: int
    transfer_s: float = 0.0


class Resident(Message):
    """A running sequence with KV: how many tokens are cached, in which blocks.

    `life` is another one whenever its KV was given up and computed again.
    """

    key: int
    cached_tokens: int
    blocks: list[int]
    life: int = 0


class Preloaded(Message):
    """These boxes are in memory now."""

    boxes: list[Box]


class Residents(Message):
    """The leader goes on; at this step boundary these sequences of its group have KV."""

    epoch: int
    replica: int
    sequences: list[Resident]


class Paused(Message):
    """The leader stopped at a step boundary; these sequences of its group have KV, all others have none."""

    replica: int
    sequences: list[Resident]


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """KV of the first `tokens` tokens of sequence `key`, of absolute layers and heads, at hand on a worker.

    It was computed by `replica`. `kept`: it is a copy in host memory; otherwise it is in the cache of a
    broken replica, in `blocks`. A copy's `table` is a number that the worker uses for no other list of blocks.
    """

    replica: int
    key: int
    tokens: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    kept: bool
    blocks: list[int]
    table: int = 0


class Holdings(Message):
    """What a worker has of the replicas asked for."""

    epoch: int
    held: list[Holding]


class Seat(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of `replica` set aside for a sequence."""

    key: int
    replica: int
    blocks: list[int]


class Reserved(Message):
    """Seats for sequences that join running replicas of a group; those without one found no room."""

    epoch: int
    seats: list[Seat]


class Copied(Message):
    """All KV pieces of a `Copy` were sent and received, in `transfer_s`."""

    epoch: int
    sent_bytes: int
    transfer_s: float = 0.0


class Switched(Message):
    """The last KV pieces are in place, and this worker's role of `epoch` is running."""

    epoch: int
    sent_bytes: int
    transfer_s: float = 0.0


class Failed(Message):
    """A phase of `epoch` or the replica's step loop failed; the worker itself lives on."""

    epoch: int
    replica: int
    phase: str
    reason: str


class Emission(msgspec.Struct, frozen=True, array_like=True):
    """One token of request `key` at output position `index`; or, with token None, only its end."""

    key: int
    index: int
    token: int | None
    logprob: float = 0.0
    top: list[TopLogprob] = []
    finish: FinishReason | None = None
    error: str = ""


class Tokens(Message):
    """What one or more steps of a replica produced, in order, and its load afterwards.

    `given_up` are requests that lost their KV to older ones since the last report: they are computed anew.
    """

    replica: int
    emissions: list[Emission]
    running: int
    waiting: int
    kv_usage: float
    given_up: list[int] = []


# -- controller → agents and workers ----------------------------------------------------------


class Welcome(Message):
    """The hello was accepted; nothing is sent before this."""


class Rejected(Message):
    """The hello was refused; the reason is for the operator."""

    reason: str


class Alive(Message):
    """To a worker the answer to a heartbeat; to an agent said several times a second, to be acknowledged."""


class WeightPieces(msgspec.Struct, frozen=True, array_like=True):
    """Boxes exchanged with `peer`, packed in this order; peer None is the checkpoint on disk.

    If they are `relayed`, they go on from where they have come to, once everything else is in place.
    """

    peer: str | None
    boxes: list[Box]
    relayed: bool = False


class Hosted(msgspec.Struct, frozen=True, array_like=True):
    """A replica as a member of its group: of which model, for how many requests, with how much KV."""

    replica: int
    model: str
    max_batch: int
    partition: list[int]
    kv_blocks: int


class Role(msgspec.Struct, frozen=True, array_like=True):
    """A worker's position: member `rank` of `members` (stage-major; rank 0 leads) of a group.

    `hosted` are the replicas that share the group's devices, one of each model.
    """

    members: list[str]
    rank: int
    stages: int
    shards: int
    hosted: list[Hosted]


class Prepare(Message):
    """Get ready for `epoch` in the background: join its groups, send and receive weights.

    `role` None: only serve as a source. `world` are the participants, in rank order. In a `hurry` requests wait for
    it, or somebody has to leave; else what runs goes first.
    """

    epoch: int
    store: str
    world: list[str]
    role: Role | None
    needed: list[Box]
    sends: list[WeightPieces]
    receives: list[WeightPieces]
    hurry: bool = False


class Pause(Message):
    """To a leader: stop at the next step boundary and report `Paused`."""

    replica: int


class Preload(Message):
    """Bring boxes into memory from the checkpoint, for an epoch that may come; answered by `Preloaded`."""

    boxes: list[Box]


class Snapshot(Message):
    """To a leader: say what is resident at the next step boundary, and go on."""

    epoch: int
    replica: int


class Survey(Message):
    """Say what KV of these replicas is at hand: in caches of broken ones, and in host memory.

    Those of `ended` are no more: nothing may be added to copies of them from now on.
    """

    epoch: int
    replicas: list[int]
    ended: list[int] = []


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """Room for `tokens` tokens of sequence `key` in `replica`."""

    key: int
    replica: int
    tokens: int


class Reserve(Message):
    """To the leader of running replicas: set blocks aside for sequences that will join them in `epoch`."""

    epoch: int
    wanted: list[Wanted]


class KvSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens `start` … `stop` - 1 of sequence `key`; `blocks` is the block table on this side."""

    key: int
    start: int
    stop: int
    blocks: list[int]


class KvPieces(msgspec.Struct, frozen=True, array_like=True):
    """KV exchanged with `peer`: absolute layer and KV-head ranges of some spans, packed in this order.

    `replica` says whose cache is read or written here; `kept`: the copy of it in host memory is read.
    """

    peer: str
    replica: int
    kept: bool
    layers: tuple[int, int]
    heads: tuple[int, int]
    spans: list[KvSpan]


class Assignment(msgspec.Struct, frozen=True, array_like=True):
    """A request for a replica: what to continue, how, and for how long."""

    key: int
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    limits: Limits
    deadline_s: float | None


class Copy(Message):
    """Exchange KV through the world of `epoch` while replicas go on decoding: what is cached never changes.

    `announced` are requests that this worker is going to lead, as they are now: long prompts need not come later,
    when everybody waits.
    """

    epoch: int
    sends: list[KvPieces]
    receives: list[KvPieces]
    announced: list[Assignment] = []


class Adoption(msgspec.Struct, frozen=True, array_like=True):
    """A request whose KV was moved into `replica`, with its block table there.

    `announced` (None: it was not) is how much output it had when it was announced: only what followed is in
    `assignment`, and no prompt.
    """

    replica: int
    assignment: Assignment
    cached_tokens: int
    blocks: list[int]
    announced: int | None = None


class Switch(Message):
    """Exchange what KV is still missing, then start the role prepared for `epoch`, or let `adoptions` join.

    `retire` are replicas whose state may be dropped afterwards.
    """

    epoch: int
    sends: list[KvPieces]
    receives: list[KvPieces]
    adoptions: list[Adoption]
    retire: list[int]


class Retire(Message):
    """Drop these replicas' loops, caches and groups now, whatever they are doing. Weights stay.

    Replicas of one group end together.
    """

    replicas: list[int]


class Salvage(Message):
    """Stop the loop of a broken replica; its cache stays at hand until `Retire` or `Keep`."""

    replica: int


class Replicate(Message):
    """Send a copy of the KV of `replica`, as it grows, to the worker that keeps at `address`."""

    replica: int
    address: str


class Keep(Message):
    """Copies and salvaged caches of all replicas but these may be dropped."""

    replicas: list[int]


class CopyState(Message):
    """A rank of `replica` says whether all of its KV is kept elsewhere, but for what the last steps added."""

    replica: int
    complete: bool


class Abandon(Message):
    """Forget what was prepared for `epoch`; running replicas are not touched."""

    epoch: int


class Taken(Message):
    """`count` more `Tokens` messages of `replica` are safe in the journal; the leader may run on."""

    replica: int
    count: int


class Submit(Message):
    """New work for a leader."""

    replica: int
    assignments: list[Assignment]


class Cancel(Message):
    """Drop these requests; their KV is free within a step."""

    replica: int
    keys: list[int]


class KillWorker(Message):
    """To an agent: SIGKILL a worker that went silent or stands still."""

    index: int


class Dismiss(Message):
    """To an agent: stop the workers and exit; the instance is no longer needed."""


Upward = (
    AgentHello
    | WorkerHello
    | Heartbeat
    | Notice
    | Advice
    | WorkerExited
    | WorkerStalled
    | Prepared
    | Preloaded
    | Residents
    | Paused
    | Holdings
    | Reserved
    | Copied
    | Switched
    | Failed
    | CopyState
    | Tokens
)
Downward = (
    Welcome
    | Rejected
    | Alive
    | Prepare
    | Preload
    | Snapshot
    | Pause
    | Survey
    | Reserve
    | Copy
    | Switch
    | Retire
    | Salvage
    | Replicate
    | Keep
    | Abandon
    | Taken
    | Submit
    | Cancel
    | KillWorker
    | Notice
    | Dismiss
)

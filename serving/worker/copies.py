"""KV that a worker holds beside its running replicas: copies of others', caches of broken ones, and own streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serving.engine.batch import StepPlan
from serving.engine.kv_cache import KvCache
from serving.engine.kv_index import Cached
from serving.messages import Holding, KvPieces
from serving.settings import ServingSettings
from serving.worker.groups import GroupBroken
from serving.worker.keeper import Keeper
from serving.worker.kv_stream import KvStream
from serving.worker.position import ModelPart, Position


@dataclass(frozen=True, slots=True)
class Salvaged:
    """The cache of a broken replica, and what is in it."""

    cache: KvCache
    index: Mapping[int, Cached]


class Copies:
    """All of it on one worker. Not safe to change from two threads at once."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._salvaged: dict[int, Salvaged] = {}
        self._keeper = Keeper(settings.host, settings.token)
        self._streams: dict[int, KvStream] = {}

    @property
    def address(self) -> str:
        """Where others send their copies."""
        return self._keeper.address

    def holdings(self, replicas: Sequence[int]) -> list[Holding]:
        """What is here of these replicas."""
        salvaged = [
            Holding(number, key, one.tokens, left.cache.layers, left.cache.heads, False, list(one.blocks))
            for number in replicas
            if (left := self._salvaged.get(number)) is not None
            for key, one in left.index.items()
        ]
        return salvaged + self._keeper.holdings(replicas)

    def cache(self, pieces: KvPieces) -> KvCache:
        """The copy, or the salvaged cache, that pieces are read from. Raises `GroupBroken` if it is gone."""
        if pieces.kept:
            return self._keeper.cache(pieces.replica, pieces.layers, pieces.heads)
        if pieces.replica not in self._salvaged:
            raise GroupBroken(f"the KV of replica {pieces.replica} is not here any more")
        return self._salvaged[pieces.replica].cache

    def salvage(self, position: Position) -> None:
        """Keep the caches of replicas that have ended at hand."""
        for part in position.parts:
            self._salvaged[part.hosted.replica] = Salvaged(part.cache, part.index.computed())

    def freeze(self, replicas: Sequence[int]) -> None:
        """Copies of these replicas, which have ended, are about to be read: nothing is added any more."""
        self._keeper.freeze(replicas)

    def drop(self, replicas: Sequence[int]) -> list[object]:
        """Let go of the salvaged caches of these replicas, which are returned."""
        return [self._salvaged.pop(number) for number in replicas if number in self._salvaged]

    def keep(self, replicas: Sequence[int]) -> None:
        """Everything of all other replicas may go."""
        self.drop([number for number in self._salvaged if number not in replicas])
        self._keeper.drop_others(replicas)

    def stream(self, part: ModelPart, address: str, tell: Callable[[bool], None]) -> Callable[[StepPlan], None]:
        """Copies of a replica's KV go to `address` from now on. Returns what its steps wait by.

        `tell` hears whether the copy is complete, from any thread.
        """
        replica = part.hosted.replica
        self.end_stream(replica)
        replication = self._settings.replication
        stream = self._streams[replica] = KvStream(
            address,
            self._settings.token,
            replica,
            part.cache,
            part.index,
            frame_bytes=replication.frame_bytes,
            tell=tell,
        )
        stream.start()
        if not replication.lag_steps:
            return _wait_for_nothing
        return lambda plan: stream.hold(plan, replication.lag_steps)

    def end_stream(self, replica: int) -> None:
        """The copy of a replica stays where it is, and does not grow."""
        stream = self._streams.pop(replica, None)
        if stream is not None:
            stream.stop()


def _wait_for_nothing(plan: StepPlan) -> None:
    """Of copies that nobody waits for."""

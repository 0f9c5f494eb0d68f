"""The sequences that change their replica: where their KV is, where it goes, and how much of it has arrived."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec import structs

from data.layout import Device
from data.models import ModelSpec
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.orders import Heir, Pieces, Source, kv_pieces, live_sources
from serving.controller.records import Record
from serving.controller.seating import Seating

_GROWTH_TOKENS = 64  # room kept for what a sequence adds while it is copied into a running replica


class Moves:
    """Bookkeeping of one reconfiguration: it sends nothing. A sequence only goes to a replica of its model."""

    def __init__(self, specs: Mapping[str, ModelSpec], block_tokens: int) -> None:
        self._specs, self._block_tokens = specs, block_tokens
        self._new: dict[int, tuple[Replica, tuple[int, ...]]] = {}
        self._seating: dict[int, Seating] = {}  # by new replica
        self._records: dict[int, Record] = {}  # of all that may be adopted
        self._sources: dict[int, tuple[Source, ...]] = {}
        self._restorable: dict[int, int] = {}  # tokens of stranded sequences
        self._copied_whole: set[int] = set()
        self._sequences: dict[int, m.Resident] = {}
        self._homes: dict[int, Replica] = {}  # where a sequence goes
        self._reserved: dict[int, dict[int, list[int]]] = {}  # by running replica
        self._copied: dict[int, tuple[int, int]] = {}  # tokens of which life are in place
        self._announced: dict[int, int] = {}  # how much output of a sequence its next leader knows
        self.left_behind: frozenset[int] = frozenset()
        """Sequences that are replayed: there is no time to move their KV."""

    def offer(self, replica: Replica, inherits: tuple[int, ...]) -> None:
        """A new replica has seats, and those of `inherits` go there first."""
        self._new[replica.number] = replica, inherits
        self._seating[replica.number] = Seating(replica.kv_blocks, self._block_tokens)

    def restore(self, record: Record, sources: Iterable[Source], tokens: int, *, copied: bool) -> None:
        """A stranded sequence can go on from the first `tokens` tokens; `copied`: its copy had been complete."""
        key = record.key
        self._records[key], self._sources[key], self._restorable[key] = record, tuple(sources), tokens
        self._copied_whole |= {key} if copied else set()

    @property
    def holders(self) -> set[Device]:
        """Devices that have KV of sequences."""
        return {source.device for key in self._records for source in self._sources[key]}

    @property
    def models(self) -> set[str]:
        """Of the sequences."""
        return {record.model for record in self._records.values()}

    def take_in(self, retired: Sequence[Replica], residents: Iterable[m.Resident]) -> None:
        """Note where retired replicas' sequences are now, and seat them; who ended leaves its seat."""
        homes = {key: replica for replica in retired for key in replica.records}
        self._sequences = {}
        for one in residents:
            home = homes.get(one.key)
            if home is not None:
                self._records[one.key], self._sequences[one.key] = home.records[one.key], one
                self._sources[one.key] = live_sources(self._specs[home.model], home, one)
        present = self._present()
        for seating in self._seating.values():
            for key in [key for key in seating.seats if key not in present]:
                seating.leave(key)
        self._seat()

    def _present(self) -> list[int]:
        return sorted(self._restorable.keys() | self._sequences.keys())

    def _tokens(self, key: int) -> int:
        return self._restorable[key] if key in self._restorable else self._sequences[key].cached_tokens

    def _most_tokens(self, key: int) -> int:
        record = self._records[key]
        most = len(record.request.prompt) + record.request.limits.max_tokens
        return min(most, self._specs[record.model].max_positions)

    def _seat(self) -> None:
        """Give every sequence blocks in a new replica: its heir, but no heir more than its share."""
        keys = self._present()
        wanting = Counter(self._records[key].model for key in keys)
        there = Counter(replica.model for replica, _ in self._new.values())
        for key in keys:
            model, home = self._records[key].model, self._homes.get(key)
            if not there[model]:
                continue
            share = -(-wanting[model] // there[model])
            for replica in [home] if home is not None else self._options(key, model, share):
                if self._seating[replica.number].fit(key, self._tokens(key), self._most_tokens(key)):
                    self._homes[key] = replica
                    break

    def _options(self, key: int, model: str, share: int) -> list[Replica]:
        former = self._records[key].replica

        def rank(number: int) -> tuple[bool, bool, int, int]:
            seated = len(self._seating[number].seats)
            return seated >= share, former not in self._new[number][1], seated, number

        fitting = [number for number, (replica, _) in self._new.items() if replica.model == model]
        return [self._new[number][0] for number in sorted(fitting, key=rank)]

    # -- room in running replicas ------------------------------------------------------------------------

    def wanted(self, joined: Sequence[Replica]) -> dict[Device, list[m.Wanted]]:
        """What to ask the leaders of running replicas for: a seat in the emptiest one for each sequence without a
        home, and a larger seat for those that grow.
        """
        wanted: dict[Device, list[m.Wanted]] = defaultdict(list)
        loads = {one.number: len(one.records) for one in joined}
        for key in self._present():
            home = self._homes.get(key)
            fitting = [one for one in joined if one.model == self._records[key].model] if home is None else [home]
            if not fitting or (home is not None and not self._outgrows(key, home)):
                continue
            place = min(fitting, key=lambda one: (loads[one.number], one.number))
            loads[place.number] += home is None
            wanted[place.leader].append(m.Wanted(key, place.number, self._tokens(key) + _GROWTH_TOKENS))
        return wanted

    def _outgrows(self, key: int, home: Replica) -> bool:
        """Whether a sequence has used up some of the growth that its seat in a running replica was made for."""
        blocks = self._reserved.get(home.number, {}).get(key)
        return blocks is not None and len(blocks) * self._block_tokens < self._tokens(key) + _GROWTH_TOKENS

    def reserve(self, joined: Sequence[Replica], seats: Iterable[m.Seat]) -> None:
        """What was set aside."""
        by_number = {one.number: one for one in joined}
        for seat in seats:
            self._reserved.setdefault(seat.replica, {})[seat.key] = seat.blocks
            self._homes[seat.key] = by_number[seat.replica]

    def reserved(self, replica: Replica) -> list[int]:
        """The sequences that have room in a running replica."""
        return list(self._reserved.get(replica.number, {}))

    def joins(self, key: int) -> bool:
        """Whether a sequence goes to a running replica."""
        return any(key in seats for seats in self._reserved.values())

    # -- what goes where ---------------------------------------------------------------------------------

    def heirs(self) -> list[Heir]:
        """Every sequence that has a seat large enough, as it is now."""
        heirs = []
        for key in sorted(self._homes):
            if key in self.left_behind or (key not in self._restorable and key not in self._sequences):
                continue
            home, tokens = self._homes[key], self._tokens(key)
            seating = self._seating.get(home.number)
            blocks = seating.seats.get(key) if seating is not None else self._reserved[home.number].get(key)
            if blocks is not None and tokens <= len(blocks) * self._block_tokens:
                heirs.append(Heir(key, tokens, self._sources[key], home, tuple(blocks)))
        return heirs

    def pieces(self, heirs: Sequence[Heir]) -> tuple[Pieces, Pieces]:
        """What every device sends and receives so that the KV of heirs is where it goes, but for what was copied."""
        copied = {heir.key: self._copied.get(heir.key, (0, 0)) for heir in heirs}
        starts = {key: tokens for key, (tokens, life) in copied.items() if life == self._life(key)}
        return kv_pieces(self._specs, heirs, starts)

    def arrived(self, heirs: Sequence[Heir]) -> None:
        """The KV of heirs has been copied as far as they say."""
        self._copied |= {heir.key: (heir.tokens, self._life(heir.key)) for heir in heirs}

    def _life(self, key: int) -> int:
        return self._sequences[key].life if key in self._sequences else 0

    def announce(self, heirs: Sequence[Heir], now: float) -> dict[Device, list[m.Assignment]]:
        """What the leaders of their targets should know of heirs before everybody waits for it; once for each."""
        found: dict[Device, list[m.Assignment]] = defaultdict(list)
        for heir in heirs:
            if heir.key not in self._announced:
                assignment = self._records[heir.key].assignment(now)
                found[heir.target.leader].append(assignment)
                self._announced[heir.key] = len(assignment.output)
        return found

    def adoptions(self, heirs: Sequence[Heir], now: float) -> dict[Device, list[m.Adoption]]:
        """What the leaders of their targets hear of heirs."""
        found: dict[Device, list[m.Adoption]] = defaultdict(list)
        for heir in heirs:
            assignment, known = self._records[heir.key].assignment(now), self._announced.get(heir.key)
            if known is not None:
                assignment = structs.replace(assignment, prompt=[], output=assignment.output[known:])
            target, blocks = heir.target, list(heir.blocks)
            found[target.leader].append(m.Adoption(target.number, assignment, heir.tokens, blocks, known))
        return found

    # -- what it came to ---------------------------------------------------------------------------------

    @property
    def uncopied(self) -> frozenset[int]:
        """Sequences to be restored whose copy had not been complete."""
        return frozenset(self._restorable.keys() - self._copied_whole)

    def reexecuted(self, heirs: Sequence[Heir]) -> dict[int, int]:
        """Generated tokens of restored requests, but for the last, whose KV has to be computed again.

        Those that were being computed again anyway, after an earlier loss, are none of this one's.
        """
        result = {}
        for heir in heirs:
            if heir.key in self._restorable:
                record = self._records[heir.key]
                known = len(record.request.prompt) + len(record.output) - 1
                result[heir.key] = min(known - heir.tokens, max(0, len(record.output) - record.replayed - 1))
        return result

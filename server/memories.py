"""Before a turn: what its session's banks know of it is put in front of its input. It never fails a turn.

Knows banks and workers' tokenizers, not how turns go. What is read is fixed before any worker is asked for a reply.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import structlog

from cache_store.banks import BankRecord, Entry, EntryFilter
from cache_store.errors import EmbedderChanged, ServingError
from cache_store.records import SessionRecord
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.banks.keeper import Recalled
from server.directory import Worker, WorkerDirectory
from server.errors import NoWorker
from server.memory_text import HEADER_TOKENS, element, put_in_front, query_of, said_in
from server.metrics import FrontMetrics
from server.prefilling import Prefilling

_ASKED_SHARE: Final = 0.75
"""Of the time to read, what banks have: the rest is for quoting."""
_TEMPLATE_TOKENS: Final = 64
_REPLY_TOKENS: Final = 256
_TOKEN_CHARACTERS: Final = 16
"""Text with more of them for each token, on average, is rare: it is taken for too long."""
_MOST_K: Final = 100
_log = structlog.get_logger(__name__)


class ReadBanks(Protocol):
    """Part of a BankKeeper."""

    async def get(self, tenant: str, name: str) -> BankRecord: ...
    async def recall(
        self, tenant: str, name: str, query: str, *, k: int, where: EntryFilter, peek: bool
    ) -> Sequence[Recalled]: ...
    def count_recalls(self, bank: BankRecord, ids: Sequence[str]) -> None: ...


class Reading(NamedTuple):
    """What a turn has read."""

    asked: pb.GenerateRequest
    """As it came."""
    request: pb.GenerateRequest
    """With the memories in it."""
    sources: tuple[pb.MemorySource, ...] = ()
    """Best first."""
    banks: Mapping[str, BankRecord] = {}
    """Of the sources, by name."""
    misses: tuple[pb.BankMiss, ...] = ()
    """Banks that it has not heard."""
    inserts: Mapping[str, BankRecord] = {}
    """Parts of the input whose KV their banks keep, in order: workers insert it."""


class _Candidate(NamedTuple):
    bank: BankRecord
    recalled: Recalled
    text: str
    tokens: int = 0


class Memories:
    def __init__(
        self,
        banks: ReadBanks,
        directory: WorkerDirectory,
        prefilling: Prefilling,
        metrics: FrontMetrics,
        *,
        read_s: float,
    ) -> None:
        """`read_s` is how long a turn waits for its memories at most; half of what is left of its deadline, if that is
        less."""
        self._banks = banks
        self._directory = directory
        self._prefilling = prefilling
        self._metrics = metrics
        self._read_s = read_s

    async def read(self, request: pb.GenerateRequest, record: SessionRecord, *, deadline_s: float | None) -> Reading:
        """The request with what the session's banks know in front of its input. `deadline_s` is of `time.monotonic()`.

        What can't be read, or not in time, is left out.
        """
        names = [attached.bank for attached in record.banks if attached.access.reads]
        if request.HasField("tokens"):
            return Reading(
                request, request, misses=tuple(self._missed(name, pb.BANK_MISS_REASON_TOKENS) for name in names)
            )
        query = query_of(request) if names else ""
        if not query:
            return Reading(request, request)
        began_s = time.monotonic()
        left_s = self._read_s if deadline_s is None else max(0.0, (deadline_s - began_s) / 2)
        ends_s = began_s + min(self._read_s, left_s)
        asked_until_s = began_s + (ends_s - began_s) * _ASKED_SHARE
        asked = await asyncio.gather(*(self._ask(record, name, query, until_s=asked_until_s) for name in names))
        candidates = _best_first([one for of_bank in asked if not isinstance(of_bank, pb.BankMiss) for one in of_bank])
        reading = (
            await self._within(request, record, candidates, until_s=ends_s) if candidates else Reading(request, request)
        )
        self._metrics.memories_read(len(reading.sources), seconds=time.monotonic() - began_s)
        unheard = (one for one in asked if isinstance(one, pb.BankMiss))
        return reading._replace(misses=(*unheard, *reading.misses))

    def committed(self, reading: Reading, codec: str, *, num_inserted: int) -> None:
        """The turn is in its session: what it has read is remembered better from now on. What could not be inserted,
        because no tier had its KV, is prefilled for the next one."""
        if num_inserted < len(reading.inserts):
            self._prefilling.again(codec, reading.inserts)
        for name, bank in reading.banks.items():
            self._banks.count_recalls(bank, [source.entry_id for source in reading.sources if source.bank == name])

    async def _ask(
        self, record: SessionRecord, name: str, query: str, *, until_s: float
    ) -> list[_Candidate] | pb.BankMiss:
        """A bank's best entries, or why there are none of it."""
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                bank = await self._banks.get(record.tenant, name)
                most = min(bank.settings.read_entries, _MOST_K)
                if not (most and bank.settings.read_tokens and bank.entries):
                    self._metrics.bank_read("empty")
                    return []
                # What this session said itself is in its history, unless that is longer than the window.
                own = "" if record.context_policy else record.session_id
                where = EntryFilter(not_session_id=own)
                recalled = await self._banks.recall(record.tenant, name, query, k=most, where=where, peek=True)
        except Exception as error:  # a bug in a bank is not the turn's
            return self._left_out(record, name, error)
        self._metrics.bank_read("read" if recalled else "empty")
        told = [one for one in recalled if record.context_policy or not _is_inherited(one.entry, record)]
        return [_Candidate(bank, one, element(name, one.entry)) for one in told]

    async def _within(
        self, request: pb.GenerateRequest, record: SessionRecord, candidates: Sequence[_Candidate], *, until_s: float
    ) -> Reading:
        """Put in what there is room for, by each bank's budget and by the model's window."""
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                worker = self._tokenizing(record)
                candidates = _worth_counting(candidates, worker.description.max_context_tokens)
                quoted = await worker.client.quote([candidate.text for candidate in candidates])
                room = await self._room(request, record, worker, sum(text.tokens for text in quoted))
        except Exception as error:  # a bug in a bank is not the turn's
            names = dict.fromkeys(candidate.bank.name for candidate in candidates)
            return Reading(request, request, misses=tuple(self._left_out(record, name, error) for name in names))
        chosen = _chosen(candidates, quoted, room)
        if not chosen:
            return Reading(request, request)
        sources = tuple(
            pb.MemorySource(
                bank=bank.name,
                entry_id=recalled.entry.id,
                score=recalled.score,
                document_id=recalled.entry.document_id,
                tokens=tokens,
            )
            for bank, recalled, _, tokens in chosen
        )
        changed = put_in_front(request, [candidate.text for candidate in chosen])
        inserts = {} if record.context_policy else _kept_kv(chosen)
        return Reading(request, changed, sources, {bank.name: bank for bank, *_ in chosen}, inserts=inserts)

    async def _room(self, request: pb.GenerateRequest, record: SessionRecord, worker: Worker, wanted: int) -> int:
        """Tokens of the model's window that nothing else needs. The input is counted only where it may matter."""
        sampling = request.sampling
        reply = sampling.max_new_tokens if sampling.HasField("max_new_tokens") else _REPLY_TOKENS
        history = 0 if record.context_policy else record.num_tokens  # what leaves the window takes no room
        room = worker.description.max_context_tokens - history - reply - HEADER_TOKENS
        said = said_in(request) if request.HasField("text") else "".join(m.content for m in request.chat.messages)
        around = _TEMPLATE_TOKENS * (1 + len(request.chat.messages))
        if room - around - len(said.encode()) >= wanted:  # a token has a byte at least
            return wanted
        if room - around <= 0:
            return 0
        [counted] = await worker.client.quote([said])
        return max(0, room - around - counted.tokens) if counted.text else 0

    def _tokenizing(self, record: SessionRecord) -> Worker:
        """A worker of the session's model, if there is one. Raises NoWorker."""
        able = [worker for worker in self._directory.living() if worker.accepting]
        if not able:
            raise NoWorker("no worker accepts work now")
        return min(able, key=lambda worker: (worker.description.fingerprint != record.model, worker.in_flight))

    def _missed(self, bank: str, reason: pb.BankMissReason) -> pb.BankMiss:
        self._metrics.bank_missed(reason)
        return pb.BankMiss(bank=bank, reason=reason)

    def _left_out(self, record: SessionRecord, bank: str, error: Exception) -> pb.BankMiss:
        late = isinstance(error, TimeoutError)
        about = {"session": record.session_id, "bank": bank}
        if late or isinstance(error, ServingError):
            what = "it took too long" if late else str(error)
            _log.warning("a turn goes without its memories", **about, error=what)
        else:
            _log.error("a turn goes without its memories", **about, exc_info=error)
        if late:
            return self._missed(bank, pb.BANK_MISS_REASON_LATE)
        is_stale = isinstance(error, EmbedderChanged)
        return self._missed(bank, pb.BANK_MISS_REASON_STALE if is_stale else pb.BANK_MISS_REASON_FAILED)


def _kept_kv(chosen: Sequence[_Candidate]) -> dict[str, BankRecord]:
    """Texts of banks that keep KV, and which bank each is of."""
    return {one.text: one.bank for one in chosen if one.bank.settings.kv_ttl_s}


def _is_inherited(entry: Entry, record: SessionRecord) -> bool:
    """Whether a fork has this turn of its parent's in its own history."""
    return bool(entry.session_id) and entry.session_id == record.parent_session_id and entry.turn <= record.parent_turn


def _best_first(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """By score; what several banks have, once."""
    ranked = sorted(candidates, key=lambda candidate: -candidate.recalled.score)
    by_text: dict[str, _Candidate] = {}
    for candidate in ranked:
        by_text.setdefault(candidate.recalled.entry.text, candidate)
    return list(by_text.values())


def _worth_counting(candidates: Sequence[_Candidate], window: int) -> list[_Candidate]:
    """Those that may fit. Tokenizing takes a worker's time, and an entry may have 64 KiB."""
    budgets = {candidate.bank.name: candidate.bank.settings.read_tokens for candidate in candidates}
    left = _TOKEN_CHARACTERS * min(sum(budgets.values()), window)
    worth = []
    for candidate in candidates:
        size = len(candidate.text)
        if size <= min(left, _TOKEN_CHARACTERS * budgets[candidate.bank.name]):
            left -= size
            worth.append(candidate)
    return worth


def _chosen(candidates: Sequence[_Candidate], quoted: Sequence[wpb.QuotedText], room: int) -> list[_Candidate]:
    """The best that fit. One that is too long leaves its place to the next."""
    left = {candidate.bank.name: candidate.bank.settings.read_tokens for candidate in candidates}
    chosen = []
    for candidate, (text, tokens) in zip(candidates, ((one.text, one.tokens) for one in quoted), strict=True):
        name = candidate.bank.name
        if text and tokens <= min(left[name], room):
            left[name] -= tokens
            room -= tokens
            chosen.append(candidate._replace(text=text, tokens=tokens))
    return chosen

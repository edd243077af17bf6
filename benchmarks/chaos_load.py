"""Conversations whose every token is known: first undisturbed, then under faults, and held to what they were.

Knows the public client alone. Knows neither processes nor faults, but for the name of the one that is on.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from models.dialogues import Style, dialogue, rough_tokens
from protos import rekindle_pb2 as pb
from rekindle.client import Client
from rekindle.errors import AlreadyExists, NotFound, RekindleError

T = TypeVar("T")
_GIVE_UP_S = 120.0
"""A call that has not succeeded by then, however often it was repeated, is stuck."""

_PARKED = 0.25
_HINTED = 0.15
_THINKING_S = 0.4
_PROBLEMS_KEPT = 20


@dataclass(frozen=True, slots=True)
class Script:
    """What a user says, and how replies are sampled."""

    turns: tuple[str, ...]
    sampling: dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    conversations: int = 0
    turns: int = 0
    tokens: int = 0
    wrong_tokens: int = 0
    lost_turns: int = 0
    doubled_turns: int = 0
    stuck: int = 0
    repeated_turns: int = 0
    committed_unheard: int = 0
    """Turns whose call failed, and which were committed all the same: asked for again, they were sent again."""
    failures: Counter[str] = field(default_factory=Counter)
    """Turns' calls that failed, by fault and status."""
    other_failures: Counter[str] = field(default_factory=Counter)
    """The same of all other calls."""
    slowest_turn_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    """The first of what must not be, in words."""

    def wrong(self, what: str) -> None:
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append(what)


def scripts(count: int, *, seed: int) -> list[Script]:
    """Dialogues that need memory. Of three, one replies as trained, one goes on past its end, one is sampled."""
    samplings: list[dict[str, Any]] = [
        {"max_new_tokens": 48},
        {"max_new_tokens": 64, "ignore_eos": True},  # long enough to be struck in mid-stream
        {"max_new_tokens": 48, "temperature": 0.9, "seed": seed},
    ]
    talks = (
        dialogue(random.Random(f"chaos/{seed}/{number}"), Style(), 400, rough_tokens) for number in itertools.count()
    )
    wanted = itertools.islice((talk for talk in talks if len(talk.turns) >= 4), count)
    return [
        Script(tuple(turn.user for turn in talk.turns[:8]), samplings[number % 3]) for number, talk in enumerate(wanted)
    ]


class Clients:
    """A client for each front end; a call that fails goes to the next one."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._clients = [Client(address, timeout_s=10.0, connect_timeout_s=0.5) for address in addresses]
        self._turn = itertools.count()

    def next(self) -> Client:
        return self._clients[next(self._turn) % len(self._clients)]

    def all(self) -> Sequence[Client]:
        return self._clients

    async def aclose(self) -> None:
        for client in self._clients:
            await client.close()


class Speaker:
    """One user: holds conversations, repeats what fails, and checks every token."""

    def __init__(self, clients: Clients, tally: Tally, fault: Callable[[], str], chance: random.Random) -> None:
        """`fault` names the fault that is on now."""
        self._clients, self._tally, self._fault, self._random = clients, tally, fault, chance
        self._client = clients.next()

    async def converse(self, script: Script, session_id: str, expected: pb.Session | None = None) -> pb.Session:
        """Hold one conversation to its end; return its record. Where it is known how it goes, compare."""
        await self._until_done(lambda: self._create(session_id))
        for number, said in enumerate(script.turns, start=1):
            began_s = time.monotonic()
            await self._turn(script, said, session_id, number, expected)
            self._tally.turns += 1
            self._tally.slowest_turn_s = max(self._tally.slowest_turn_s, time.monotonic() - began_s)
            if expected is not None:
                await self._between_turns(session_id)
        session = await self._read(session_id)
        if expected is not None:
            self._compare(session, expected)
            await self._until_done(lambda: self._delete(session_id))
        self._tally.conversations += 1
        return session

    async def _turn(self, script: Script, said: str, session_id: str, number: int, expected: pb.Session | None) -> None:
        give_up_s = time.monotonic() + _GIVE_UP_S
        while True:
            generation = self._client.generate(
                [{"role": "user", "content": said}],
                session_id=session_id,
                idempotency_key=f"turn-{number}",
                timeout_s=30.0,
                **script.sampling,
            )
            try:
                await generation.read()
            except RekindleError as error:
                self._tally.failures[f"{self._fault()}: {error.code.name}"] += 1
            finished = generation.finished
            if expected is not None:
                self._compare_reply(generation.token_ids, expected, number, whole=finished is not None)
            if finished is not None:
                break
            self._move_on(give_up_s)
            self._tally.repeated_turns += 1
            await asyncio.sleep(0.1)
        if finished.turn != number:
            self._tally.doubled_turns += 1
            self._tally.wrong(f"{session_id}: turn {number} became turn {finished.turn}")
        self._tally.committed_unheard += finished.repeated
        self._tally.tokens += len(generation.token_ids)

    def _compare_reply(self, token_ids: Sequence[int], expected: pb.Session, number: int, *, whole: bool) -> None:
        """What was streamed, to its end or not, is what the undisturbed turn said."""
        turn = expected.turns[number - 1]
        right = expected.token_ids[turn.reply_start : turn.end]
        pairs = itertools.zip_longest(token_ids, right if whole else right[: len(token_ids)])
        wrong = sum(said != meant for said, meant in pairs)
        if wrong:
            self._tally.wrong_tokens += wrong
            self._tally.wrong(f"turn {number} under {self._fault()}: {list(token_ids)} instead of {list(right)}")

    def _compare(self, session: pb.Session, expected: pb.Session) -> None:
        """The record holds each turn once, with the undisturbed run's tokens and text."""
        surplus = len(session.turns) - len(expected.turns)
        self._tally.lost_turns += max(0, -surplus)
        self._tally.doubled_turns += max(0, surplus)
        pairs = itertools.zip_longest(session.token_ids, expected.token_ids)
        wrong = sum(found != meant for found, meant in pairs)
        self._tally.wrong_tokens += wrong
        if surplus or wrong or session.text != expected.text:
            self._tally.wrong(f"{session.session_id}: {session.text!r} instead of {expected.text!r}")

    async def _between_turns(self, session_id: str) -> None:
        """Think; perhaps the session is parked meanwhile, or restored ahead of its turn. Hints may fail."""
        draw = self._random.random()
        try:
            if draw < _PARKED:
                await self._client.park_session(session_id, drop_host=True, timeout_s=10.0)
            elif draw < _PARKED + _HINTED:
                await self._client.get_session(session_id, user_is_typing=True)
        except RekindleError as error:
            self._tally.other_failures[f"{self._fault()}: {error.code.name}"] += 1
        await asyncio.sleep(self._random.uniform(0, _THINKING_S))

    async def _create(self, session_id: str) -> None:
        try:
            await self._client.create_session(session_id)
        except AlreadyExists:
            return  # by the try before this one, whose answer was lost

    async def _delete(self, session_id: str) -> None:
        try:
            await self._client.delete_session(session_id, timeout_s=20.0)
        except NotFound:
            return  # as above

    async def _read(self, session_id: str) -> pb.Session:
        return await self._until_done(lambda: self._client.get_session(session_id, with_token_ids=True, with_text=True))

    async def _until_done(self, call: Callable[[], Awaitable[T]]) -> T:
        give_up_s = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                return await call()
            except NotFound:
                self._tally.lost_turns += 1
                raise
            except RekindleError as error:
                self._tally.other_failures[f"{self._fault()}: {error.code.name}"] += 1
                self._move_on(give_up_s)
                await asyncio.sleep(0.1)

    def _move_on(self, give_up_s: float) -> None:
        """Go to another front end. Raises TimeoutError when it has been long enough."""
        if time.monotonic() > give_up_s:
            self._tally.stuck += 1
            self._tally.wrong(f"a call has not succeeded within {_GIVE_UP_S:g} s, now under {self._fault()}")
            raise TimeoutError("a call is stuck")
        self._client = self._clients.next()


async def undisturbed(clients: Clients, wanted: Sequence[Script]) -> list[pb.Session]:
    """Each script's conversation as it goes when nothing happens. Raises what the calls raise."""
    tally = Tally()
    speaker = Speaker(clients, tally, lambda: "nothing", random.Random(0))
    found = [await speaker.converse(script, f"undisturbed-{number}") for number, script in enumerate(wanted)]
    assert not tally.failures, f"failures without a fault: {tally.failures}"
    for session in found:
        await clients.next().delete_session(session.session_id)  # the same blocks must not be at hand
    return found


async def keep_talking(
    clients: Clients,
    wanted: Sequence[Script],
    expected: Sequence[pb.Session],
    tally: Tally,
    *,
    speakers: int,
    fault: Callable[[], str],
    stop: asyncio.Event,
    seed: int,
) -> None:
    """`speakers` users at once take script after script until `stop`, and end the conversations that they are in."""
    numbers: Iterator[int] = itertools.count()

    async def talk(speaker: Speaker) -> None:
        while not stop.is_set():
            number = next(numbers)
            which = number % len(wanted)
            try:
                await speaker.converse(wanted[which], f"chaos-{seed}-{number}", expected[which])
            except (TimeoutError, NotFound) as error:
                tally.wrong(f"chaos-{seed}-{number}: {error}")

    chances = [random.Random(f"{seed}/{number}") for number in range(speakers)]
    await asyncio.gather(*(talk(Speaker(clients, tally, fault, chance)) for chance in chances))

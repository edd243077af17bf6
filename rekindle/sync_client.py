"""The plain client: the asynchronous one, driven on an event loop of its own in a background thread.

Adds no behaviour: every method is the asynchronous client's, with the same parameters, answers and errors.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from protos import rekindle_pb2 as pb
from rekindle.client import Client as AsyncClient
from rekindle.client import Generation, Input
from rekindle.loop_thread import LoopThread
from rekindle.memory_client import MemoryClient as AsyncMemoryClient

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


class _Plain(Generic[A]):
    """What has an asynchronous counterpart, and the loop that this one lives on."""

    def __init__(self, loop: LoopThread, client: A) -> None:
        self._loop = loop
        self._client = client


def _blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Plain[A], P], T]:
    """Make the blocking counterpart of a method of the asynchronous client."""

    @wraps(method)
    def call(self: _Plain[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(method(self._client, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[A, P], AsyncIterator[T]],
) -> Callable[Concatenate[_Plain[A], P], Iterator[T]]:
    """The same for a method that yields."""

    @wraps(method)
    def call(self: _Plain[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._loop.iterate(method(self._client, *args, **kwargs))

    return call


class Client(_Plain[AsyncClient]):
    """A connection to a Rekindle server. Use it as `with Client("host:port") as client:`. Safe to share by threads.

    Takes what rekindle.client.Client takes.
    """

    def __init__(self, target: str, **options: Any) -> None:
        loop = LoopThread()
        try:
            super().__init__(loop, loop.run(_make_client(target, options)))
        except BaseException:
            loop.close()
            raise
        self.memory = MemoryClient(loop, self._client.memory)
        """Banks of knowledge."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the background thread."""
        self._loop.run(self._client.close())
        self._loop.close()

    def generate(
        self,
        input: Input,
        *,
        session_id: str = "",
        audit: bool = False,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> "SyncGeneration":
        """Start one turn, as the asynchronous client does."""
        generation = self._client.generate(input, session_id=session_id, audit=audit, timeout_s=timeout_s, **sampling)
        return SyncGeneration(self._loop, generation)

    list_sessions = _iterating(AsyncClient.list_sessions)
    create_session = _blocking(AsyncClient.create_session)
    get_session = _blocking(AsyncClient.get_session)
    update_session = _blocking(AsyncClient.update_session)
    fork_session = _blocking(AsyncClient.fork_session)
    park_session = _blocking(AsyncClient.park_session)
    warm_session = _blocking(AsyncClient.warm_session)
    delete_session = _blocking(AsyncClient.delete_session)
    stats = _blocking(AsyncClient.stats)
    erase_tenant = _blocking(AsyncClient.erase_tenant)


class MemoryClient(_Plain[AsyncMemoryClient]):
    """Banks of knowledge: what rekindle.memory_client.MemoryClient has. What yields there is for `for` here."""

    create_bank = _blocking(AsyncMemoryClient.create_bank)
    get_bank = _blocking(AsyncMemoryClient.get_bank)
    list_banks = _iterating(AsyncMemoryClient.list_banks)
    delete_bank = _blocking(AsyncMemoryClient.delete_bank)
    remember = _blocking(AsyncMemoryClient.remember)
    put_documents = _iterating(AsyncMemoryClient.put_documents)
    recall = _blocking(AsyncMemoryClient.recall)
    forget = _blocking(AsyncMemoryClient.forget)
    export_bank = _iterating(AsyncMemoryClient.export_bank)
    import_bank = _blocking(AsyncMemoryClient.import_bank)
    reembed = _iterating(AsyncMemoryClient.reembed)


class SyncGeneration:
    """One turn as it is generated: Generation, to be iterated by `for`. Leaving `with` early cancels the turn."""

    def __init__(self, loop: LoopThread, generation: Generation) -> None:
        self._loop, self._generation = loop, generation
        self._deltas = loop.iterate(aiter(generation))

    def __iter__(self) -> Iterator[pb.Delta]:
        return self._deltas

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def read(self) -> str:
        """Wait for the end of the reply; return its text."""
        return self._loop.run(self._generation.read())

    def cancel(self) -> None:
        """Stop the turn; any thread may. The iteration ends, without an error."""
        self._loop.call(self._generation.cancel)

    @property
    def text(self) -> str:
        return self._generation.text

    @property
    def token_ids(self) -> list[int]:
        return self._generation.token_ids

    @property
    def logprobs(self) -> list[pb.TokenLogprobs]:
        return self._generation.logprobs

    @property
    def finished(self) -> pb.Finished | None:
        return self._generation.finished

    @property
    def receipt(self) -> pb.Receipt | None:
        return self._generation.receipt


async def _make_client(target: str, options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(target, **options)  # grpc.aio binds a channel to the loop it is made on

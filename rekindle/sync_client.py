"""The plain client: the asynchronous one, driven on an event loop of its own in a background thread.

Adds no behaviour: every method is the asynchronous client's, with the same parameters, answers and errors.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from protos import rekindle_pb2 as pb
from rekindle.client import Client as AsyncClient
from rekindle.client import Generation, Input

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """Make the blocking counterpart of a method of the asynchronous client."""

    @wraps(method)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(method(self._client, *args, **kwargs))

    return call


class Client:
    """A connection to a Rekindle server. Use it as `with Client("host:port") as client:`. Safe to share by threads.

    Takes what rekindle.client.Client takes.
    """

    def __init__(self, target: str, **options: Any) -> None:
        self._loop = _LoopThread()
        try:
            self._client = self._loop.run(_make_client(target, options))
        except BaseException:
            self._loop.close()
            raise

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

    def list_sessions(self, *, page_size: int = 0, timeout_s: float | None = None) -> Iterator[pb.Session]:
        """Yield all sessions, as the asynchronous client does."""
        return self._loop.iterate(self._client.list_sessions(page_size=page_size, timeout_s=timeout_s))

    create_session = _blocking(AsyncClient.create_session)
    get_session = _blocking(AsyncClient.get_session)
    update_session = _blocking(AsyncClient.update_session)
    fork_session = _blocking(AsyncClient.fork_session)
    park_session = _blocking(AsyncClient.park_session)
    warm_session = _blocking(AsyncClient.warm_session)
    delete_session = _blocking(AsyncClient.delete_session)
    stats = _blocking(AsyncClient.stats)
    erase_tenant = _blocking(AsyncClient.erase_tenant)


class SyncGeneration:
    """One turn as it is generated: Generation, to be iterated by `for`. Leaving `with` early cancels the turn."""

    def __init__(self, loop: "_LoopThread", generation: Generation) -> None:
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


class _LoopThread:
    """An event loop in a thread, and ways into it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rekindle-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, and wait. A Ctrl-C here cancels the work there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        while (item := self.run(_next(items))) is not None:
            yield item

    def call(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _make_client(target: str, options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(target, **options)  # grpc.aio binds a channel to the loop it is made on


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)

"""One turn as a client sees it: its deltas as they come, tried again while that is safe."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, cast

import grpc.aio

from protos import rekindle_pb2 as pb
from rekindle.errors import Overloaded, RekindleError, Unavailable, from_rpc_error

_TURN_ATTEMPTS = 4
_FIRST_BACKOFF_S = 0.1

StartTurn = Callable[[pb.GenerateRequest, float], Awaitable[Any]]

Input = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text as it is, token ids, or chat messages: mappings with `role` and `content`."""


class Generation:
    """One turn as it is generated: iterate over its deltas. What has come so far is in `text` and `token_ids`.

    The turn starts with the first step of the iteration. `cancel()`, leaving `async with` early, and cancelling the
    task that iterates all stop it: the server then stores nothing of it.
    """

    def __init__(self, start: StartTurn, request: pb.GenerateRequest, timeout_s: float) -> None:
        self._start, self._request, self._timeout_s = start, request, timeout_s
        self._deltas = self._run()
        self._call: Any = None
        self._cancelled = False
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        """One for each token, if asked for."""
        self.finished: pb.Finished | None = None
        """Why the reply ended and what it used; None until it has ended."""

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def receipt(self) -> pb.Receipt | None:
        """What the prompt cost, by source; None until the reply has ended."""
        return self.finished.receipt if self.finished is not None else None

    def __aiter__(self) -> AsyncIterator[pb.Delta]:
        return self._deltas

    async def read(self) -> str:
        """Wait for the end of the reply; return its text."""
        async for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Stop the turn. The iteration ends, without an error; `finished` stays None if the turn had not ended."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    async def _run(self) -> AsyncIterator[pb.Delta]:
        deadline_s = time.monotonic() + self._timeout_s
        for attempt in range(1, _TURN_ATTEMPTS + 1):
            if self._cancelled:
                return
            self._call = await self._start(self._request, deadline_s - time.monotonic())
            try:
                if self._cancelled:  # meanwhile
                    return
                async for delta in self._receive():
                    yield delta
                return
            except RekindleError as error:
                wait_s = self._retry_wait_s(error, attempt)
                if attempt == _TURN_ATTEMPTS or wait_s is None or time.monotonic() + wait_s >= deadline_s:
                    raise
            finally:
                self._call.cancel()  # does nothing to a call that has ended
            await asyncio.sleep(wait_s)

    async def _receive(self) -> AsyncIterator[pb.Delta]:
        """Yield the deltas of one call. Raises RekindleError; ends early if `cancel` was called."""
        try:
            async for response in self._call:
                if response.WhichOneof("event") == "finished":
                    self.finished = response.finished
                    continue
                delta = response.delta
                self._pieces.append(delta.text)
                self.token_ids.extend(delta.token_ids)
                self.logprobs.extend(delta.logprobs)
                yield delta
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            if not self._cancelled:
                raise

    def _retry_wait_s(self, error: RekindleError, attempt: int) -> float | None:
        """How long to wait before another try, in seconds; None where trying again would not help or not be safe."""
        if self.token_ids or self._pieces:
            return None
        if isinstance(error, Overloaded):
            return error.retry_after_s
        # A connection that broke says nothing of the turn: if the session has it already, its key finds it.
        if isinstance(error, Unavailable):
            backoff_s = _FIRST_BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            return backoff_s if error.retry_after_s is None else error.retry_after_s
        return None


def input_field(input: Input) -> dict[str, Any]:
    """Put the input into the field of GenerateRequest that its kind belongs to."""
    if isinstance(input, str):
        return {"text": input}
    if input and isinstance(input[0], Mapping):
        messages = cast(Sequence[Mapping[str, str]], input)
        return {"chat": pb.ChatInput(messages=[pb.ChatMessage(**message) for message in messages])}
    return {"tokens": pb.TokenInput(token_ids=cast(Sequence[int], input))}

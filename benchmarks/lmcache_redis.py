"""LMCache's C++ Redis client, where its wheel is installed (`pip install --no-deps lmcache`): its extension alone.

Knows how to load and to drive it. Nothing here depends on it: what is not there is said, not missed.
"""

import importlib.util
import select
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_MODULE = "lmcache.lmcache_redis"
_WITHIN_S = 30.0


class LMCacheUnavailable(Exception):
    """It can't be loaded here; the message says why."""


class LMCacheRedis:
    """Batches of whole values over TCP, spread over `threads` connections with a thread each; no checksums, no TTL."""

    def __init__(self, host: str, port: int, *, threads: int) -> None:
        """Raises LMCacheUnavailable."""
        self._client = _extension().LMCacheRedisClient(host, port, threads)
        self._poll = select.poll()
        self._poll.register(self._client.event_fd(), select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def put(self, keys: Sequence[str], payloads: Sequence[memoryview]) -> None:
        self._finish(self._client.submit_batch_set(list(keys), list(payloads)))

    def get(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> None:
        self._finish(self._client.submit_batch_get(list(keys), list(buffers)))

    def _finish(self, batch: int) -> None:
        while True:
            if not self._poll.poll(_WITHIN_S * 1000):
                raise RuntimeError(f"LMCache's client did not finish within {_WITHIN_S:g} s")
            for done, ok, error, _ in self._client.drain_completions():
                if not ok:
                    raise RuntimeError(f"LMCache's client: {error}")
                if done == batch:
                    return


def _extension() -> Any:
    """Load the extension without its package, which wants a hundred others and CUDA. It links against torch."""
    package = importlib.util.find_spec("lmcache")
    folders = [] if package is None else package.submodule_search_locations or []
    found = [path for folder in folders for path in Path(folder).glob("lmcache_redis.*.so")]
    if not found:
        raise LMCacheUnavailable("lmcache is not installed")
    import torch  # noqa: F401  # brings the libraries that the extension needs

    loader = ExtensionFileLoader(_MODULE, str(found[0]))
    spec = importlib.util.spec_from_loader(_MODULE, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise LMCacheUnavailable(str(error)) from error
    return module

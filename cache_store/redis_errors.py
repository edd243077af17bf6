"""Turn what redis-py raises and what a server refuses into our errors, at the one border where both are seen."""

from collections.abc import Generator
from contextlib import contextmanager

from redis import exceptions as theirs

from cache_store.errors import InvalidRequest, StoreError, StoreFull, StoreUnavailable

_OUT_OF_MEMORY = "OOM"


class StoreStalled(StoreUnavailable):
    """Redis went silent in the middle, or did not take what was sent."""


class DeadlinePassed(StoreUnavailable):
    """The caller's time is over. Says nothing about the server."""


@contextmanager
def ours(doing: str) -> Generator[None, None, None]:
    """Translate redis-py's errors; the original stays as `__cause__`."""
    try:
        yield
    except theirs.TimeoutError as error:
        raise StoreStalled(f"{doing}: {error}") from error
    except (theirs.ConnectionError, theirs.RedisClusterException, theirs.ClusterError, OSError) as error:
        raise StoreUnavailable(f"{doing}: {error}") from error
    except (theirs.ReadOnlyError, theirs.TryAgainError) as error:  # a failover, a resharding: over in a moment
        raise StoreUnavailable(f"{doing}: {error}") from error
    except theirs.RedisError as error:
        if isinstance(error, theirs.OutOfMemoryError) or _OUT_OF_MEMORY in str(error):  # the latter: inside a script
            raise StoreFull(f"{doing}: {error}") from error
        raise StoreError(f"{doing}: {error}") from error


def refused_url(error: Exception) -> InvalidRequest:
    """What is wrong with a Redis URL. What is between a password's / and its user is taken for the port, and quoted."""
    quotes = "Port could not be cast" in str(error)
    return InvalidRequest("redis_url", "the port is no number (in a password, / is %2F)" if quotes else str(error))


def refusal(reply: str) -> StoreError:
    """The error that an error reply (without its "-") to a block's command stands for."""
    full = reply.startswith(_OUT_OF_MEMORY) or f"-{_OUT_OF_MEMORY}" in reply  # the latter: inside a script
    return StoreFull(reply) if full else StoreUnavailable(reply)

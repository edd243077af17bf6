"""From a URL to a block store: the one place that knows every kind."""

from cache_store.errors import InvalidRequest
from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.sealing import Sealer
from cache_store.store import BlockStore


def open_block_store(
    url: str,
    layout: KVLayout,
    fingerprint: bytes,
    *,
    timeout_s: float,
    refresh_ttl_s: int,
    namespace: str = "rekindle",
    sealer: Sealer | None = None,
) -> BlockStore | None:
    """The store that `url` names, None for an empty one. Raises InvalidRequest("redis_url", ...) for a bad one.

    Returns at once, whether Redis is there or not. `timeout_s` is how long it may be silent; a block used is kept for
    `refresh_ttl_s` seconds more. With a `sealer`, what leaves this process is sealed.
    """
    if not url:
        return None
    if url == "memory://":
        return MemoryBlockStore(refresh_ttl_s=refresh_ttl_s)
    if url.startswith("memory:"):
        raise InvalidRequest("redis_url", f"memory:// takes nothing after it, got {url!r}")
    # Here: a worker without Redis needs no redis-py.
    from cache_store.frame import Framer
    from cache_store.redis_link import link_to
    from cache_store.redis_store import RedisBlockStore

    return RedisBlockStore(
        link_to(url, timeout_s=timeout_s),
        Framer(layout, fingerprint, sealer),
        refresh_ttl_s=refresh_ttl_s,
        namespace=namespace,
    )

"""Device blocks as payloads and back, each through the codec it is due.

Knows which codec that is. How one works is `worker/tiers/codecs`'; what becomes of payloads is told by who moves them.
"""

from collections.abc import Mapping

from cache_store.codecs import RAW, codec_for
from cache_store.store import Encoding
from worker.ids import BlockId
from worker.tiers.codecs.codec import Codec
from worker.tiers.kv_cache import KVCache
from worker.tiers.moves import Content


class BlockCoder:
    """Called from the threads that move; whoever calls sees to it that nobody else writes the block meanwhile."""

    def __init__(self, kv_cache: KVCache, codecs: Mapping[str, Codec], *, first_rung: str) -> None:
        """`codecs` by name; raw blocks need none. `first_rung` names what ladder sessions' blocks are encoded in."""
        self._kv_cache = kv_cache
        self._codecs = codecs
        self._first_rung = first_rung

    def encode(self, block: BlockId, content: Content, into: memoryview) -> Encoding:
        """Write a block's payload to the front of `into`, which has room for a raw one."""
        is_full = content.num_tokens == self._kv_cache.layout.block_tokens
        codec = codec_for(content.codec, is_full=is_full, first_rung=self._first_rung)
        if codec is RAW:
            self._kv_cache.read_block(block, into)
            return Encoding(RAW, len(into))
        kv = self._kv_cache.view(block)
        num_bytes = self._codecs[codec.name].encode(
            kv, into, num_tokens=content.num_tokens, first_position=content.first_position
        )
        return Encoding(codec, num_bytes)

    def decode(self, encoding: Encoding, payload: memoryview, content: Content, block: BlockId) -> None:
        """Write what a payload holds into a block. On return the model may attend to it. Raises BlockCorrupt or
        BlockForeign for what the codec does not write."""
        if encoding.codec is RAW:
            self._kv_cache.write_block(block, payload)
            return
        kv = self._kv_cache.view(block)
        self._codecs[encoding.codec.name].decode(
            payload, kv, num_tokens=content.num_tokens, first_position=content.first_position
        )

"""A turn as those see it who remember it: what was said on both sides, and where."""

from typing import NamedTuple

from cache_store.records import SessionRecord
from protos import rekindle_pb2 as pb
from server.directory import Worker
from server.memory_text import said_in, transcript


class Exchange(NamedTuple):
    """A turn that was committed."""

    record: SessionRecord
    """As it was before."""
    turn: int
    """Its number."""
    request: pb.GenerateRequest
    """As it came, without memories in it."""
    reply: str
    worker: Worker
    """Who ended it."""

    @property
    def banks(self) -> list[str]:
        """That its session writes to."""
        return [attached.bank for attached in self.record.banks if attached.access.writes]

    async def text(self, *, most_bytes: int) -> str:
        """Both sides, each cut where it is long; empty where the user said nothing. What tokens say the worker tells:
        raises WorkerLost, WorkerRefused."""
        said = said_in(self.request)
        if self.request.HasField("tokens"):
            said = await self.worker.client.detokenize(self.request.tokens.token_ids)
        if not said.strip():
            return ""
        return transcript(said, self.reply, is_chat=self.request.HasField("chat"), most_bytes=most_bytes)

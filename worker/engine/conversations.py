"""What a conversation is to this engine: the root of its names, what becomes of it, and how long a reply may be."""

from collections.abc import Sequence

from cache_store.codecs import fidelity_of
from cache_store.ids import BlockHash, root_hash
from cache_store.inserts import Inserts
from worker.calls import Context, ContextPolicy, GenerateCall
from worker.engine.context_policies import Policies, beyond
from worker.engine.epochs import Beyond
from worker.engine.history import History
from worker.errors import ContextTooLong
from worker.model.load import LoadedModel

DEFAULT_NEW_TOKENS = 256


class Conversations:
    """Any thread may ask."""

    def __init__(self, loaded: LoadedModel, policies: Policies, *, num_blocks: int) -> None:
        """`num_blocks` are the device's."""
        self.policies = policies
        self._names_from = loaded.names_from
        self._marks_from = loaded.marks_from
        self._can_turn = loaded.rope is not None
        self._block_tokens = loaded.layout.block_tokens
        self._most_tokens = min(loaded.max_context_tokens, num_blocks * self._block_tokens)

    def beyond(self, context: Context, *bounds: int) -> Beyond | None:
        """What becomes of a conversation beyond the window; `bounds` are those of the turn that runs."""
        return beyond(self.policies, context, *bounds)

    def root(self, tenant: str, codec: str) -> BlockHash:
        return root_hash(self._names_from, tenant, fidelity_of(codec), self._marks_from)

    def history(self, tenant: str, tokens: Sequence[int], codec: str, context: Context) -> History:
        context.check(len(tokens))
        going_on = self.beyond(context)
        inserts = self.inserts(context)
        return History(tenant, tokens, codec, self.root(tenant, codec), self._block_tokens, going_on, inserts)

    def inserts(self, context: Context, new: tuple[int, ...] = ()) -> Inserts | None:
        """What is inserted in a conversation. None: nothing, or this model's keys can't be turned."""
        bounds = (*context.insert_bounds, *new)
        can_insert = bounds and self._can_turn and context.policy is ContextPolicy.ERROR
        return Inserts(bounds) if can_insert else None

    def max_new_tokens(self, call: GenerateCall, going_on: Beyond | None) -> int:
        """How many tokens the reply may have. Raises ContextTooLong, with the numbers."""
        prompt = len(call.history) + len(call.input)
        assert prompt, "an empty prompt"
        if going_on is not None:
            return call.max_new_tokens if call.max_new_tokens is not None else DEFAULT_NEW_TOKENS
        room = self._most_tokens - prompt
        wanted = call.max_new_tokens if call.max_new_tokens is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
        if wanted > room:
            raise ContextTooLong(
                f"{prompt} prompt tokens ({len(call.history)} of history, {len(call.input)} new) and {wanted} new ones "
                f"are {prompt + wanted}, {self._most_tokens} fit"
            )
        return wanted

"""Which context policies a worker serves, with how many tokens: by its settings, its model and its device's room."""

from cache_store.errors import InvalidRequest
from worker.calls import Context, ContextPolicy
from worker.config import WorkerConfig
from worker.engine.epochs import Beyond, Epochs, recall_epochs, window_epochs
from worker.engine.recollection import CHOSEN_BY
from worker.model.load import LoadedModel

UNIT_TOKENS = 16
_ASKING_TOKENS = 64
_HEARING_TOKENS = 256
_RECALL_SHARE = 4
"""One part in so many of the positions is for what is recalled, unless a setting says otherwise."""

Policies = dict[ContextPolicy, Epochs]


def context_epochs(config: WorkerConfig, loaded: LoadedModel, num_device_blocks: int) -> Policies:
    """None where keys can't be turned exactly, or there are too few positions, or blocks."""
    if loaded.rope is None:
        return {}
    block_tokens = loaded.layout.block_tokens
    positions = min(config.context_tokens or loaded.max_context_tokens, loaded.max_context_tokens)
    room = num_device_blocks * block_tokens
    found = policy_epochs(positions, block_tokens, config.recall_tokens)
    return {policy: epochs for policy, epochs in found.items() if _needed(epochs) <= room}


def policy_epochs(positions: int, block_tokens: int, recall_tokens: int = 0) -> Policies:
    """Of the policies that so many positions are enough for; `recall_tokens` 0 is a share of them."""
    found = {
        ContextPolicy.WINDOW: window_epochs(positions, block_tokens),
        ContextPolicy.RECALL: recall_epochs(
            positions,
            block_tokens,
            recall_tokens or positions // _RECALL_SHARE,
            unit=UNIT_TOKENS,
            asking=_ASKING_TOKENS,
            hearing=_HEARING_TOKENS,
            chosen_by=CHOSEN_BY,
        ),
    }
    return {policy: epochs for policy, epochs in found.items() if epochs is not None}


def beyond(policies: Policies, context: Context, *bounds: int) -> Beyond | None:
    """What becomes of a conversation beyond the window; `bounds` are those of the turn that runs. None: it ends there.

    Raises InvalidRequest for a policy that is not served here.
    """
    if context.policy is ContextPolicy.ERROR:
        return None
    epochs = policies.get(context.policy)
    if epochs is None:
        raise InvalidRequest(
            "context_policy",
            f"{context.policy.name} is not served: this model's keys can't be turned to other positions exactly, or it "
            "has too few positions or too little room for it",
        )
    return Beyond(epochs, (*context.turn_bounds, *bounds))


def _needed(epochs: Epochs) -> int:
    """Tokens that one request may hold at once: going on to the next epoch, and reading what it copies."""
    return 2 * epochs.reach

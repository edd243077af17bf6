"""What a worker's prefill costs, learned from its own steps: seconds by new tokens and by the context behind them.

Knows no request and no tier: what bringing blocks back costs is `worker/tiers/transfer_costs.py`'s.
"""

from collections.abc import Sequence

from worker.engine.fit import Fit
from worker.engine.plan import Span

_NEWEST = 0.2
_START = (2e-3, 1e-3, 1e-8)
"""Seconds a step, a token, and a token and token of context: only until something was measured."""
_STEPS_SHARE = 0.1


class CostModel:
    """Prefill of n tokens behind c tokens takes `steps * a + n * b + n * (c + n / 2) * d` seconds. One thread."""

    def __init__(self, *, max_prefill_tokens: int) -> None:
        """`max_prefill_tokens` fit into one step."""
        self._max_prefill_tokens = max_prefill_tokens
        self._fit = Fit(_START, newest=_NEWEST)

    @property
    def is_measured(self) -> bool:
        """Else it says what it was told at the start."""
        return self._fit.is_measured

    def ran(self, spans: Sequence[Span], seconds: float) -> None:
        """Learn from a step that ran these spans of prompts and nothing else."""
        tokens = sum(span.tokens for span in spans)
        attended = sum(span.tokens * (span.start + span.tokens / 2) for span in spans)
        kind = (tokens.bit_length(), int(attended / tokens).bit_length())
        self._fit.observe(kind, (1.0, tokens, attended), seconds)

    def prefill_s(self, span: Span) -> float:
        """Seconds for a span alone. 0 for an empty one."""
        if span.tokens <= 0:
            return 0.0
        steps = -(-span.tokens // self._max_prefill_tokens)
        return self._fit.predict((steps, span.tokens, span.tokens * (span.start + span.tokens / 2)))

    @property
    def worthwhile_tokens(self) -> int:
        """So many tokens make a step of which its fixed cost is a small part."""
        step_s, token_s, _ = self._fit.coefficients
        tokens = step_s / (_STEPS_SHARE * token_s) if token_s > 0 else self._max_prefill_tokens
        return int(min(max(tokens, 1), self._max_prefill_tokens))

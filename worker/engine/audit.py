"""Judge a turn on restored KV: the logits it used beside those computed from its tokens alone. Logits in, a report out.

Knows neither blocks nor tiers; what is run when is `worker/engine/auditor.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache_store.codecs import INT4, INT8, K8V4, LADDER
from worker.calls import AuditReport

MAX_RECORDED_BYTES = 16 << 20
"""Of one turn's logits: 8192 positions of a vocabulary of 512, 27 of one of 152,000. Every position attends to the
whole prompt, so the first few show what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What KL(computed || restored), in nats, may be over a reply: on average, and at any one position.

    KV of other tokens disturbs every position, so the mean tells; the maximum sees what only one position depends on.
    """

    mean_kl: float
    max_kl: float


_EXACT = {"float32": Bound(1e-6, 1e-5), "float16": Bound(5e-4, 5e-3), "bfloat16": Bound(5e-3, 5e-2)}
"""Of codecs that give KV back bit for bit, by dtype: the same sums in other shapes differ by their rounding alone. On
tiny random models of ten architectures that is up to 7e-12 on average and 7e-11 at one position in float32, 8e-4 and
3e-3 in bfloat16, for prompts of 96 to 1600 tokens; other tokens' KV in one block of 6 gives 0.03 to 2.2 on average, in
one of 100 still 0.02. (A random model of 0.6 billion parameters, its logits nearly flat: 3e-5, against 0.04.) float16
rounds 8 times finer than bfloat16, and KL goes with the square."""

_LOSSY = {
    INT8.name: Bound(0.05, 0.5),
    K8V4.name: Bound(0.2, 1.0),
    INT4.name: Bound(0.5, 2.5),
    LADDER: Bound(0.5, 2.5),
}
"""Twice or more what the codecs do to the same models, whose random weights make much of little: 3e-3, 0.1 and 0.3 on
average, 0.02, 0.4 and 1.0 at one position (a random mixture of experts may exceed k8v4's and int4's: a small error
sends a token to another expert). A ladder's block may be on its last rung. A wrong block among many can stay within
these: audits of exact codecs see more."""


def bound_of(codec: str, dtype: str) -> Bound:
    """What a session of this codec may show on a model of this dtype. Exact codecs have the rounding alone."""
    return _LOSSY.get(codec, _EXACT[dtype])


class Recording:
    """The logits that chose a reply's tokens, in host memory: from the first on, as many as `max_bytes` hold."""

    def __init__(self, max_bytes: int = MAX_RECORDED_BYTES) -> None:
        self.rows: list[torch.Tensor] = []
        """Each [vocab] float32."""
        self._max_bytes = max_bytes

    def keep(self, row: torch.Tensor) -> None:
        """Note the logits of the next token; no more once the recording is full (it always has the first)."""
        if not self.rows or (len(self.rows) + 1) * row.nbytes <= self._max_bytes:
            self.rows.append(row)


class Comparison:
    """A turn's logits beside the computed ones, which come in one part after the other."""

    def __init__(self, used: Sequence[torch.Tensor], tokens: Sequence[int]) -> None:
        """`used[i]` ([vocab] float32) are the logits by which the turn chose `tokens[i]`."""
        assert len(used) == len(tokens) > 0, f"{len(used)} rows of logits for {len(tokens)} tokens"
        self._used = used
        self._tokens = torch.tensor(tokens)
        self._agreeing_tokens = 0
        self._kl = torch.empty(0, dtype=torch.float64)
        self._drift = torch.empty(0, dtype=torch.float64)

    @property
    def is_complete(self) -> bool:
        return len(self._kl) == len(self._used)

    def add(self, computed: torch.Tensor) -> None:
        """Compare the next positions: [n, vocab] float32 logits, on any device."""
        start = len(self._kl)
        end = start + len(computed)
        used = torch.stack([*self._used[start:end]]).to(computed.device)
        tokens = self._tokens[start:end, None].to(computed.device)
        self._agreeing_tokens += int((used.argmax(-1) == computed.argmax(-1)).sum())
        # float64: rounding at float32 is as large as the difference that exact codecs are held to
        log_used, log_computed = used.double().log_softmax(-1), computed.double().log_softmax(-1)
        terms = log_computed.exp() * (log_computed - log_used)
        kl = terms.masked_fill(log_computed == -torch.inf, 0.0).sum(-1).clamp_min(0.0)
        drift = (log_computed - log_used).gather(1, tokens).squeeze(1)
        self._kl = torch.cat([self._kl, kl.cpu()])
        self._drift = torch.cat([self._drift, drift.cpu()])

    def report(self, bound: Bound) -> AuditReport:
        """The verdict over all positions. Logits that are no numbers are within no bound."""
        assert self.is_complete, f"{len(self._kl)} of {len(self._used)} positions compared"
        mean_kl, max_kl = self._kl.mean().item(), self._kl.max().item()
        return AuditReport(
            tokens=len(self._kl),
            agreeing_tokens=self._agreeing_tokens,
            mean_kl=mean_kl,
            max_kl=max_kl,
            nll_drift=self._drift.mean().item(),
            passed=mean_kl <= bound.mean_kl and max_kl <= bound.max_kl,
        )

"""Choose each request's next token from its logits. Knows no requests: rows of logits, and a state for each row.

What a row gets depends on that row alone, so a seed gives the same tokens whatever else is in the batch. Filters and
penalties are those of transformers' logits processors, in its order; presence and frequency are OpenAI's.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cache_store.errors import ServingError
from worker.calls import Sampling, Token, TokenLogprobs

_GREEDY_BELOW = 1e-5
"""Under this temperature the likeliest token is drawn anyhow, and the division could overflow."""


class LogitsNotFinite(ServingError):
    """The model gave NaN or infinity in the batch's rows `rows`: these requests can't go on, the others can."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(rows)
        self.rows = rows

    def __str__(self) -> str:
        return f"the model's logits are not finite (batch rows {', '.join(map(str, self.rows))})"


class RowState:
    """What one request brings to each step's sampling. Built by `Sampler.start`, told of each token by `append`."""

    __slots__ = ("counts", "position", "sampling", "seen")

    def __init__(self, sampling: Sampling, *, seen: torch.Tensor | None, counts: torch.Tensor | None, position: int):
        self.sampling = sampling
        self.seen = seen
        """[vocab] bool: tokens of prompt and reply. None without a repetition penalty."""
        self.counts = counts
        """[vocab] float32: how often the reply has each token. None without presence or frequency penalty."""
        self.position = position
        """Place in the reply of the token to come, from 0."""

    def append(self, token_id: int) -> None:
        """Make `token_id` part of the reply."""
        self.position += 1
        if self.seen is not None:
            self.seen[token_id] = True
        if self.counts is not None:
            self.counts[token_id] += 1

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < _GREEDY_BELOW

    @property
    def is_plain(self) -> bool:
        """Does the maximum of the logits as they are decide?"""
        return self.is_greedy and self.seen is None and self.counts is None


class Sampler:
    """Samples for rows of `vocab_size` logits on `device`. Holds nothing between steps."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)

    def start(self, sampling: Sampling, prompt: Sequence[int], reply: Sequence[int] = ()) -> RowState:
        """Prepare a request whose reply so far is `reply` (some, when it continues another worker's)."""
        seen = counts = None
        if sampling.repetition_penalty != 1.0:
            seen = self._histogram([*prompt, *reply]) > 0
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = self._histogram(reply)
        return RowState(sampling, seen=seen, counts=counts, position=len(reply))

    def sample(self, logits: torch.Tensor, rows: Sequence[RowState]) -> list[Token]:
        """Choose a token for each row of `logits` [n, vocab] float32, which stay as they are.

        Raises LogitsNotFinite naming the bad rows; nothing is chosen then, and the other rows may be sampled again.
        """
        assert logits.shape == (len(rows), self._vocab_size), f"{tuple(logits.shape)} logits for {len(rows)} rows"
        if not rows:
            return []
        maxima, argmaxes = logits.max(dim=-1)  # NaN wins a maximum, so this pass finds it too
        finite = torch.isfinite(maxima).tolist()
        if not all(finite):
            raise LogitsNotFinite(tuple(row for row, good in enumerate(finite) if not good))
        chosen: list[int] = argmaxes.tolist()
        others = [index for index, row in enumerate(rows) if not row.is_plain]
        if others:
            for index, token_id in zip(others, _choose(logits[others], [rows[i] for i in others]), strict=True):
                chosen[index] = token_id
        logprobs = _logprobs(logits, rows, chosen)
        return [Token(token_id, logprobs.get(index)) for index, token_id in enumerate(chosen)]

    def _histogram(self, token_ids: Sequence[int]) -> torch.Tensor:
        counts = np.bincount(np.asarray(token_ids, dtype=np.int64), minlength=self._vocab_size)
        # A checkpoint's embedding can have more rows than its head: such tokens have no logit to penalize.
        return torch.from_numpy(counts[: self._vocab_size].astype(np.float32)).to(self._device)


def _choose(scores: torch.Tensor, rows: Sequence[RowState]) -> list[int]:
    """Penalize, then take the maximum of greedy rows and draw for the others. Overwrites `scores`."""
    for row_scores, row in zip(scores, rows, strict=True):
        _penalize_(row_scores, row)
    random = [index for index, row in enumerate(rows) if not row.is_greedy]
    if len(random) == len(rows):
        return _draw(filtered(scores, [row.sampling for row in rows]), rows)
    chosen: list[int] = scores.argmax(dim=-1).tolist()
    if random:
        drawing = [rows[index] for index in random]
        drawn = _draw(filtered(scores[random], [row.sampling for row in drawing]), drawing)
        for index, token_id in zip(random, drawn, strict=True):
            chosen[index] = token_id
    return chosen


def _penalize_(scores: torch.Tensor, row: RowState) -> None:
    sampling = row.sampling
    if row.seen is not None:
        penalty = sampling.repetition_penalty
        # 0 is multiplied: CUDA divides by the reciprocal, that of 1e-40 is infinite, and 0 times that is no number.
        torch.where(row.seen, torch.where(scores <= 0, scores * penalty, scores / penalty), scores, out=scores)
    if row.counts is not None:
        scores -= sampling.frequency_penalty * row.counts + sampling.presence_penalty * (row.counts > 0)


def filtered(scores: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Apply temperature, top_k, top_p and min_p: [n, vocab] scores, -inf where a token is out.

    As in transformers, except that tokens tied at the border of top_p all stay (there, a sort decides).
    """

    def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([*values], dtype=dtype, device=scores.device).unsqueeze(1)

    vocab_size, extremes = scores.shape[-1], torch.finfo(scores.dtype)
    # Extreme penalties and temperatures may overflow; the maximum must stay a number.
    scores = (scores / column(s.temperature for s in samplings)).clamp_(extremes.min, extremes.max)
    top_ks = [s.top_k if s.top_k < vocab_size else 0 for s in samplings]
    if any(top_ks):
        largest = torch.topk(scores, max(top_ks)).values
        borders = largest.gather(1, column((max(k, 1) - 1 for k in top_ks), torch.int64))
        scores = scores.masked_fill_((scores < borders) & column(top_ks, torch.bool), -torch.inf)
    if any(s.top_p < 1.0 for s in samplings):
        ascending = _sorted(scores)
        tail = torch.softmax(ascending, dim=-1).cumsum(dim=-1) <= column(1 - s.top_p for s in samplings)
        borders = ascending.gather(1, tail.sum(dim=-1, keepdim=True).clamp_(max=vocab_size - 1))
        limited = column((s.top_p < 1.0 for s in samplings), torch.bool)
        scores = scores.masked_fill_((scores < borders) & limited, -torch.inf)
    if any(s.min_p > 0.0 for s in samplings):
        probs = torch.softmax(scores, dim=-1)
        least = column(s.min_p for s in samplings) * probs.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill_(probs < least, -torch.inf)
    return scores


def _sorted(scores: torch.Tensor) -> torch.Tensor:
    """Each row's values, ascending. On a CPU numpy's vectorized sort takes a twelfth of torch's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    return torch.sort(scores, dim=-1).values


def _draw(scores: torch.Tensor, rows: Sequence[RowState]) -> list[int]:
    """Invert each row's cumulative distribution at the row's own random number."""
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    uniforms = torch.tensor([[uniform(row.sampling.seed, row.position)] for row in rows], dtype=torch.float64)
    targets = uniforms.to(scores.device) * cumulative[:, -1:]
    # Strictly above the target: a token of weight zero is never drawn, and u < 1 keeps the last one in reach.
    drawn: list[int] = torch.searchsorted(cumulative, targets, right=True).squeeze(1).tolist()
    return drawn


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of this place of the reply: a function of both alone, on any machine."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _logprobs(logits: torch.Tensor, rows: Sequence[RowState], chosen: Sequence[int]) -> dict[int, TokenLogprobs]:
    """Log-probabilities under the raw logits, for the rows that ask, by row."""
    wanted = {index: row.sampling.logprobs for index, row in enumerate(rows) if row.sampling.logprobs is not None}
    if not wanted:
        return {}
    asked = logits[list(wanted)]
    total = torch.logsumexp(asked, dim=-1, keepdim=True)
    tokens = torch.tensor([[chosen[index]] for index in wanted], device=logits.device)
    own = (asked.gather(1, tokens) - total).squeeze(1).tolist()
    top = torch.topk(asked, min(max(wanted.values()), asked.shape[-1]))
    ids, values = top.indices.tolist(), (top.values - total).tolist()
    return {
        index: TokenLogprobs(own[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, (index, count) in enumerate(wanted.items())
    }

"""The sampler: exact against transformers' processors, fair, and blind to the rest of the batch."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from cache_store.errors import InvalidRequest
from worker.calls import Sampling
from worker.engine.sampler import LogitsNotFinite, RowState, Sampler, filtered, uniform

VOCAB = 500


def random_logits(rows: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def by_transformers(scores: torch.Tensor, sampling: Sampling, token_ids: Iterable[int] = ()) -> torch.Tensor:
    """One row [1, vocab] through transformers' processors, in the order of its `_get_logits_processor`."""
    ids = torch.tensor([[*token_ids]], dtype=torch.int64)
    chain: list[hf.LogitsProcessor] = []
    if sampling.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0.0:
        chain.append(hf.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chain.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(hf.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            chain.append(hf.MinPLogitsWarper(sampling.min_p))
    for processor in chain:
        scores = processor(ids, scores)
    return scores


FILTERS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=1),
    Sampling(temperature=0.9, top_k=40),
    Sampling(temperature=0.9, top_k=10 * VOCAB),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=2.0, top_p=0.01),
    Sampling(temperature=0.8, min_p=0.05),
    Sampling(temperature=5.0, min_p=1.0),
    Sampling(temperature=1.1, top_k=50, top_p=0.8, min_p=0.02),
]


def test_filters_of_a_mixed_batch_are_transformers_own_bit_for_bit() -> None:
    samplings = FILTERS * 3
    logits = random_logits(len(samplings))
    ours = filtered(logits, samplings)
    for row, sampling in enumerate(samplings):
        assert torch.equal(ours[row], by_transformers(logits[row : row + 1], sampling)[0]), sampling


def test_top_k_keeps_all_tokens_tied_with_the_last_as_transformers_does() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    sampling = Sampling(temperature=1.0, top_k=2)
    kept = filtered(logits, [sampling])
    assert torch.equal(kept, by_transformers(logits, sampling))
    assert (kept > -torch.inf).sum() == 4


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_greedy_under_a_repetition_penalty_is_transformers_choice_at_each_step(penalty: float) -> None:
    sampler, sampling = Sampler(VOCAB), Sampling(repetition_penalty=penalty)
    prompt, reply = [3, 3, 17, 250], list[int]()
    row = sampler.start(sampling, prompt)
    for step in range(20):
        logits = random_logits(1, seed=7) + 0.3 * random_logits(1, seed=step)
        (token,) = sampler.sample(logits, [row])
        assert token.token_id == by_transformers(logits, sampling, prompt + reply).argmax().item()
        reply.append(token.token_id)
        row.append(token.token_id)


def test_presence_and_frequency_penalties_count_the_reply_alone() -> None:
    sampler, sampling = Sampler(4), Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.tensor([[2.0, 1.4, 1.2, 0.0]])
    row = sampler.start(sampling, prompt=[0, 0, 0])
    replies = []
    for _ in range(4):
        (token,) = sampler.sample(logits, [row])
        replies.append(token.token_id)
        row.append(token.token_id)
    # 2.0; then 2.0-0.75=1.25 < 1.4; then 1.4-0.75=0.65 leaves 1.25; then 2.0-1.0=1.0 < 1.2
    assert replies == [0, 1, 0, 2]


def test_a_reply_continued_elsewhere_samples_as_if_it_had_never_moved() -> None:
    sampler = Sampler(VOCAB)
    sampling = Sampling(
        temperature=1.0, seed=11, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, top_p=0.9
    )
    logits = [random_logits(1, seed=step) for step in range(30)]
    whole = generate(sampler, sampler.start(sampling, [1, 2]), logits)
    moved = generate(sampler, sampler.start(sampling, [1, 2], whole[:12]), logits[12:])
    assert whole[:12] + moved == whole


def generate(sampler: Sampler, row: RowState, steps: Iterable[torch.Tensor]) -> list[int]:
    reply = []
    for logits in steps:
        (token,) = sampler.sample(logits, [row])
        row.append(token.token_id)
        reply.append(token.token_id)
    return reply


@pytest.mark.parametrize("vocab", [500, 32_003])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(vocab: int) -> None:
    sampler = Sampler(vocab)
    kinds = [*FILTERS, Sampling(), Sampling(temperature=1.0, presence_penalty=1.0, logprobs=2)]
    rows = [
        sampler.start(Sampling(temperature=1.0, seed=5, top_p=0.95), []),
        *(sampler.start(kind, [1, 2, 3], [4, 4]) for kind in kinds),
    ]
    logits = random_logits(len(rows), seed=3, vocab=vocab)
    together = [token.token_id for token in sampler.sample(logits, rows)]
    alone = [sampler.sample(logits[i : i + 1], [row])[0].token_id for i, row in enumerate(rows)]
    assert together == alone
    backwards = sampler.sample(logits.flip(0), rows[::-1])
    assert [token.token_id for token in backwards] == together[::-1]


def test_the_logits_are_left_as_they_were() -> None:
    sampler = Sampler(VOCAB)
    sampling = Sampling(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0, frequency_penalty=1.0)
    logits = random_logits(2)
    before = logits.clone()
    sampler.sample(logits, [sampler.start(sampling, [1], [2]), sampler.start(Sampling(), [])])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=6, top_p=0.9)])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(sampling: Sampling) -> None:
    draws = 20_000
    sampler = Sampler(12)
    logits = random_logits(1, vocab=12) / 4
    probs = torch.softmax(by_transformers(logits, sampling)[0].double(), dim=-1).numpy()
    row = sampler.start(sampling, [])
    counts = np.zeros(12)
    for _ in range(draws // 500):
        batch = []
        for _ in range(500):
            batch.append(RowState(sampling, seen=None, counts=None, position=row.position))
            row.append(0)
        for token in sampler.sample(logits.expand(500, -1).contiguous(), batch):
            counts[token.token_id] += 1
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = draws * probs[possible]
    chi_squared = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = possible.sum() - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom) + 8


def test_the_random_numbers_are_a_fixed_function_of_seed_and_position() -> None:
    assert uniform(0, 0) == np.random.Generator(np.random.Philox(key=0, counter=0)).random()
    numbers = {uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(1000)}
    assert len(numbers) == 3000
    assert all(0.0 <= number < 1.0 for number in numbers)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    sampler = Sampler(VOCAB)
    logits = random_logits(3)
    rows = [
        sampler.start(Sampling(temperature=2.0, top_k=3, seed=1, logprobs=0, repetition_penalty=1.5), [1, 2]),
        sampler.start(Sampling(), []),
        sampler.start(Sampling(logprobs=20), []),
    ]
    expected = torch.log_softmax(logits.double(), dim=-1)
    first, second, third = sampler.sample(logits, rows)
    assert first.logprobs is not None
    assert first.logprobs.top == ()
    assert first.logprobs.logprob == pytest.approx(expected[0, first.token_id].item(), abs=1e-5)
    assert second.logprobs is None
    assert third.logprobs is not None
    top = expected[2].topk(20)
    assert [token_id for token_id, _ in third.logprobs.top] == top.indices.tolist()
    assert [logprob for _, logprob in third.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert third.logprobs.logprob == third.logprobs.top[0][1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_with_broken_logits_are_named_and_the_others_can_go_on(bad: float) -> None:
    sampler = Sampler(VOCAB)
    logits = random_logits(3)
    logits[1, 77] = bad
    rows = [sampler.start(Sampling(temperature=t), []) for t in (0.0, 1.0, 1.0)]
    with pytest.raises(LogitsNotFinite) as caught:
        sampler.sample(logits, rows)
    assert caught.value.rows == (1,)
    assert "batch rows 1" in str(caught.value)
    assert len(sampler.sample(logits[[0, 2]], [rows[0], rows[2]])) == 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-30),
        Sampling(temperature=1.0, repetition_penalty=1e-38),
        Sampling(temperature=1.0, repetition_penalty=3e38, top_p=0.5, min_p=0.5),
        Sampling(temperature=100.0, top_p=1e-9),
    ],
)
def test_extreme_settings_still_give_a_token_of_the_vocabulary(sampling: Sampling) -> None:
    sampler = Sampler(VOCAB)
    row = sampler.start(sampling, range(VOCAB))
    for step in range(20):
        (token,) = sampler.sample(random_logits(1, seed=step) * 100, [row])
        assert 0 <= token.token_id < VOCAB
        row.append(token.token_id)


def test_prompt_tokens_beyond_the_head_are_ignored_by_penalties() -> None:
    sampler = Sampler(8)
    row = sampler.start(Sampling(repetition_penalty=1.5), [2, 8, 900])
    assert row.seen is not None
    assert row.seen.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("wrong", [{"temperature": math.nan}, {"top_p": 0.0}, {"min_p": 1.1}, {"seed": -1}])
def test_sampling_that_makes_no_sense_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{next(iter(wrong))}"

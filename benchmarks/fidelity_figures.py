"""What became of replies that were given on restored KV, as figures and bars. Pure: no server, no tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, starmap
from statistics import fmean
from typing import Final

from benchmarks.fidelity_arms import Arm, Parking, Reply
from benchmarks.harness import Bar, at_least, at_most
from cache_store.codecs import INT4, INT8, K8V4, LOSSLESS, named
from models.dialogues import Act, Dialogue, exact

RATIOS: Final = {LOSSLESS.name: 1.3, INT8.name: 2.0, K8V4.name: 2.6, INT4.name: 3.6}
"""How many times smaller a full block must get."""

POINTS_LOST: Final = {INT8.name: 0.0, K8V4.name: 1.0, INT4.name: 3.0}
"""How much exact-answer accuracy may fall, in percentage points."""

INT8_AGREEMENT: Final = 0.995


@dataclass(frozen=True, slots=True)
class Agreement:
    """Replies beside those of the undisturbed run, turn by turn, as shares."""

    tokens: float
    """Of positions, those with the same token. Where one reply is longer, its rest counts as different."""
    replies: float
    """Of replies, those equal to the last token."""
    max_logprob_change: float
    """Nats, over the tokens before each reply's first different one. Not 0 for the exact codecs either: restored
    blocks lie elsewhere on the device, and attention adds up what it reads in another order."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Audited turns together: next-token distributions on restored KV beside those on KV computed from tokens."""

    turns: int
    failed: int
    tokens: int
    agreeing_tokens: int
    mean_kl: float
    """Nats, over all tokens."""
    max_kl: float
    nll_drift: float
    """Nats a token, over all tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecFigures:
    """One codec beside the undisturbed run."""

    codec: str
    full_blocks: int
    ratio: float
    """KV bytes of full blocks over the bytes of their payloads in Redis."""
    ratio_of_all: float
    """With the unfull blocks, of which the tokens that they hold count. Those are kept exactly."""
    encode_gb_s: float
    """KV bytes a second on the way from the device to host memory, by a thread of the lowest priority."""
    decode_gb_s: float
    """On the way from host memory to the device."""
    agreement: Agreement
    same_bits_as_raw: float | None
    """Of an exact codec: share of replies whose tokens' log-probabilities equal those of the raw codec's replies to the
    last bit, the blocks having moved alike; None where the raw codec was not held."""
    accuracy: float
    undisturbed_accuracy: float
    resumed_turns: int
    not_from_redis_alone: int
    """Resumed turns whose receipt names another source than Redis for anything that was parked."""
    unaudited: int
    failed_audits: int
    """Beyond the bound that the codec states."""
    drift: Drift
    drift_by_resumes: dict[str, Drift]
    """By how often the session had been resumed: "1", "2-3", "4-7" and so on."""
    last_turn: Drift
    """Of sessions resumed before every turn: what was computed on restored KV is itself restored."""
    last_turn_resumed_once: Drift
    same_bits_resumed_often: float
    """Of the last turns, the share with the same tokens at the same log-probabilities, to the last bit, where the
    session was parked and warmed over and over before it, and where it was parked once. Less than 1 would be a block
    that was encoded again."""


def judge(
    dialogues: Sequence[Dialogue], undisturbed: Arm, arms: Mapping[Parking, Arm], raw: Arm | None
) -> CodecFigures:
    """Judge a codec by its arms, one of each parking. `raw` is the raw codec's, parked before every turn, if any."""
    every_turn = arms[Parking.EVERY_TURN]
    replies = list(chain(*every_turn.conversations))
    resumed = [reply for arm in arms.values() for reply in chain(*arm.conversations) if reply.parked_tokens is not None]
    last, once, often = (
        [replies[-1] for replies in arms[parking].conversations]
        for parking in (Parking.EVERY_TURN, Parking.ONCE, Parking.OFTEN)
    )
    stored = every_turn.stored
    return CodecFigures(
        codec=every_turn.codec,
        full_blocks=stored.full_blocks,
        ratio=_share(stored.full_kv_bytes, stored.full_payload_bytes),
        ratio_of_all=_share(stored.kv_bytes, stored.payload_bytes),
        encode_gb_s=_gb_s(every_turn, "device", "host"),
        decode_gb_s=_gb_s(every_turn, "host", "device"),
        agreement=agreement(replies, list(chain(*undisturbed.conversations))),
        same_bits_as_raw=(
            None if raw is None or named(every_turn.codec).lossy else same_bits(replies, chain(*raw.conversations))
        ),
        accuracy=accuracy(dialogues, every_turn.conversations),
        undisturbed_accuracy=accuracy(dialogues, undisturbed.conversations),
        resumed_turns=len(resumed),
        not_from_redis_alone=sum(not reply.is_from_redis_alone for reply in resumed),
        unaudited=sum(not reply.receipt.HasField("audit") for reply in resumed),
        failed_audits=drift(resumed).failed,
        drift=drift(replies),
        drift_by_resumes=drift_by_resumes(replies),
        last_turn=drift(last),
        last_turn_resumed_once=drift(once),
        same_bits_resumed_often=same_bits(often, once),
    )


def bars(figures: CodecFigures, *, on_recall: bool) -> list[Bar]:
    """What must hold: of any model what follows from how Rekindle works, of rekindle-recall all that codecs promise."""
    codec, agree = figures.codec, figures.agreement
    found = [
        at_least("full blocks in Redis", figures.full_blocks, 1),
        at_most("resumed turns not from Redis alone", figures.not_from_redis_alone, 0),
        at_most("resumed turns without an audit", figures.unaudited, 0),
        at_most("audits failed", figures.failed_audits, 0),
        at_least("same bits in the last turn, resumed often or once", figures.same_bits_resumed_often, 1),
    ]
    if not named(codec).lossy:
        found.append(at_least("share of replies equal", agree.replies, 1))
    if figures.same_bits_as_raw is not None:
        found.append(at_least("same bits in every turn as raw", figures.same_bits_as_raw, 1))
    if on_recall:
        if codec in RATIOS:
            found.append(at_least("times smaller", figures.ratio, RATIOS[codec]))
        if codec in POINTS_LOST:
            lost = 100 * (figures.undisturbed_accuracy - figures.accuracy)
            found.append(at_most("points of accuracy lost", lost, POINTS_LOST[codec]))
        if codec == INT8.name:
            found.append(at_least("share of tokens equal", agree.tokens, INT8_AGREEMENT))
    return [replace(bar, name=f"{codec}: {bar.name}") for bar in found]


def agreement(replies: Sequence[Reply], others: Sequence[Reply]) -> Agreement:
    """Compare replies to the same turns of the same dialogues."""
    pairs = list(zip(replies, others, strict=True))
    same = sum(a == b for reply, other in pairs for a, b in zip(reply.token_ids, other.token_ids, strict=False))
    return Agreement(
        tokens=_share(same, sum(max(len(reply.token_ids), len(other.token_ids)) for reply, other in pairs)),
        replies=fmean(reply.token_ids == other.token_ids for reply, other in pairs),
        max_logprob_change=max(chain.from_iterable(starmap(_logprob_changes, pairs)), default=0.0),
    )


def same_bits(replies: Iterable[Reply], others: Iterable[Reply]) -> float:
    """Share of replies with the same tokens at the same log-probabilities, bit for bit."""
    return fmean(
        (reply.token_ids, reply.logprobs) == (other.token_ids, other.logprobs)
        for reply, other in zip(replies, others, strict=True)
    )


def accuracy(dialogues: Sequence[Dialogue], conversations: Sequence[Sequence[Reply]]) -> float:
    """Share of the questions that were answered exactly; "I don't know" is an answer where nothing was told."""
    pairs = chain(
        *(zip(one.turns, replies, strict=True) for one, replies in zip(dialogues, conversations, strict=True))
    )
    right = [exact(reply.text, turn) for turn, reply in pairs if turn.act in (Act.ASK, Act.ASK_UNKNOWN)]
    return _share(sum(right), len(right))


def drift(replies: Iterable[Reply]) -> Drift:
    """Put the audits of these turns together, each with the weight of its tokens."""
    audits = [reply.receipt.audit for reply in replies if reply.receipt.HasField("audit")]
    tokens = sum(audit.tokens for audit in audits)
    return Drift(
        turns=len(audits),
        failed=sum(not audit.passed for audit in audits),
        tokens=tokens,
        agreeing_tokens=sum(audit.agreeing_tokens for audit in audits),
        mean_kl=_share(sum(audit.mean_kl * audit.tokens for audit in audits), tokens),
        max_kl=max((audit.max_kl for audit in audits), default=0.0),
        nll_drift=_share(sum(audit.nll_drift * audit.tokens for audit in audits), tokens),
    )


def drift_by_resumes(replies: Iterable[Reply]) -> dict[str, Drift]:
    """The drift of turns whose sessions had been resumed about equally often, in classes that double."""
    classes: dict[int, list[Reply]] = {}
    for reply in replies:
        if reply.resumes:
            classes.setdefault(reply.resumes.bit_length() - 1, []).append(reply)
    return {
        f"{1 << power}-{(2 << power) - 1}" if power else "1": drift(members)
        for power, members in sorted(classes.items())
    }


def _logprob_changes(reply: Reply, other: Reply) -> Iterator[float]:
    for token, other_token, logprob, other_logprob in zip(
        reply.token_ids, other.token_ids, reply.logprobs, other.logprobs, strict=False
    ):
        if token != other_token:
            return
        yield abs(logprob - other_logprob)


def _gb_s(arm: Arm, source: str, target: str) -> float:
    """How fast blocks of the arm's codec moved, coding included, in bytes as the device has them."""
    labels = f'{{codec="{arm.codec}",source="{source}",target="{target}"}}'
    kv_bytes, seconds = (
        arm.metrics.get(f"rekindle_moved_{what}_total{labels}", 0.0) for what in ("raw_bytes", "seconds")
    )
    return _share(kv_bytes / 1e9, seconds)


def _share(part: float, whole: float) -> float:
    """Of nothing, 0."""
    return part / whole if whole else 0.0

"""Audits: honest restores pass; a wrong block is found, gone from all tiers and computed right; turns go on as ever."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from structlog.testing import CapturingLogger

from cache_store.codecs import LADDER, LOSSLESS, RAW, SESSION_CODECS, fidelity_of
from cache_store.embedded_redis import RedisServer
from cache_store.ids import BlockHash, root_hash
from cache_store.open_store import open_block_store
from cache_store.store import Store
from tests import tiny_models
from tests.engines import TENANT, EngineFactory, Turn, generate, poison, start
from tests.systems import System, WorkerProcess, scrape
from worker import translate
from worker.calls import AuditReport, Event, Finished, FinishReason, GenerateCall, Receipt, Sampling, Token
from worker.engine.admission import Ticket
from worker.engine.audit import Comparison, Recording, bound_of
from worker.engine.auditor import Auditor
from worker.engine.engine import Engine
from worker.engine.pool import BlockPool
from worker.engine.prefix import full_names
from worker.engine.request import Request
from worker.engine.sampler import RowState
from worker.engine.step import Chunk
from worker.metrics import WorkerMetrics

PROMPT = tuple(range(5, 105))
OTHER = tuple(range(300, 400))
SECOND = (7, 7, 9, 11, 2)
BLOCK = 16


def parked(engine: Engine, *, drop_host: bool = True) -> tuple[int, ...]:
    """The history of a first turn, in Redis (or in the host tier) and no more on the device."""
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine.park(TENANT, history, drop_host=drop_host, ttl_s=60).result(30)
    poison(engine)
    return history


def audit_of(turn: Turn) -> AuditReport:
    assert turn.receipt.audit is not None
    return turn.receipt.audit


def settled_audits(engine: Engine, count: int = 1) -> dict[str, int]:
    """The counts, once so many audits have come to an end."""
    eventually(lambda: sum(engine.stats().audits.values()) == count)
    return engine.stats().audits


def counted(**results: int) -> dict[str, int]:
    return {"passed": 0, "mismatched": 0, "skipped": 0, **results}


def names_of(engine: Engine, tokens: Sequence[int], codec: str = RAW.name) -> list[BlockHash]:
    return full_names(root_hash(engine.fingerprint, TENANT, fidelity_of(codec)), tokens, BLOCK)


def plant(engine: Engine, redis_url: str, history: Sequence[int], index: int, *, codec: str = RAW.name) -> None:
    """Put other tokens' KV under a block's name as a worker would: header and checksum are right."""
    generate(engine, (), OTHER, max_new_tokens=1)
    block = engine._pool.find(names_of(engine, OTHER)[1])
    assert block is not None
    payload = memoryview(bytearray(engine.layout.block_bytes))
    engine._tiers.device.read_block(block, payload)
    store = open_block_store(redis_url, engine.layout, engine.fingerprint, timeout_s=2, refresh_ttl_s=60)
    assert store is not None
    name, fidelity = names_of(engine, history, codec)[index], fidelity_of(codec)
    store.put([Store(name, BLOCK, payload, ttl_s=60, first_position=index * BLOCK, fidelity=fidelity)])
    store.close()


# The comparison


def test_equal_logits_agree_everywhere() -> None:
    logits = torch.randn(5, 30)
    comparison = Comparison(list(logits), [1, 2, 3, 4, 5])
    comparison.add(logits)
    report = comparison.report(bound_of(RAW.name, "float32"))
    assert report == AuditReport(tokens=5, agreeing_tokens=5, mean_kl=0, max_kl=0, nll_drift=0, passed=True)


def test_a_report_tells_divergence_drift_and_agreement() -> None:
    used = [torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()]
    computed = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    comparison = Comparison(used, [0, 1])
    comparison.add(computed[:1])
    assert not comparison.is_complete
    comparison.add(computed[1:])
    report = comparison.report(bound_of("int4", "float32"))
    divergence = 0.75 * math.log(3) - 0.25 * math.log(3)
    assert report.max_kl == pytest.approx(divergence)
    assert report.mean_kl == pytest.approx(divergence / 2)
    assert report.nll_drift == pytest.approx(-math.log(3) / 2)
    assert (report.tokens, report.agreeing_tokens) == (2, 1)


def test_a_token_that_both_exclude_is_no_difference() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    comparison = Comparison(list(logits), [1])
    comparison.add(logits)
    assert comparison.report(bound_of(RAW.name, "float32")).passed


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_never_pass(spoilt: float) -> None:
    comparison = Comparison([torch.zeros(4)], [1])
    comparison.add(torch.tensor([[0.0, spoilt, 0.0, 0.0]]))
    assert not comparison.report(bound_of("int4", "bfloat16")).passed


def test_one_position_beyond_its_bound_is_a_mismatch_however_good_the_others_are() -> None:
    logits = torch.zeros(1000, 8)
    comparison = Comparison([*logits[1:], torch.tensor([3.0, *[0.0] * 7])], [0] * 1000)
    comparison.add(logits)
    bound = bound_of(RAW.name, "bfloat16")
    report = comparison.report(bound)
    assert report.mean_kl < bound.mean_kl
    assert report.max_kl > bound.max_kl
    assert not report.passed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_codec_has_a_bound_and_no_lossy_one_is_tighter_than_rounding(dtype: str) -> None:
    exact = bound_of(RAW.name, dtype)
    assert bound_of(LOSSLESS.name, dtype) == exact
    for codec in SESSION_CODECS:
        bound = bound_of(codec, dtype)
        assert exact.mean_kl <= bound.mean_kl <= bound_of(LADDER, dtype).mean_kl
        assert exact.max_kl <= bound.max_kl <= bound_of(LADDER, dtype).max_kl


def test_a_recording_keeps_the_first_logits_and_no_more_than_it_may() -> None:
    recording = Recording(max_bytes=100)
    rows = torch.randn(4, 10)
    for row in rows:
        recording.keep(row)
    assert torch.equal(torch.stack(recording.rows), rows[:2])
    tiny = Recording(max_bytes=1)
    tiny.keep(rows[0])
    assert len(tiny.rows) == 1


# Honest restores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_an_honest_restore_passes(
    build_engine: EngineFactory, redis_url: str, tmp_path: Path, architecture: str, dtype: str
) -> None:
    checkpoint = tiny_models.save_tiny_model(tmp_path / architecture, architecture)
    engine = build_engine(model=str(checkpoint), dtype=dtype, redis_url=redis_url, max_step_tokens=64, max_running=8)
    for drop_host in (True, False):
        history = parked(engine, drop_host=drop_host)
        turn = generate(engine, history, SECOND, audit=True)
        report = audit_of(turn)
        assert report.passed, report
        assert report.tokens == 8
        engine.drop(TENANT, (*history, *SECOND, *turn.reply), with_redis=True).result(30)
    assert engine.stats().audits == counted(passed=2)


@pytest.mark.parametrize("codec", SESSION_CODECS)
def test_an_honest_restore_through_any_codec_passes_and_a_wrong_one_does_not(
    build_engine: EngineFactory, redis_url: str, codec: str
) -> None:
    engine = build_engine(redis_url=redis_url, codec_ladder="int4")
    history = (*PROMPT, *generate(engine, (), PROMPT, codec=codec).reply)
    engine.park(TENANT, history, codec=codec, drop_host=True, ttl_s=60).result(30)
    poison(engine)
    honest = generate(engine, history, SECOND, codec=codec, audit=True)
    assert honest.receipt.redis_tokens == len(history) - 1
    report = audit_of(honest)
    assert report.passed, report
    assert (report.mean_kl > bound_of(RAW.name, "float32").mean_kl) == (codec not in (RAW.name, LOSSLESS.name))
    history = (*history, *SECOND, *honest.reply)
    engine.park(TENANT, history, codec=codec, drop_host=True, ttl_s=60).result(30)
    plant(engine, redis_url, history, 1, codec=codec)
    assert not audit_of(generate(engine, history, SECOND, codec=codec, audit=True)).passed


def test_sampled_penalized_and_cut_replies_pass_too(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    history = parked(engine)
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.5, seed=7)
    stream = start(engine, history, SECOND, max_new_tokens=500, sampling=sampling, audit=True)
    for _ in range(9):
        assert isinstance(stream.next(), Token)
    engine.finish(stream.request_id, 5)
    report = audit_of(stream.result())
    assert report.passed
    assert report.tokens >= 9


def test_an_audit_changes_neither_tokens_nor_what_is_cached(build_engine: EngineFactory, redis_url: str) -> None:
    plain, audited = build_engine(redis_url=redis_url), build_engine(redis_url=redis_url)
    history = parked(plain)
    expected = generate(plain, history, SECOND, max_new_tokens=40)
    turn = generate(audited, history, SECOND, max_new_tokens=40, audit=True)
    assert turn.reply == expected.reply
    assert turn.receipt.redis_tokens == expected.receipt.redis_tokens == len(history) - 1
    plain.check()
    audited.check()
    assert audited._pool._by_hash.keys() == plain._pool._by_hash.keys()
    assert audited._pool.stats() == plain._pool.stats()
    assert audited.stats().computed_tokens == turn.receipt.computed_tokens == expected.receipt.computed_tokens


def test_a_turn_that_restored_nothing_is_not_audited(build_engine: EngineFactory) -> None:
    engine = build_engine(audit_rate=1.0)
    first = generate(engine, (), PROMPT, audit=True)
    second = generate(engine, (*PROMPT, *first.reply), SECOND, audit=True)
    assert second.receipt.device_tokens > 0
    assert first.receipt.audit is second.receipt.audit is None
    assert engine.stats().audits == counted()


def test_a_rate_audits_turns_behind_their_back(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, audit_rate=1.0)
    turn = generate(engine, parked(engine), SECOND)
    assert turn.receipt.audit is None
    assert settled_audits(engine) == counted(passed=1)


def test_without_a_rate_no_logits_are_kept(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    stream = start(engine, parked(engine), SECOND, max_new_tokens=200)
    assert isinstance(stream.next(), Token)
    (request,) = engine._scheduler.running
    assert request.restored
    assert request.recording is None
    stream.result()
    assert engine.stats().audits == counted()


def test_a_share_of_the_restored_turns_is_audited() -> None:
    draws = iter([0.1, 0.5, 0.29, 0.3])
    auditor = an_auditor(BlockPool(8), rate=0.3, draw=lambda: next(draws))
    requests = [a_turn(number) for number in range(4)]
    for request in requests:
        request.restored = {BlockHash(b"somewhere")}
    auditor.watch(requests, torch.zeros(4, 32))
    assert [request.recording is not None for request in requests] == [True, False, True, False]


def test_busy_and_preempted_turns_pass_or_are_skipped(build_engine: EngineFactory, redis_url: str) -> None:
    roomy = build_engine()
    block = roomy.layout.block_bytes
    tight = build_engine(
        redis_url=redis_url, device_cache_bytes=24 * block, host_cache_bytes=24 * block, audit_rate=1.0
    )
    prompts = [tuple(range(n, n + 64)) for n in range(0, 160, 16)]
    histories = [(*prompt, *generate(tight, (), prompt).reply) for prompt in prompts]
    streams = [start(tight, history, SECOND, max_new_tokens=60) for history in histories]
    replies = [stream.result().reply for stream in streams]
    assert replies == [generate(roomy, history, SECOND, max_new_tokens=60).reply for history in histories]
    generate(tight, histories[0], SECOND, audit=True)
    tight.drain(30)
    audits = tight.stats().audits
    assert audits["mismatched"] == 0
    assert sum(audits.values()) > 0


# Wrong blocks


def test_a_wrong_block_is_found_deleted_everywhere_and_then_computed_right(
    build_engine: EngineFactory, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr("worker.engine.auditor.log", log)
    engine = build_engine(redis_url=own_redis.url)
    history = parked(engine)
    wrong = names_of(engine, history)[2]
    plant(engine, own_redis.url, history, 2)

    turn = generate(engine, history, SECOND, max_new_tokens=40, audit=True)

    assert turn.receipt.redis_tokens == len(history) - 1
    assert not audit_of(turn).passed
    samples = WorkerMetrics(engine.stats).registry.get_sample_value
    assert samples("rekindle_audits_total", {"result": "mismatched"}) == 1
    (call,) = log.calls
    assert call.method_name == "error"
    assert wrong.hex() in call.kwargs["restored"]
    tokens = (*history, *SECOND, *turn.reply)
    located = engine.locate(TENANT, tokens, with_redis=True).result(30)
    assert (located.device_tokens, located.host_tokens, located.redis_tokens) == (0, 0, 0)

    fresh = build_engine()
    again = generate(engine, history, SECOND, max_new_tokens=40, audit=True)
    assert again.receipt.computed_tokens == len(history) + len(SECOND)
    assert again.reply == generate(fresh, history, SECOND, max_new_tokens=40).reply != turn.reply


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_first_block_is_found_in_every_dtype(
    build_engine: EngineFactory, own_redis: RedisServer, dtype: str
) -> None:
    engine = build_engine(redis_url=own_redis.url, dtype=dtype)
    history = parked(engine)
    plant(engine, own_redis.url, history, 0)
    assert not audit_of(generate(engine, history, SECOND, audit=True)).passed


def test_what_others_compute_on_a_wrong_block_is_computed_again(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url)
    history = parked(engine)
    plant(engine, own_redis.url, history, 1)
    neighbour = start(engine, history, SECOND, max_new_tokens=700)
    first = neighbour.next()
    assert isinstance(first, Token)
    assert not audit_of(generate(engine, history, (*SECOND, 3), audit=True)).passed
    assert engine.stats().running == 1, "the neighbour was to be in the middle of its turn"
    reply = (first.token_id, *neighbour.result().reply)
    tokens = (*history, *SECOND, *reply)
    engine.park(TENANT, tokens, drop_host=True, ttl_s=60).result(30)
    after = generate(engine, tokens, SECOND, audit=True)
    assert after.receipt.redis_tokens == len(tokens) - 1
    assert audit_of(after).passed


def test_what_is_being_restored_while_it_is_found_wrong_is_computed(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=10, restore_timeout_s=20)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    longer = (*history, *OTHER, *generate(engine, history, OTHER).reply)
    engine.park(TENANT, longer, drop_host=True, ttl_s=60).result(30)
    poison(engine)
    plant(engine, own_redis.url, history, 1)
    audited = start(engine, history, SECOND, max_new_tokens=100, audit=True)
    assert isinstance(audited.next(), Token)
    own_redis.pause()
    restoring = start(engine, longer, SECOND)
    turn = restoring.result()
    assert engine._scheduler._tables.distrusted, "the store is still to be asked to forget them"
    own_redis.resume()
    assert not audit_of(audited.result()).passed
    assert turn.receipt.computed_tokens == len(longer) + len(SECOND)
    assert turn.reply == generate(build_engine(), longer, SECOND).reply


def test_what_is_being_warmed_while_it_is_found_wrong_stays_nowhere(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=10, restore_timeout_s=20)
    history = parked(engine)
    plant(engine, own_redis.url, history, 1)
    audited = start(engine, history, SECOND, max_new_tokens=100, audit=True)
    assert isinstance(audited.next(), Token)
    engine.drop(TENANT, history, with_redis=False).result(30)  # as if other conversations had taken all the room
    own_redis.pause()
    warmed = engine.warm(TENANT, history)
    eventually(lambda: bool(engine._scheduler._tables.distrusted))
    own_redis.resume()
    assert not audit_of(audited.result()).passed
    assert warmed.result(30).restored_tokens == 0
    located = engine.locate(TENANT, history, with_redis=True).result(30)
    assert (located.device_tokens, located.host_tokens, located.redis_tokens) == (0, 0, 0)


def eventually(check: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def test_a_mismatch_found_while_redis_is_down_is_counted_and_never_restored_again_here(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=0.5)
    history = parked(engine)
    plant(engine, own_redis.url, history, 1)
    stream = start(engine, history, SECOND, max_new_tokens=300, audit=True)
    assert isinstance(stream.next(), Token)
    own_redis.kill()
    assert not audit_of(stream.result()).passed
    own_redis.start()
    assert engine.stats().audits == counted(mismatched=1)
    assert generate(engine, history, SECOND).receipt.computed_tokens == len(history) + len(SECOND)


# Audits that come to nothing


def test_a_cancelled_turn_drops_its_audit(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, audit_rate=1.0)
    stream = start(engine, parked(engine), SECOND, max_new_tokens=1000)
    assert isinstance(stream.next(), Token)
    engine.cancel(stream.request_id)
    engine.drain(5)
    assert engine.stats().audits == counted()
    engine.check()


def test_a_step_that_fails_ends_the_audit_and_the_turn_is_told(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    history = parked(engine)
    runner = engine._stepper._runner

    class FailsInAudits:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            if engine._auditor._current is not None:
                raise RuntimeError("out of memory")
            return runner.run(chunks)

    engine._stepper._runner = FailsInAudits()
    turn = generate(engine, history, SECOND, audit=True)
    assert turn.receipt.audit is None
    assert len(turn.reply) == 8
    assert engine.stats().audits == counted(skipped=1)
    engine.check()


def test_an_audit_that_fails_in_a_step_costs_the_turns_in_it_nothing(
    build_engine: EngineFactory, redis_url: str
) -> None:
    engine = build_engine(redis_url=redis_url)
    history = parked(engine)
    runner = engine._stepper._runner
    failed: list[int] = []

    class FailsWithAudits:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            logits = runner.run(chunks)
            audit = engine._auditor._current
            if audit is not None and any(chunk.block_table is audit.table for chunk in chunks):
                failed.append(len([chunk for chunk in chunks if chunk.block_table is not audit.table]))
                raise RuntimeError("out of memory")
            return logits

    engine._stepper._runner = FailsWithAudits()
    neighbour = start(engine, (), OTHER, max_new_tokens=100)
    first = neighbour.next()
    assert isinstance(first, Token)
    turn = generate(engine, history, SECOND, audit=True)
    assert turn.receipt.audit is None
    assert engine.stats().audits == counted(skipped=1)
    reply = (first.token_id, *neighbour.result().reply)
    assert failed == [1], "the neighbour was to be in the audit's step"
    assert reply == generate(build_engine(), (), OTHER, max_new_tokens=100).reply


def test_turns_that_fail_without_the_audit_too_are_told(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    history = parked(engine)
    runner = engine._stepper._runner
    failed: list[bool] = []

    class FailsFromAuditsOn:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            if engine._auditor._current is not None or failed:
                failed.append(len(chunks) > 1)
                raise RuntimeError("out of memory")
            return runner.run(chunks)

    engine._stepper._runner = FailsFromAuditsOn()
    neighbour = start(engine, (), OTHER, max_new_tokens=100)
    assert isinstance(neighbour.next(), Token)
    assert generate(engine, history, SECOND, audit=True).receipt.audit is None
    with pytest.raises(RuntimeError, match="out of memory"):
        neighbour.result()
    assert failed == [True, False], "once with the audit, once without"


def test_a_comparison_that_fails_ends_the_audit_and_the_engine_goes_on(
    build_engine: EngineFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(redis_url=redis_url)
    history = parked(engine)

    def add(comparison: Comparison, computed: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Comparison, "add", add)
    turn = generate(engine, history, SECOND, audit=True)
    assert turn.receipt.audit is None
    assert engine.stats().audits == counted(skipped=1)
    assert len(generate(engine, history, SECOND).reply) == 8


def test_audits_run_beside_decoding_a_little_a_step_and_never_beside_prompts(
    build_engine: EngineFactory, redis_url: str
) -> None:
    engine = build_engine(redis_url=redis_url, audit_rate=1.0, max_step_tokens=64, max_prefill_tokens=64, max_running=8)
    history = parked(engine)
    runner = engine._stepper._runner
    steps: list[tuple[int, int, int]] = []

    class Watches:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            audit = engine._auditor._current
            audited = [
                len(chunk.token_ids) for chunk in chunks if audit is not None and chunk.block_table is audit.table
            ]
            others = [len(chunk.token_ids) for chunk in chunks]
            for num_tokens in audited:
                others.remove(num_tokens)
            steps.append((sum(audited), len(others), max(others, default=0)))
            return runner.run(chunks)

    neighbour = start(engine, (), OTHER, max_new_tokens=150)
    assert isinstance(neighbour.next(), Token)
    engine._stepper._runner = Watches()
    generate(engine, history, SECOND)
    generate(engine, (), OTHER[::-1])
    neighbour.result()
    assert settled_audits(engine) == counted(passed=1)
    assert sum(audited for audited, _, _ in steps) == len(history) + len(SECOND) + 8 - 1
    assert all(longest <= 1 for audited, _, longest in steps if audited)
    assert max(audited for audited, _, _ in steps) == 16
    assert any(audited and decoding for audited, decoding, _ in steps)
    assert any(longest > 1 for _, _, longest in steps)


def test_an_audit_gives_way_to_turns_and_is_skipped_without_room() -> None:
    pool = BlockPool(4)
    auditor = an_auditor(pool)
    heard: list[Event] = []
    assert not auditor.give_way()
    finish(auditor, a_turn(0, heard.append, audit=True))
    assert heard == []
    assert auditor.plan(10)
    assert pool.stats().used == 3
    assert auditor.give_way()
    assert pool.stats().used == 0
    finish(auditor, a_turn(1, heard.append, audit=True))
    taken = pool.take(2)
    assert taken is not None
    assert auditor.plan(10) == []
    assert [type(event) for event in heard] == [Finished, Finished]
    assert auditor.counts == counted(skipped=2)
    assert not auditor.is_awaited


def test_audits_beyond_the_queue_are_skipped() -> None:
    auditor = an_auditor(BlockPool(4))
    for number in range(20):
        finish(auditor, a_turn(number))
    assert auditor.counts == counted(skipped=4)


def test_audits_that_turns_wait_for_go_before_the_others_and_take_their_places() -> None:
    auditor = an_auditor(BlockPool(4))
    heard: list[Event] = []
    for number in range(16):
        finish(auditor, a_turn(number))
    for number in (16, 17):
        finish(auditor, a_turn(number, heard.append, audit=True))
    assert auditor.counts == counted(skipped=2)
    for expected in range(2):
        assert len(heard) == expected
        auditor.ran(auditor.plan(41), torch.zeros(2, 32))
    assert [event.receipt.audit is not None for event in heard if isinstance(event, Finished)] == [True, True]
    assert len(auditor.plan(10)) == 1, "the others follow"


@pytest.mark.parametrize("is_begun", [True, False])
@pytest.mark.parametrize(("deadline_after_s", "ends_after_s"), [(None, 60.0), (600.0, 60.0), (10.0, 9.5)])
def test_a_turn_waits_for_its_audit_so_long_and_not_past_its_deadline(
    is_begun: bool, deadline_after_s: float | None, ends_after_s: float
) -> None:
    pool = BlockPool(4)
    auditor = an_auditor(pool)
    heard: list[Event] = []
    before_s = time.monotonic()
    deadline_s = None if deadline_after_s is None else before_s + deadline_after_s
    finish(auditor, a_turn(0, heard.append, audit=True, deadline_s=deadline_s))
    if is_begun:
        auditor.plan(10)
    auditor.expire(before_s + ends_after_s - 0.01)
    assert heard == []
    auditor.expire(time.monotonic() + ends_after_s)
    (event,) = heard
    assert isinstance(event, Finished)
    assert event.receipt.audit is None
    assert auditor.counts == counted(skipped=1)
    assert auditor.plan(10) == []
    assert pool.stats().used == 0


def test_a_turn_hears_that_it_is_over_though_its_audit_finds_no_room(
    build_engine: EngineFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.auditor._MAX_WAIT_S", 0.2)
    engine = build_engine(redis_url=redis_url, max_step_tokens=2, max_running=2)
    history = parked(engine)
    start(engine, (), OTHER, max_new_tokens=900)
    audited = start(engine, history, SECOND, audit=True)
    start(engine, (), OTHER[::-1], max_new_tokens=800)
    turn = audited.result()
    assert turn.receipt.redis_tokens > 0
    assert turn.receipt.audit is None
    assert engine.stats().audits == counted(skipped=1)
    assert engine.stats().running == 2, "the batch was to stay full"
    engine.drain(0)


def test_an_audit_takes_what_a_step_has_left_and_asks_for_the_logits_that_chose() -> None:
    auditor = an_auditor(BlockPool(4))
    finish(auditor, a_turn(0))
    assert auditor.plan(0) == []
    first = auditor.plan(30)
    assert [(chunk.start, len(chunk.token_ids), chunk.wants_logits) for chunk in first] == [(0, 30, False)]
    auditor.ran(first, torch.empty(0, 32))
    second = auditor.plan(30)
    assert [(chunk.start, len(chunk.token_ids), chunk.wants_logits) for chunk in second] == [
        (30, 9, False),
        (39, 1, True),
        (40, 1, True),
    ]
    auditor.ran(second, torch.zeros(2, 32))
    assert auditor.counts == counted(passed=1)


def test_whoever_stops_waiting_for_an_audit_hears_nothing_more() -> None:
    pool = BlockPool(4)
    auditor = an_auditor(pool)
    heard: list[Event] = []
    turns = [a_turn(number, heard.append, audit=True) for number in range(2)]
    for turn in turns:
        finish(auditor, turn)
    auditor.plan(10)
    for turn in turns:
        auditor.cancel(turn.call.request_id)
    assert heard == []
    assert pool.stats().used == 0
    assert auditor.plan(10) == []
    assert auditor.counts == counted(skipped=2)


def test_turns_that_wait_for_an_audit_are_told_when_the_worker_leaves() -> None:
    pool = BlockPool(4)
    auditor = an_auditor(pool)
    heard: list[Event] = []
    for number in range(2):
        finish(auditor, a_turn(number, heard.append, audit=True))
    auditor.plan(10)
    auditor.drop_all()
    assert [event.receipt.audit for event in heard if isinstance(event, Finished)] == [None, None]
    assert pool.stats().used == 0


def an_auditor(pool: BlockPool, *, rate: float = 1.0, draw: Callable[[], float] = lambda: 0.0) -> Auditor:
    return Auditor(pool, rate=rate, draw=draw, block_tokens=BLOCK, dtype="float32", discard=lambda names: Future())


def a_turn(
    number: int,
    listener: Callable[[Event], None] = lambda event: None,
    *,
    audit: bool = False,
    deadline_s: float | None = None,
) -> Request:
    """A turn of 40 prompt tokens and a reply of two, recorded: an audit of it needs three blocks."""
    call = GenerateCall(
        request_id=f"turn-{number}",
        tenant=TENANT,
        history=tuple(range(30)),
        input=tuple(range(10)),
        sampling=Sampling(),
        max_new_tokens=2,
        deadline_s=deadline_s,
        audit=audit,
    )
    row = RowState(call.sampling, seen=None, counts=None, position=0)
    root = root_hash(b"model", TENANT)
    return Request(
        call, listener, root=root, block_tokens=BLOCK, max_new_tokens=2, row=row, ticket=Ticket("", 40, lambda: None)
    )


def finish(auditor: Auditor, request: Request) -> None:
    request.restored = {BlockHash(b"somewhere")}
    for token_id in (1, 2):
        auditor.watch([request], torch.zeros(1, 32))
        request.tokens.append(token_id)
    receipt = Receipt(device_tokens=0, host_tokens=0, redis_tokens=40, computed_tokens=0)
    auditor.finished(request, Finished(FinishReason.LENGTH, receipt, 2))


async def test_a_client_sees_the_audit_that_it_asked_for(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    async def passed() -> float:
        return sum(
            [(await scrape(worker.metrics_address))["rekindle_audits_total{result=passed}"] for worker in workers]
        )

    before = await passed()
    session_id = (await system.client.create_session()).session_id
    await system.say("Remember all of this, and prove that you do.", session_id)
    await system.client.park_session(session_id, drop_host=True)
    turn = await system.say("Well?", session_id, audit=True)
    assert turn.receipt.redis_tokens > 0
    audit = turn.receipt.audit
    assert audit.passed
    assert audit.tokens == audit.agreeing_tokens == len(turn.token_ids)
    assert await passed() == before + 1
    unasked = await system.say("And now?", session_id)
    assert not unasked.receipt.HasField("audit")


def test_a_report_reaches_the_receipt_that_the_client_sees() -> None:
    report = AuditReport(tokens=8, agreeing_tokens=7, mean_kl=0.25, max_kl=0.5, nll_drift=-0.125, passed=False)
    call = a_turn(0, audit=True).call
    for audit in (report, None):
        receipt = Receipt(device_tokens=0, host_tokens=0, redis_tokens=40, computed_tokens=0, audit=audit)
        finished = Finished(FinishReason.LENGTH, receipt, 2)
        event = translate.finished_event(
            call, finished, num_tokens=2, last_token_id=1, stop_string=None, worker_id="worker-1"
        )
        message = event.finished.receipt
        assert message.HasField("audit") == (audit is not None)
    assert call.audit

"""Protobuf messages to the engine's calls and back, and the checks of what only a message can get wrong."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict

from cache_store.codecs import RAW, SESSION_CODECS
from cache_store.errors import InvalidRequest
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from worker.calls import (
    Context,
    ContextPolicy,
    ContextReceipt,
    DropReport,
    Finished,
    FinishReason,
    GenerateCall,
    Receipt,
    RestorePlan,
    Sampling,
    Token,
)
from worker.engine_like import EngineLike
from worker.figures import EngineStats, TierUse
from worker.pieces import Encoded

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256


def sampling_of(message: pb.Sampling) -> Sampling:
    """Unset fields take their defaults, an unset seed a random number. Raises InvalidRequest."""
    given = {
        name: getattr(message, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "logprobs",
        )
        if message.HasField(name)
    }
    return Sampling(**{"seed": secrets.randbits(64), **given})


def stops_of(message: pb.Sampling) -> tuple[str, ...]:
    """Raises InvalidRequest."""
    if len(message.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest("sampling.stop", f"at most {MAX_STOP_STRINGS} strings, got {len(message.stop)}")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in message.stop):
        raise InvalidRequest("sampling.stop", f"each must have 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(message.stop)


def call_of(
    request: wpb.WorkerGenerateRequest,
    encoded: Encoded,
    engine: EngineLike,
    *,
    call_id: str,
    deadline_s: float | None,
) -> GenerateCall:
    """The turn in tokens. Raises InvalidRequest."""
    sampling = request.sampling
    history, input_ids = tuple(request.history.token_ids), encoded.token_ids
    if not history and not input_ids:
        raise InvalidRequest("input", "the prompt is empty")
    check_tokens("history.token_ids", history, engine.vocab_size)
    check_tokens("tokens.token_ids", input_ids, engine.vocab_size)
    check_tokens("begun.token_ids", request.begun.token_ids, engine.vocab_size)
    check_tokens("sampling.stop_token_ids", sampling.stop_token_ids, engine.vocab_size)
    if sampling.HasField("max_new_tokens") and sampling.max_new_tokens == 0:
        raise InvalidRequest("sampling.max_new_tokens", "must be above 0")
    return GenerateCall(
        request_id=call_id,
        tenant=request.history.tenant,
        history=history,
        input=input_ids,
        begun=tuple(request.begun.token_ids),
        sampling=sampling_of(sampling),
        max_new_tokens=sampling.max_new_tokens if sampling.HasField("max_new_tokens") else None,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        eos_token_ids=frozenset() if sampling.ignore_eos else engine.eos_token_ids,
        block_ttl_s=request.block_ttl_s,
        deadline_s=deadline_s,
        codec=codec_of(request.history),
        audit=request.audit,
        context=context_of(request.history),
        insert_bounds=_inserted(request.history, encoded),
        device_only=request.device_only,
    )


def _inserted(history: wpb.History, encoded: Encoded) -> tuple[int, ...]:
    """Where in the conversation the input's inserts are: those that go on to its very end are computed."""
    pairs = zip(encoded.insert_bounds[0::2], encoded.insert_bounds[1::2], strict=False)
    start = len(history.token_ids)
    return tuple(start + bound for pair in pairs if pair[1] < len(encoded.token_ids) for bound in pair)


def context_of(history: wpb.History) -> Context:
    """What the session does beyond the window. Raises InvalidRequest for a policy that this worker does not know, and
    for bounds that are none of its tokens."""
    try:
        policy = ContextPolicy(history.context_policy or ContextPolicy.ERROR.value)
    except ValueError as error:
        raise InvalidRequest("history.context_policy", str(error)) from error
    context = Context(policy, tuple(history.turn_bounds), tuple(history.insert_bounds))
    context.check(len(history.token_ids))
    return context


def codec_of(history: wpb.History) -> str:
    """The session's. Raises InvalidRequest for one that this worker does not know."""
    codec = history.codec or RAW.name
    if codec not in SESSION_CODECS:
        raise InvalidRequest("history.codec", f"must be one of {', '.join(SESSION_CODECS)}, got {codec!r}")
    return codec


def check_tokens(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for an id that the model does not have."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(field, f"{largest} is not in the vocabulary of {vocab_size} tokens")


def started_event(call: GenerateCall) -> wpb.WorkerEvent:
    return wpb.WorkerEvent(started=wpb.Started(input_token_ids=call.input, insert_bounds=call.insert_bounds))


def delta_event(text: str, tokens: Sequence[Token]) -> wpb.WorkerEvent:
    logprobs = [
        pb.TokenLogprobs(
            logprob=token.logprobs.logprob,
            top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.logprobs.top],
        )
        for token in tokens
        if token.logprobs is not None
    ]
    delta = pb.Delta(text=text, token_ids=[token.token_id for token in tokens], logprobs=logprobs)
    return wpb.WorkerEvent(delta=delta)


def finished_event(
    call: GenerateCall,
    finished: Finished,
    *,
    num_tokens: int,
    last_token_id: int | None,
    stop_string: str | None,
    worker_id: str,
) -> wpb.WorkerEvent:
    """`num_tokens` were sent, `last_token_id` the last of them: with a stop string, maybe less than were generated."""
    reason = finished.reason if stop_string is None else FinishReason.STOP
    event = pb.Finished(
        reason=f"FINISH_REASON_{reason.name}",
        usage=pb.Usage(
            prompt_tokens=len(call.history) + len(call.input),
            completion_tokens=num_tokens,
            input_tokens=len(call.input),
        ),
        receipt=_receipt(finished.receipt, worker_id),
        stop_string=stop_string or "",
        seed=call.sampling.seed,
    )
    if reason is FinishReason.STOP and stop_string is None and last_token_id is not None:
        event.stop_token_id = last_token_id
    return wpb.WorkerEvent(finished=event)


def _receipt(receipt: Receipt, worker_id: str) -> pb.Receipt:
    return pb.Receipt(
        device_tokens=receipt.device_tokens,
        host_tokens=receipt.host_tokens,
        disk_tokens=receipt.disk_tokens,
        redis_tokens=receipt.redis_tokens,
        computed_tokens=receipt.computed_tokens,
        misses=[
            pb.Miss(reason=f"MISS_REASON_{reason.name}", tokens=tokens) for reason, tokens in receipt.misses.items()
        ],
        restored_bytes=receipt.restored_bytes,
        queue_ms=receipt.queue_ms,
        restore_ms=receipt.restore_ms,
        prefill_ms=receipt.prefill_ms,
        decode_ms=receipt.decode_ms,
        ttft_ms=receipt.ttft_ms,
        worker_id=worker_id,
        audit=None if receipt.audit is None else pb.Audit(**asdict(receipt.audit)),
        plan=_plan(receipt.plan),
        context=_context(receipt.context),
        insert_bounds=receipt.insert_bounds,
    )


def _context(receipt: ContextReceipt | None) -> pb.ContextReceipt | None:
    if receipt is None:
        return None
    return pb.ContextReceipt(
        policy=f"CONTEXT_POLICY_{receipt.policy.name}",
        left_tokens=receipt.left_tokens,
        choices=receipt.choices,
        recalled_tokens=receipt.recalled_tokens,
        recalled_starts=receipt.recalled_starts,
        unit_tokens=receipt.unit_tokens,
    )


def _plan(plan: RestorePlan | None) -> pb.RestorePlan | None:
    if plan is None:
        return None
    return pb.RestorePlan(
        kind=f"PLAN_KIND_{plan.kind.name}",
        predicted_ms=plan.predicted_ms,
        actual_ms=plan.actual_ms,
        computed_instead_tokens=plan.computed_instead_tokens,
    )


def drop_message(report: DropReport) -> wpb.DropReply:
    return wpb.DropReply(
        device_blocks=report.device_blocks,
        host_blocks=report.host_blocks,
        disk_blocks=report.disk_blocks,
        redis_blocks=report.redis_blocks,
    )


def add_drop(message: wpb.DropReply, report: DropReport) -> None:
    message.device_blocks += report.device_blocks
    message.host_blocks += report.host_blocks
    message.disk_blocks += report.disk_blocks
    message.redis_blocks += report.redis_blocks


def stats_message(stats: EngineStats, *, worker_id: str, model: str, block_tokens: int) -> pb.WorkerCacheStats:
    return pb.WorkerCacheStats(
        worker_id=worker_id,
        model=model,
        prompt_tokens=pb.TokensBySource(
            device=stats.device_tokens,
            host=stats.host_tokens,
            disk=stats.disk_tokens,
            redis=stats.redis_tokens,
            computed=stats.computed_tokens,
        ),
        device=_tier_stats(stats.device),
        host=_tier_stats(stats.host),
        disk=_tier_stats(stats.disk),
        stores_dropped=stats.stores_dropped,
        evicted_then_needed=stats.evicted_then_needed,
        running=stats.running,
        waiting=stats.waiting,
        block_tokens=block_tokens,
        device_used_blocks=stats.device_blocks.get("used", 0),
    )


def _tier_stats(use: TierUse) -> pb.TierStats:
    return pb.TierStats(
        blocks=use.blocks, capacity_blocks=use.capacity_blocks, bytes=use.bytes, capacity_bytes=use.capacity_bytes
    )

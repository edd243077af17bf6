"""The API's answers as people read them (rich tables and lines) and as programs do (plain dicts)."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from rich.table import Table

from protos import rekindle_pb2 as pb

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def to_dict(message: Message) -> dict[str, Any]:
    """All fields by their proto names, numbers as numbers (MessageToDict makes strings of 64 bits), enums by name."""
    return {field.name: _plain(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_plain_one(field, item) for item in value]
    return _plain_one(field, value)


def _plain_one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_dict(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def size(num_bytes: int) -> str:
    """Bytes with a unit: 1.5 MiB."""
    value = float(num_bytes)
    for unit in _UNITS[:-1]:
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} {_UNITS[-1]}"


def when(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def receipt_line(finished: pb.Finished) -> str:
    """Where a turn's prompt came from, on one line."""
    receipt, usage = finished.receipt, finished.usage
    sources = [
        f"{tokens} {source}"
        for source, tokens in (
            ("device", receipt.device_tokens),
            ("host", receipt.host_tokens),
            ("disk", receipt.disk_tokens),
            ("redis", receipt.redis_tokens),
            ("computed", receipt.computed_tokens),
            ("beyond the window", receipt.context.left_tokens),
        )
        if tokens
    ]
    parts = [f"prompt of {usage.prompt_tokens} tokens: {' + '.join(sources)}"]
    if receipt.restored_bytes:
        within = (
            "" if receipt.context.recalled_tokens else f" in {receipt.restore_ms:.1f} ms"
        )  # that is before it began
        parts.append(f"restored {size(receipt.restored_bytes)}{within}")
    if receipt.context.recalled_tokens:
        parts.append(f"recalled {receipt.context.recalled_tokens} tokens in {receipt.context.choices} choices")
    if receipt.memories:
        banks = ", ".join(sorted({source.bank for source in receipt.memories}))
        parts.append(f"{len(receipt.memories)} memories from {banks}")
    if receipt.bank_misses:
        parts.append(f"nothing from {', '.join(miss.bank for miss in receipt.bank_misses)}")
    if receipt.HasField("plan"):
        parts.append(_plan(receipt.plan))
    parts.append(f"first token after {receipt.ttft_ms:.0f} ms")
    parts.append(f"{usage.completion_tokens} tokens in {receipt.decode_ms:.0f} ms")
    if receipt.HasField("audit"):
        parts.append(_audit(receipt.audit))
    if finished.turn:
        parts.insert(0, f"turn {finished.turn}")
    return " · ".join([*parts, f"worker {receipt.worker_id}"])


def _plan(plan: pb.RestorePlan) -> str:
    kind = pb.PlanKind.Name(plan.kind).removeprefix("PLAN_KIND_").lower().replace("_", " ")
    took = f"plan {kind}: {plan.actual_ms:.0f} ms, {plan.predicted_ms:.0f} predicted"
    return f"{took}, {plan.computed_instead_tokens} tokens computed instead" if plan.computed_instead_tokens else took


def _audit(audit: pb.Audit) -> str:
    verdict = "passed" if audit.passed else "FAILED"
    agreeing = f"{audit.agreeing_tokens} of {audit.tokens} tokens agree"
    return f"audit {verdict}: {agreeing}, KL {audit.mean_kl:.2g} (at most {audit.max_kl:.2g}) nats"


def sessions_table(sessions: Iterable[pb.Session]) -> Table:
    table = Table("session", "tokens", "last used", "kept")
    for session in sessions:
        table.add_row(session.session_id, str(session.num_tokens), when(session.last_used_ms), _kept(session))
    return table


def session_table(session: pb.Session) -> Table:
    """One session: what it is, its turns, and where its KV lies."""
    table = Table(show_header=False, title=f"session {session.session_id}")
    table.add_row("tokens", str(session.num_tokens))
    table.add_row("turns", ", ".join(f"{turn.number} (to {turn.end})" for turn in session.turns) or "none yet")
    for residency in session.residency:
        tier = pb.Tier.Name(residency.tier).removeprefix("TIER_").lower()
        where = f" of worker {residency.worker_id}" if residency.worker_id else ""
        table.add_row(f"in {tier}{where}", f"{residency.tokens} tokens")
    if session.parent_session_id:
        table.add_row("forked from", f"{session.parent_session_id}, turn {session.parent_turn}")
    table.add_row("created", when(session.created_ms))
    table.add_row("last used", when(session.last_used_ms))
    table.add_row("kept", _kept(session))
    table.add_row("codec", session.codec)
    table.add_row(
        "beyond the window", pb.ContextPolicy.Name(session.context_policy).removeprefix("CONTEXT_POLICY_").lower()
    )
    for attached in session.banks:
        access = pb.BankAccess.Name(attached.access).removeprefix("BANK_ACCESS_").lower().replace("_", " and ")
        table.add_row(f"bank {attached.bank}", access)
    table.add_row("model", session.model or "none yet")
    return table


def _kept(session: pb.Session) -> str:
    if session.pinned:
        return "pinned"
    return f"{session.ttl_s} s" if session.ttl_s else "for ever"


def stats_tables(stats: pb.CacheStats) -> list[Table]:
    """How the cache does: prompt tokens by source, the tiers of each worker, Redis."""
    sources = stats.prompt_tokens
    tokens = Table("prompt tokens from", "device", "host", "disk", "redis", "computed", "hit rate")
    whole = stats.HasField("redis")
    tokens.add_row("all workers" if whole else "your tenant", *_source_cells(sources), f"{stats.hit_rate:.1%}")
    if not whole:  # only operators see more
        return [tokens]
    tiers = Table("worker", "device", "host", "disk", "running", "waiting", "stores dropped", "evicted, then needed")
    for worker in stats.workers:
        tokens.add_row(worker.worker_id, *_source_cells(worker.prompt_tokens), "")
        tiers.add_row(
            worker.worker_id,
            _tier(worker.device),
            _tier(worker.host),
            _tier(worker.disk),
            str(worker.running),
            str(worker.waiting),
            str(worker.stores_dropped),
            str(worker.evicted_then_needed),
        )
    redis = Table("redis", "used", "limit", "evicted keys", "eviction policy")
    state = "answers" if stats.redis.available else "[red]does not answer[/red]"
    limit = size(stats.redis.max_bytes) if stats.redis.max_bytes else "none"
    evicted, policy = str(stats.redis.evicted_keys), stats.redis.eviction_policy
    redis.add_row(state, size(stats.redis.used_bytes), limit, evicted, policy)
    return [tokens, tiers, redis]


def _source_cells(tokens: pb.TokensBySource) -> list[str]:
    return [str(tokens.device), str(tokens.host), str(tokens.disk), str(tokens.redis), str(tokens.computed)]


def _tier(tier: pb.TierStats) -> str:
    return f"{size(tier.bytes)} of {size(tier.capacity_bytes)}"

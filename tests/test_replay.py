"""Replays against real workers and front ends: what they send and when, what they find, and what they say of it."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from benchmarks.replay import run
from benchmarks.replay_arms import Arm, Deployed, Load, Sizes, load_of, run_arm, shape_of
from benchmarks.replay_compare import ALL, FITTING, HOST, OFF, SHORT, compared
from benchmarks.replay_drive import Below, Served, replay
from benchmarks.replay_ideal import Ideal
from benchmarks.replay_plot import load_plots
from benchmarks.replay_report import figures_of, hit_rate, progress, show
from benchmarks.trace import Piece, Request, TraceError
from cache_store.embedded_redis import RedisServer
from protos import rekindle_pb2 as pb
from tests.systems import BLOCK_TOKENS, WorkerProcess, running_system

TINY = shape_of("preset:tiny")
SMALL = TINY._replace(layout=replace(TINY.layout, block_tokens=BLOCK_TOKENS))
BLOCK_BYTES = SMALL.layout.block_bytes


@contextmanager
def front_end(redis_url: str, worker: WorkerProcess) -> Iterator[str]:
    """A front end in a thread of its own; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front-end")
    thread.start()
    system = running_system(redis_url, [worker])
    try:
        started = asyncio.run_coroutine_threadsafe(system.__aenter__(), loop).result()
        try:
            yield started.application.address
        finally:
            asyncio.run_coroutine_threadsafe(system.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def small_deployment(sizes: Sizes) -> Iterator[Deployed]:
    """As the benchmark's, without Ray, and of blocks so small that a trace of few tokens fills the tiers."""
    with ExitStack() as stack:
        redis_url = stack.enter_context(RedisServer(max_memory_bytes=sizes.redis)).url if sizes.redis else ""
        settings: dict[str, object] = {"device_cache_bytes": sizes.device, "host_cache_bytes": sizes.host}
        if sizes.disk:
            settings |= {"disk_dir": stack.enter_context(TemporaryDirectory()), "disk_bytes": sizes.disk}
        worker = stack.enter_context(WorkerProcess("0", redis_url=redis_url, **settings))
        address = stack.enter_context(front_end(redis_url or "memory://", worker))
        yield Deployed(address, int(worker.metrics_address.rpartition(":")[2]))


def talk(conversation: int, *, turns: int, first_at_s: float, think_s: float, tokens: int = 40) -> list[Request]:
    """A conversation that grows by one piece a turn, behind a piece that all conversations begin with."""
    pieces = (Piece(0, 32), *(Piece(1000 * (conversation + 1) + turn, tokens) for turn in range(turns)))
    return [
        Request(
            at_s=first_at_s + turn * think_s,
            pieces=pieces[: turn + 2],
            output_tokens=3 + turn,
            conversation=conversation,
            turn=turn + 1,
        )
        for turn in range(turns)
    ]


def load(conversations: int, turns: int, *, think_s: float = 1.0) -> Load:
    requests = [
        request
        for number in range(conversations)
        for request in talk(number, turns=turns, first_at_s=number * 0.1, think_s=think_s)
    ]
    return load_of(sorted(requests, key=lambda request: request.at_s), SMALL)


def nothing() -> None:
    pass


def planned(
    kind: pb.PlanKind, predicted_ms: float, actual_ms: float, *, computed_instead: int = 0, **tokens: Any
) -> pb.Receipt:
    plan = pb.RestorePlan(
        kind=kind, predicted_ms=predicted_ms, actual_ms=actual_ms, computed_instead_tokens=computed_instead
    )
    return pb.Receipt(plan=plan, **tokens)


def at_once(served: Sequence[Served]) -> int:
    """How many requests were with the server at the most."""
    changes = sorted([(one.sent_s, 1) for one in served] + [(one.end_s, -1) for one in served])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.fixture(scope="module")
def roomy() -> Iterator[Deployed]:
    """A worker that keeps everything on the device."""
    with small_deployment(Sizes(256 * BLOCK_BYTES, 0, 0)) as deployed:
        yield deployed


def test_a_server_with_room_for_all_finds_exactly_what_the_infinite_cache_does(roomy: Deployed) -> None:
    work = load(conversations=5, turns=4)
    served = replay(roomy.address, work.work, speed=float("inf"), clients=1, done=nothing)
    receipts = [one.receipt for one in served]
    assert [one.request for one in served] == [request for request, _ in work.work]
    assert sum(receipt.device_tokens for receipt in receipts) == work.ideal(Sizes(256 * BLOCK_BYTES, 0, 0)).infinite > 0
    assert sum(receipt.computed_tokens + receipt.device_tokens for receipt in receipts) == work.prompt_tokens


def test_requests_come_when_the_trace_says_and_no_turn_before_the_last_ones_reply(roomy: Deployed) -> None:
    slow = [Request(at_s=4.0, pieces=(Piece(7, 20),), output_tokens=60, conversation=9, turn=1)]
    hasty = [replace(slow[0], at_s=4.1, turn=2), replace(slow[0], at_s=12.0, turn=3)]
    work = load_of([*slow, *hasty], SMALL).work
    ended: list[None] = []
    first, second, third = replay(roomy.address, work, speed=10.0, clients=8, done=lambda: ended.append(None))
    assert len(ended) == 3
    assert first.due_s == 0.0
    assert third.due_s == pytest.approx(0.8)
    assert first.end_s > 0.01
    assert second.due_s == first.end_s
    for one in (first, second, third):
        assert one.due_s <= one.sent_s < one.first_token_s < one.end_s
        assert one.ttft_s >= one.ttft_of_server_s > 0
        assert one.tpot_s == pytest.approx((one.end_s - one.first_token_s) / 59)


def test_no_more_requests_are_sent_at_once_than_there_are_clients(roomy: Deployed) -> None:
    work = load(conversations=12, turns=1).work
    assert at_once(replay(roomy.address, work, speed=float("inf"), clients=3, done=nothing)) == 3
    assert at_once(replay(roomy.address, work, speed=float("inf"), clients=12, done=nothing)) > 3


@pytest.mark.parametrize(("coldest", "num_bytes"), [("redis", 64 << 20), ("disk", 16 << 20)])
def test_the_tiers_together_hit_what_the_device_alone_cannot(coldest: str, num_bytes: int) -> None:
    work = load(conversations=16, turns=4)
    sizes = Sizes(64 * BLOCK_BYTES, 40 * BLOCK_BYTES, 0)._replace(**{coldest: num_bytes})
    arm = run_arm(small_deployment, work, sizes, speed=2.0, clients=1, done=nothing)
    figures = figures_of(arm)
    sources = figures["tokens by source"]
    assert sources[coldest] > 0
    assert hit_rate(arm) == pytest.approx(figures["hit rate, infinite cache"], abs=0.02)
    assert figures["hit rate, best possible for the sizes"] == figures["hit rate, infinite cache"]
    assert sum(sources.values()) == work.prompt_tokens
    assert sum(figures["computed tokens by reason"].values()) == sources["computed"]
    assert figures["lost tokens"] == arm.ideal.infinite - (work.prompt_tokens - sources["computed"])
    assert figures["evicted then needed, blocks"] > 0
    assert figures["moved bytes"]["device to host"] % BLOCK_BYTES == 0
    assert Counter({turn: row["requests"] for turn, row in figures["by turn"].items()}) == {
        "1": 16,
        "2": 16,
        "3": 16,
        "4-7": 16,
    }


def test_figures_are_by_turn_source_and_plan() -> None:
    receipts = [
        pb.Receipt(computed_tokens=10, misses=[pb.Miss(reason=pb.MISS_REASON_NEW, tokens=10)]),
        planned(pb.PLAN_KIND_LOAD, 20.0, 10.0, device_tokens=4, redis_tokens=6, computed_tokens=10),
        planned(pb.PLAN_KIND_LOAD, 40.0, 60.0, host_tokens=9, computed_tokens=1),
        planned(pb.PLAN_KIND_COMPUTE, 0.0, 5.0, computed_tokens=20, computed_instead=7),
    ]
    served = [
        Served(
            request=replace(talk(1, turns=1, first_at_s=0.0, think_s=0.0)[0], turn=turn),
            due_s=float(turn),
            sent_s=turn + 0.25,
            first_token_s=turn + 0.5,
            end_s=turn + 1.5,
            receipt=receipt,
        )
        for turn, receipt in zip((1, 2, 8, 30), receipts, strict=True)
    ]
    seen = Ideal(prompt_tokens=60, infinite=30, best=25, lru=20)
    arm = Arm(
        sizes=Sizes(1, 2, 3),
        served=served,
        below=Below(stores_dropped=1, evicted_then_needed=2, moved_bytes=Counter()),
        ideal=seen,
    )
    figures = figures_of(arm)
    assert (figures["hit rate"], figures["lost tokens"]) == (pytest.approx(19 / 60), 11)
    assert figures["tokens by source"] == {"device": 4, "host": 9, "disk": 0, "redis": 6, "computed": 41}
    assert (figures["mean ttft, s"], figures["mean ttft from sending, s"]) == (0.5, 0.25)
    assert figures["tpot, s"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert {turn: (row["requests"], row["hit rate"]) for turn, row in figures["by turn"].items()} == {
        "1": (1, 0.0),
        "2": (1, 0.5),
        "8+": (2, 0.3),
    }
    load, compute = figures["plans"]["load"], figures["plans"]["compute"]
    assert (load["turns"], load["predicted ms, median"], load["actual ms, median"]) == (2, 30.0, 35.0)
    assert load["actual over predicted"]["p50"] == 1.0
    assert (compute["tokens computed instead"], compute["actual over predicted"]) == (7, {})


@pytest.mark.slow
def test_a_comparison_runs_all_arms_on_the_same_work_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = load(conversations=8, turns=4, think_s=4.0)
    sizes = work.sizes()
    with progress(quiet=True) as begin:
        arms, figures, bars = compared(small_deployment, work, sizes, speed=10.0, clients=4, begin=begin)
    assert list(arms) == [OFF, HOST, ALL]
    prompts = [[one.request for one in arm.served] for arm in arms.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    off, host, both = (figures_of(arm)["tokens by source"] for arm in arms.values())
    assert off["host"] == off["redis"] == host["redis"] == 0
    assert both["host"] + both["redis"] > 0
    assert hit_rate(arms[ALL]) > hit_rate(arms[OFF])
    assert list(figures) == [SHORT, FITTING]
    assert all(len(row["ratios"]) >= 5 and min(row["seconds with"]) > 0 for row in figures.values())
    assert len(bars) == 4
    assert json.loads(json.dumps(figures_of(arms[ALL]))) == figures_of(arms[ALL])
    for name, arm in arms.items():
        show(name, figures_of(arm))
    assert "4-7" in capsys.readouterr().out
    files = load_plots()(arms, tmp_path / "plots")
    assert len(files) == len({file.name for file in files}) >= 6
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_serves_replays_and_tells_all_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(model="preset:tiny", generate="agents", requests=12, speed=50.0, disk_bytes=8 << 20, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert status == (0 if all(bar["holds"] for bar in told["bars"]) else 1)
    figures = told["figures"]
    assert figures["requests"] == sum(row["requests"] for row in figures["replay"]["by turn"].values())
    assert figures["prompt tokens"] == sum(figures["replay"]["tokens by source"].values())
    assert figures["replay"]["tier bytes"]["disk"] == 8 << 20


def test_sizes_follow_from_what_the_prompts_bring() -> None:
    work = load(conversations=40, turns=4)
    total = (40 * 10 + 2) * BLOCK_BYTES  # of 192 tokens each, the first 32 in common
    assert work.sizes() == Sizes(int(total * 0.1), int(total * 0.3), 64 << 20)
    assert work.sizes(device=5, host=0, redis=7) == Sizes(5, 0, 7)
    one = load(conversations=1, turns=4)
    assert one.sizes().device == 13 * BLOCK_BYTES  # the longest prompt has 12 blocks, and its reply one


def test_a_prompt_that_does_not_fit_the_model_is_refused() -> None:
    too_long = Request(at_s=0, pieces=(Piece(1, 4090),), output_tokens=7, conversation=0, turn=1)
    with pytest.raises(TraceError, match="scale the lengths down"):
        load_of([too_long], TINY)


def test_shapes_are_those_of_the_models() -> None:
    assert (TINY.layout.block_tokens, TINY.vocab_size, TINY.max_context_tokens) == (256, 512, 4096)
    assert shape_of("preset:qwen3-0.6b").layout.block_bytes == 28 * 2 * 8 * 128 * 2 * 16
    assert shape_of("rekindle-recall").layout.dtype == "bfloat16"


@pytest.mark.parametrize(
    "options",
    [
        {"generate": "dreams"},
        {"trace": Path("no/such/file")},
        {"trace": Path("x"), "generate": "chat"},
        {"requests": 0},
        {"scale": 1.0},
    ],
)
def test_what_cannot_be_replayed_is_refused_in_a_sentence(options: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match="rekindle: "):
        run(model="preset:tiny", **options)  # type: ignore[arg-type]

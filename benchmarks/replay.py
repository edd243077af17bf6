"""Replay a trace of conversations against a whole deployment: hits beside the best possible, and times by turn.

A turn here is a prompt that begins with what a request before it had. See benchmarks/replay_arms.py for how it is sent.
"""

from functools import partial
from pathlib import Path

from benchmarks.harness import finish
from benchmarks.replay_arms import Sizes, deployed, load_of, run_arm, shape_of
from benchmarks.replay_compare import compared, hit_bar
from benchmarks.replay_ideal import distinct_blocks
from benchmarks.replay_plot import PlotsMissing, load_plots
from benchmarks.replay_report import figures_of, progress, show
from benchmarks.trace import Request, TraceError, chosen, read_trace, scaled
from benchmarks.trace_generate import generated


def run(
    *,
    trace: Path | None = None,
    generate: str = "",
    gap_s: float = 8.0,
    model: str = "preset:qwen3-0.6b",
    scale: float = 32.0,
    speed: float = 9.0,
    seconds: float | None = None,
    requests: int = 160,
    seed: int = 0,
    clients: int = 32,
    device_cache_bytes: int | None = None,
    host_cache_bytes: int | None = None,
    disk_bytes: int = 0,
    redis_bytes: int | None = None,
    cold_tiers_off: bool = False,
    compare: bool = False,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Replay a trace, and say by turn what its users saw and where the KV came from.

    Args:
        trace: Mooncake's JSONL or Bailian's, plain or .gz; else Mooncake's synthetic trace, which comes along.
        generate: Instead of a trace, conversations made up: chat, long or agents.
        gap_s: Mean seconds between two made-up conversations' beginnings.
        model: What to serve: preset:NAME (a shape with random weights), a directory, or rekindle-recall.
        scale: Divide all lengths by this.
        speed: Seconds of the trace that pass in one.
        seconds: Take the trace's first seconds only.
        requests: Take whole conversations, drawn at random, with at most so many requests.
        seed: Seed of that drawing and of what is made up.
        clients: Requests at once at the most; others wait, which counts as time to their first token.
        device_cache_bytes: KV on the device; else a tenth of all that the prompts bring.
        host_cache_bytes: KV in host memory, 0 for none; else three tenths of it.
        disk_bytes: KV on disk, below host memory, in a temporary directory.
        redis_bytes: Memory of the Redis, 0 for none; else twice as much as it, so that it has room for all.
        cold_tiers_off: No host memory, no disk and no Redis.
        compare: Replay with cold tiers off, host memory only, and both; then, with the cold tiers and without them,
            short unrelated prompts, and the trace where everything fits on the device. About ten minutes on two cores.
        plot: Write a PNG of each figure into this directory (needs matplotlib: the extra `plot`).
        as_json: Print one JSON object.
    """
    try:
        drawn = _requests(trace, generate, gap_s=gap_s, seconds=seconds, requests=requests, seed=seed)
        load = load_of(scaled(drawn, scale), shape_of(model))
        draw = load_plots() if plot is not None else None
    except (TraceError, PlotsMissing, OSError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    sizes = load.sizes(device=device_cache_bytes, host=host_cache_bytes, redis=redis_bytes, disk=disk_bytes)
    if cold_tiers_off:
        sizes = Sizes(sizes.device, 0, 0)
    deploy = partial(deployed, model, load.shape)
    with progress(quiet=as_json) as begin:
        if compare:
            arms, figures, bars = compared(deploy, load, sizes, speed=speed, clients=clients, begin=begin)
        else:
            done = begin("replay", len(load.work))
            arm = run_arm(deploy, load, sizes, speed=speed, clients=clients, done=done)
            arms, figures, bars = {"replay": arm}, {}, [hit_bar(arm)] if sizes.redis or sizes.disk else []
    if plot is not None and draw is not None:
        draw(arms, plot)
    by_arm = {name: figures_of(arm) for name, arm in arms.items()}
    if not as_json:
        for name, of_arm in by_arm.items():
            show(name, of_arm)
    of_load = {
        "requests": len(load.work),
        "conversations": len({request.conversation for request, _ in load.work}),
        "prompt tokens": load.prompt_tokens,
        "reply tokens": sum(request.output_tokens for request, _ in load.work),
        "blocks of prompts, each once": distinct_blocks(load.accesses),
        "block tokens": load.shape.layout.block_tokens,
    }
    return finish("replay", {**of_load, **figures, **(by_arm if as_json else {})}, bars, as_json=as_json)


def _requests(
    trace: Path | None, generate: str, *, gap_s: float, seconds: float | None, requests: int, seed: int
) -> list[Request]:
    """Raises TraceError where nothing is left."""
    if generate and trace is not None:
        raise TraceError("there can be a trace or a generated load, not both")
    given = generated(generate, requests=requests, gap_s=gap_s, seed=seed) if generate else read_trace(trace)
    if seconds is not None:
        given = [request for request in given if request.at_s - given[0].at_s < seconds]
    left = chosen(given, at_most=requests, seed=seed)
    if not left:
        raise TraceError(f"no conversation has at most {requests} requests")
    return left

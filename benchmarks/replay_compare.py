"""The same work on several deployments: what the cold tiers bring, and what they cost where they can bring nothing."""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.harness import Bar, at_least, at_most
from benchmarks.replay_arms import Arm, Deploy, Load, Sizes, load_of, paired_seconds, run_arm
from benchmarks.replay_ideal import distinct_blocks
from benchmarks.replay_report import Begin, best_rate, hit_rate, mean_ttft_s
from benchmarks.trace import Piece, Request

OFF, HOST, ALL = "cold tiers off", "host memory only", "host memory and redis"
SHORT, FITTING = "short unrelated prompts", "everything fits on the device"

_ROUNDS = 9
"""The first one is not counted."""
_CLIENTS = 4
_SHORT_REQUESTS = 6
_SHORT_TOKENS, _SHORT_REPLY = 64, 16
_FIRST_ID = 1 << 60
_FITTING_SHARE = 0.2
"""Of the trace's requests, for the arms where everything fits on the device."""
_ROOM = 1.25
"""Of the device for all of that and its replies: concurrent turns may compute a block twice."""


def compared(
    deploy: Deploy, load: Load, sizes: Sizes, *, speed: float, clients: int, begin: Begin
) -> tuple[Mapping[str, Arm], dict[str, Any], list[Bar]]:
    """All arms that replay the trace, the figures of the rest, and all bars."""
    arms = {
        name: run_arm(deploy, load, of_arm, speed=speed, clients=clients, done=begin(name, len(load.work)))
        for name, of_arm in {
            OFF: Sizes(sizes.device, 0, 0),
            HOST: Sizes(sizes.device, sizes.host, 0),
            ALL: sizes,
        }.items()
    }
    figures = _nothing_to_gain(deploy, load, sizes, begin)
    times_better = mean_ttft_s(arms[OFF].served) / mean_ttft_s(arms[ALL].served)
    bars = [
        hit_bar(arms[ALL]),
        at_least("times shorter mean TTFT than with the cold tiers off", times_better, 3),
        *(
            at_most(f"times as long with cold tiers, {name}", statistics.median(of_round["ratios"]), 1.03)
            for name, of_round in figures.items()
        ),
    ]
    return arms, figures, bars


def hit_bar(arm: Arm) -> Bar:
    return at_least("hit rate, of the best possible for the sizes", hit_rate(arm) / best_rate(arm), 0.95)


def _nothing_to_gain(deploy: Deploy, load: Load, sizes: Sizes, begin: Begin) -> dict[str, Any]:
    """Rounds on two deployments, without cold tiers and with them, where the device alone is enough."""
    short = [load_of(_short(number), load.shape) for number in range(_ROUNDS)]
    fitting = _in_rounds(load, int(_FITTING_SHARE * len(load.work)))
    both = [*short, *fitting]
    accesses = [one for each in both for one in each.accesses]
    num_blocks = distinct_blocks(accesses) + sum(one.num_own for one in accesses)
    device = int(_ROOM * num_blocks) * load.shape.layout.block_bytes
    sides = [Sizes(device, 0, 0), Sizes(device, sizes.host, sizes.redis)]
    done = begin("with and without cold tiers", len(sides) * sum(len(each.work) for each in both))
    without, with_them = paired_seconds(deploy, both, sides, clients=_CLIENTS, done=done)
    return {
        name: {
            "seconds without": without[first + 1 : end],
            "seconds with": with_them[first + 1 : end],
            "ratios": [
                one / other for one, other in zip(with_them[first + 1 : end], without[first + 1 : end], strict=True)
            ],
        }
        for name, first, end in ((SHORT, 0, len(short)), (FITTING, len(short), len(both)))
    }


def _short(number: int) -> list[Request]:
    """Prompts of one piece each, with ids that no trace has."""
    return [
        Request(
            at_s=0.0,
            pieces=(Piece(_FIRST_ID + number * _SHORT_REQUESTS + each, _SHORT_TOKENS),),
            output_tokens=_SHORT_REPLY,
            conversation=each,
            turn=1,
        )
        for each in range(_SHORT_REQUESTS)
    ]


def _in_rounds(load: Load, num_requests: int) -> list[Load]:
    """The first requests, cut into rounds: each goes on where the last one ended."""
    size = -(-num_requests // _ROUNDS)
    return [
        replace(load, work=load.work[first : first + size], accesses=load.accesses[first : first + size])
        for first in range(0, num_requests, size)
    ]

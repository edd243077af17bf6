"""The soak: a short one with all of its processes, and that its judge knows a leak from noise."""

import json
import random
from collections.abc import Callable

import pytest

from benchmarks.chaos_part import Use
from benchmarks.soak import Sample, grown, run

PROCESSES = {"worker 0", "worker 1", "front end 0", "front end 1", "redis", "users"}


@pytest.mark.slow
def test_a_short_soak_reports_on_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(minutes=0.1, conversations=1, as_json=True)
    said = json.loads(capsys.readouterr().out)
    figures = said["figures"]
    assert status == (0 if all(bar["holds"] for bar in said["bars"]) else 1)
    assert {bar["name"] for bar in said["bars"]} >= {f"MiB more of {name}" for name in PROCESSES}
    assert figures["tokens"] > figures["turns"] > 0
    assert (figures["wrong_tokens"], figures["failures"], figures["problems"], figures["unbalanced"]) == (0, {}, [], {})
    assert set(figures["processes"]) == PROCESSES
    for name, growth in figures["processes"].items():
        assert min(growth["course_mib"]) > 1, name
        assert growth["descriptors"] > 3, name


def samples(mib: Callable[[float], float]) -> list[Sample]:
    """An hour of one process whose memory at a time, from 0 to 1, is known; 36,000 turns."""
    times = [number / 200 for number in range(201)]
    return [Sample(3600 * time, round(36000 * time), {"it": Use(int(mib(time) * 2**20), 20)}) for time in times]


def test_memory_that_keeps_growing_is_measured() -> None:
    growth = grown(samples(lambda time: 100 + 8 * time))["it"]
    assert growth.rise_mib == pytest.approx(4.0, abs=0.01)  # the second half counts
    assert growth.mib_per_hour == pytest.approx(8.0, abs=0.01)
    assert growth.mib_per_thousand_turns == pytest.approx(8 / 36, abs=0.001)
    assert (growth.course_mib[0], growth.course_mib[-1]) == (104.0, 108.0)


def test_what_grows_while_it_is_warming_up_does_not_count_and_noise_is_not_growth() -> None:
    chance = random.Random(1)
    growth = grown(samples(lambda time: 100 + 50 * min(time, 0.5) + chance.uniform(-3, 3)))["it"]
    assert abs(growth.rise_mib) < 1.0


def test_a_soak_too_short_to_tell_says_so() -> None:
    with pytest.raises(ValueError, match="too short to tell: 2 samples"):
        grown(samples(lambda _: 100)[:3])

"""Measurements as commands: whatever they have started ends with them."""

import signal
import time
from pathlib import Path

import pytest

from tests.processes import command, processes_of


@pytest.mark.parametrize(
    ("words", "status"),
    [(("bench", "store"), 128 + signal.SIGTERM), (("eval", "fidelity", "--model", "preset:tiny"), 130)],
)
def test_a_measurement_that_is_told_to_stop_ends_what_it_has_started(
    tmp_path: Path, words: tuple[str, ...], status: int
) -> None:
    with command(tmp_path, *words) as process:
        give_up = time.monotonic() + 60
        while not any(tmp_path.glob("rekindle-redis-*/socket")):
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert len(processes_of(tmp_path)) > 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == status, (tmp_path / "stderr").read_text()
        assert processes_of(tmp_path) == []
        assert not any(tmp_path.glob("rekindle-redis-*"))

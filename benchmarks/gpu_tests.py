"""Run the tests marked `gpu` in a process of their own, on a machine that may lack what only other tests need."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stand_ins

ROOT = Path(__file__).resolve().parent.parent
_SETTINGS = """[pytest]
markers =
    gpu: needs a CUDA device
    ray: starts Ray
    slow: takes more than ten seconds
"""
"""The project's own settings name plugins that may be missing."""
_OF_GPU = re.compile(r"mark\.gpu|\bCUDA\b")
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")
_LAST_LINES = 30
_RUN = """
import sys
folder, arguments = sys.argv[1], sys.argv[2:]
sys.path.append(folder)
import pytest
sys.exit(pytest.main(arguments))
"""


def gpu_test_files() -> list[Path]:
    """Those that mark a test so, or take the device that is marked."""
    return [path for path in sorted((ROOT / "tests").glob("test_*.py")) if _OF_GPU.search(path.read_text())]


def stand_ins_folder() -> str:
    """To be searched last: what is installed comes first."""
    return str(Path(stand_ins.__file__).parent)


def run_tests(files: Sequence[Path], *, within_s: float) -> Iterator[dict[str, Any]]:
    """Yields how many passed, failed and so on, and the end of what pytest said where that is not all that passed."""
    if importlib.util.find_spec("pytest") is None:
        yield {"skipped": "pytest is not installed"}
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "pytest.ini")
        settings.write_text(_SETTINGS)
        options = ["-c", str(settings), f"--rootdir={ROOT}", "--noconftest", "-q", "-m", "gpu"]
        if any("EngineFactory" in path.read_text() for path in files):
            options += ["-p", "tests.engines"]
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, stand_ins_folder(), *options, "--continue-on-collection-errors", *files],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            lines = process.communicate(timeout=within_s)[0].splitlines()
        except subprocess.TimeoutExpired:
            process.kill()
            lines = process.communicate()[0].splitlines()
            yield {"error": f"not done within {within_s:.0f} s", "output": lines[-_LAST_LINES:]}
            return
    counts = _COUNT.findall(lines[-1]) if lines else []
    line: dict[str, Any] = {what.removesuffix("s"): int(count) for count, what in counts}
    if process.returncode:
        line |= {"error": f"pytest's exit status is {process.returncode}", "output": lines[-_LAST_LINES:]}
    yield line

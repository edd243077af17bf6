"""Strange, broken and meaningless messages: every one gets a status that means something, and nothing of them stays."""

from benchmarks.fuzz import fuzz
from protos import rekindle_memory_pb2 as mpb
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from tests.systems import System, WorkerProcess, eventually


async def test_no_message_meets_a_bug_in_a_front_end(system: System) -> None:
    answers = await fuzz(system.application.address, pb.DESCRIPTOR, messages=2000, seed=11)
    assert not answers.num_problems, answers.problems
    assert not answers.hung
    assert answers.by_status["Inference/Generate OK"] > 10, "or they never came far"
    assert answers.by_status["Inference/Generate INVALID_ARGUMENT"] > 10
    await eventually(system.is_idle)


async def test_no_message_about_banks_meets_a_bug(system: System) -> None:
    answers = await fuzz(system.application.address, mpb.DESCRIPTOR, messages=1000, seed=13)
    assert not answers.num_problems, answers.problems
    assert not answers.hung
    assert answers.by_status["Memory/Remember OK"] > 5, answers.by_status
    assert answers.by_status["Memory/Recall OK"] > 5


async def test_no_well_formed_message_meets_a_bug_in_a_worker(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    answers = await fuzz(workers[0].address, wpb.DESCRIPTOR, messages=500, seed=12, broken=False)
    assert not answers.num_problems, answers.problems
    assert not answers.hung
    await eventually(system.is_idle)

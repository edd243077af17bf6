"""What a session does beyond the window, as the front end keeps it: chosen once, shown, inherited."""

import grpc
import pytest
from grpc import StatusCode

from protos import rekindle_pb2 as pb
from tests.fake_worker import field_of, front_end


@pytest.mark.parametrize(
    "policy", [pb.CONTEXT_POLICY_ERROR, pb.CONTEXT_POLICY_WINDOW, pb.CONTEXT_POLICY_RECALL], ids=pb.ContextPolicy.Name
)
async def test_a_session_shows_its_policy_and_its_forks_have_it(policy: pb.ContextPolicy) -> None:
    async with front_end(1) as front:
        assert (await front.new_session(context_policy=policy)).context_policy == policy
        await front.turn("one", "s")
        fork = await front.sessions.ForkSession(pb.ForkSessionRequest(session_id="s", new_session_id="fork"))
        assert fork.context_policy == policy
        listed = await front.sessions.ListSessions(pb.ListSessionsRequest())
        assert [session.context_policy for session in listed.sessions] == [policy, policy]


async def test_who_does_not_choose_gets_an_error_beyond_the_window() -> None:
    async with front_end(1) as front:
        assert (await front.new_session()).context_policy == pb.CONTEXT_POLICY_ERROR


async def test_a_policy_that_there_is_not_is_refused_by_name() -> None:
    async with front_end(1) as front:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await front.new_session(context_policy=77)
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT
        assert field_of(refused.value) == "context_policy"

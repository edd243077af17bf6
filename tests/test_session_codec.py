"""A session's codec as the front end keeps it: chosen once, shown, inherited, told to whoever is asked of its KV."""

import grpc
import pytest
from grpc import StatusCode

from cache_store.codecs import LADDER, SESSION_CODECS
from protos import rekindle_pb2 as pb
from server.config import ConfigError, ServerConfig
from tests.fake_worker import FrontEnd, field_of, front_end


def codecs_told(front: FrontEnd) -> set[str]:
    return {codec for worker in front.workers.values() for codec in worker.codecs}


@pytest.mark.parametrize("codec", SESSION_CODECS)
async def test_a_session_is_created_with_any_codec_there_is_and_shows_it(codec: str) -> None:
    async with front_end(1) as front:
        assert (await front.new_session(codec=codec)).codec == codec
        assert (await front.session()).codec == codec
        listed = await front.sessions.ListSessions(pb.ListSessionsRequest())
        assert [session.codec for session in listed.sessions] == [codec]


@pytest.mark.parametrize("codec", ["jpeg", "INT8", " raw"])
async def test_a_codec_that_there_is_not_is_refused_by_name(codec: str) -> None:
    async with front_end(1) as front:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await front.new_session(codec=codec)
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT
        assert field_of(refused.value) == "codec"
        assert "raw, lossless, int8, k8v4, int4, ladder" in (refused.value.details() or "")
        assert not (await front.sessions.ListSessions(pb.ListSessionsRequest())).sessions


async def test_every_question_about_a_session_says_its_codec() -> None:
    async with front_end(2, codec="int8") as front:
        await front.new_session(codec="int4")
        await front.turn("one", "s")
        await front.sessions.UpdateSession(pb.UpdateSessionRequest(session_id="s", pinned=True))
        await front.session(with_residency=True)
        await front.sessions.WarmSession(pb.WarmSessionRequest(session_id="s"))
        await front.sessions.ParkSession(pb.ParkSessionRequest(session_id="s"))
        await front.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        asked = {call for worker in front.workers.values() for call in worker.calls}
        assert asked >= {"generate", "retain", "locate", "warm", "park", "drop", "drop+redis"}
        assert codecs_told(front) == {"int4"}


async def test_a_worker_that_a_session_moves_from_is_flushed_under_its_codec() -> None:
    async with front_end(2) as front:
        await front.new_session(codec="k8v4")
        first = (await front.turn("one", "s")).finished.receipt.worker_id
        front.workers[first].accepting = False
        while (await front.turn("two", "s")).finished.receipt.worker_id == first:
            pass  # until the front end has heard of it
        assert "flush" in front.workers[first].calls
        assert codecs_told(front) == {"k8v4"}


async def test_who_does_not_choose_gets_the_servers_codec_with_a_session_and_without() -> None:
    async with front_end(1, codec=LADDER) as front:
        assert (await front.new_session()).codec == LADDER
        await front.turn("one", "s")
        await front.turn("alone")
        assert codecs_told(front) == {LADDER}


async def test_a_fork_has_its_parents_codec_even_one_of_nothing() -> None:
    async with front_end(1) as front:
        await front.new_session(codec="lossless")
        await front.turn("one", "s")
        for at_turn, new_id in ((1, "whole"), (0, "empty")):
            request = pb.ForkSessionRequest(session_id="s", at_turn=at_turn, new_session_id=new_id)
            assert (await front.sessions.ForkSession(request)).codec == "lossless"
        await front.turn("two", "whole")
        assert codecs_told(front) == {"lossless"}


async def test_a_request_for_an_audit_reaches_the_worker() -> None:
    async with front_end(1) as front:
        for audit in (True, False):
            request = pb.GenerateRequest(text="one", audit=audit)
            assert [response async for response in front.inference.Generate(request)]
        assert [request.audit for request in front.workers["0"].generated] == [True, False]


def test_a_server_is_not_configured_with_a_codec_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="codec must be one of raw, lossless"):
        ServerConfig(codec="jpeg")

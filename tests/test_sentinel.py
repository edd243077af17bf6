"""redis+sentinel://: what such a URL says, with TLS or without, and Sentinels that let nobody in without a password."""

import pytest
import redis
from redis.asyncio import SSLConnection
from redis.connection import SSLConnection as SyncSSLConnection

from cache_store.errors import InvalidRequest, StoreUnavailable
from cache_store.open_records import open_records
from cache_store.redis_link import RedisLink, link_to
from cache_store.redis_sentinel import parse_sentinel_url
from tests.redis_servers import Watched, command


def test_servers_and_sentinels_have_logins_of_their_own_and_tls_in_common() -> None:
    url = "rediss+sentinel://me:p%40ss@a:1,b/svc?sentinel_username=s&sentinel_password=q&ssl_ca_certs=/ca.pem"
    named = parse_sentinel_url(url + "&ssl_check_hostname=false")
    assert named.sentinels == [("a", 1), ("b", 26_379)]
    assert named.service == "svc"
    tls = {"ssl": True, "ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False}
    assert named.to_servers == {"username": "me", "password": "p@ss", **tls}
    assert named.to_sentinels == {"username": "s", "password": "q", **tls}
    plain = parse_sentinel_url("redis+sentinel://:secret@a/svc")
    assert (plain.to_servers, plain.to_sentinels) == ({"password": "secret"}, {})


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+sentinel://a/svc?ssl_ca_certs=/ca.pem", "unknown options: ssl_ca_certs"),
        ("rediss+sentinel://a/svc?ssl_check_hostname=maybe", "true or false"),
        ("rediss+sentinel://a/svc?sentinel_pasword=s3cret", "unknown options: sentinel_pasword"),
        ("redis+sentinal://u:s3cret@a/svc?sentinel_password=s3cret", "scheme|must start with"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_its_passwords(url: str, why: str) -> None:
    for opened in (lambda: link_to(url, timeout_s=1), lambda: open_records(url)):
        with pytest.raises(InvalidRequest, match=why) as caught:
            opened()
        assert "s3cret" not in str(caught.value)


async def test_tls_is_spoken_with_both() -> None:
    url = "rediss+sentinel://a/svc?ssl_cert_reqs=none"
    link = link_to(url, timeout_s=1)
    pools = [link._pool, *(asked.connection_pool for asked in link._sentinel.sentinels)]  # type: ignore[attr-defined]
    assert all(issubclass(pool.connection_class, SyncSSLConnection) for pool in pools)
    link.close()
    records = open_records(url)
    pools = [client.connection_pool for client in (records._redis, *records._asked)]  # type: ignore[attr-defined]
    assert all(issubclass(pool.connection_class, SSLConnection) for pool in pools)
    await records.aclose()


async def test_sentinels_that_ask_for_a_password_are_given_it(watched_redis: Watched) -> None:
    port = watched_redis.url.rpartition("/")[0].rpartition(":")[2]
    with redis.Redis(port=int(port)) as sentinel:
        command(sentinel, "ACL", "SETUSER", "asker", "on", ">s3cret", "+@all")
        command(sentinel, "ACL", "SETUSER", "default", "off")

    def asks(link: RedisLink) -> bool:
        try:
            return bool(link.servers()[0].ping())
        except redis.ConnectionError:
            return False
        finally:
            link.close()

    login = "?sentinel_username=asker&sentinel_password=s3cret"
    assert not asks(link_to(watched_redis.url, timeout_s=2))
    assert asks(link_to(watched_redis.url + login, timeout_s=2))
    records = open_records(watched_redis.url + login)
    assert (await records.info()).used_bytes > 0
    await records.aclose()
    stranger = open_records(watched_redis.url, timeout_s=0.5)
    with pytest.raises(StoreUnavailable):
        await stranger.info()
    await stranger.aclose()

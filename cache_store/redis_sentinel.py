"""What a redis+sentinel:// URL says: which Sentinels to ask for the primary of which service, how to log in, and TLS.

Knows no connections: `redis_link` and `open_records` make them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

_SCHEMES = ("redis+sentinel", "rediss+sentinel")
_PORT = 26_379
_SENTINELS_OWN = "sentinel_"
_LOGIN = ("username", "password")
_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
_CHECKS_NAME = "ssl_check_hostname"
_BOOLS = {"true": True, "false": False}


class SentinelUrl(NamedTuple):
    sentinels: list[tuple[str, int]]
    service: str
    to_servers: dict[str, Any]
    """redis-py's settings: user, password and TLS."""
    to_sentinels: dict[str, Any]
    """The same. Sentinels have users of their own, or none."""


def is_sentinel_url(url: str) -> bool:
    return url.partition("://")[0] in _SCHEMES


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Read redis+sentinel://[user:password@]host:port[,host:port...]/service[?option=value...]. Raises ValueError.

    rediss+sentinel:// speaks TLS with Sentinels and servers. Options are sentinel_username and sentinel_password, and
    redis-py's ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs and ssl_check_hostname.
    """
    parts = urlsplit(url)
    service = parts.path.removeprefix("/")
    if not service or "/" in service:
        raise ValueError(f"{parts.scheme}:// is followed by host:port[,host:port...]/service")
    credentials, _, hosts = parts.netloc.rpartition("@")
    sentinels = []
    for host in hosts.split(","):
        name, _, port = host.partition(":")
        if not name or (port and not port.isdecimal()):
            raise ValueError("each Sentinel is host:port")  # not quoted: it may be of a password with a /
        sentinels.append((name, int(port or _PORT)))
    user, _, password = credentials.partition(":")
    sentinels_login, tls = _options(parts.query, with_tls=parts.scheme == "rediss+sentinel")
    login = _given(zip(_LOGIN, (unquote(user), unquote(password)), strict=True))
    return SentinelUrl(sentinels, unquote(service), login | tls, sentinels_login | tls)


def _options(query: str, *, with_tls: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to log in to Sentinels, and TLS's settings."""
    given = dict(parse_qsl(query))
    login = _given((name, given.pop(_SENTINELS_OWN + name, "")) for name in _LOGIN)
    tls: dict[str, Any] = {"ssl": True} if with_tls else {}
    if with_tls:
        tls |= {name: given.pop(name) for name in _TLS if name in given}
        if (checks_name := given.pop(_CHECKS_NAME, None)) is not None:
            if checks_name not in _BOOLS:
                raise ValueError(f"{_CHECKS_NAME} is true or false")
            tls[_CHECKS_NAME] = _BOOLS[checks_name]
    if given:
        raise ValueError(f"unknown options: {', '.join(sorted(given))}")
    return login, tls


def _given(settings: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {name: value for name, value in settings if value}

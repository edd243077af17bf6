"""What a redis+sentinel:// URL says: which Sentinels to ask for the primary of which service, and how to log in there.

Knows no connections: `redis_link` and `open_records` make them.
"""

from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

SENTINEL_SCHEME = "redis+sentinel://"
_PORT = 26_379


class SentinelUrl(NamedTuple):
    sentinels: list[tuple[str, int]]
    service: str
    login: dict[str, Any]
    """To the servers; Sentinels are asked without."""


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Read redis+sentinel://[user:password@]host:port[,host:port...]/service. Raises ValueError."""
    parts = urlsplit(url)
    service = parts.path.removeprefix("/")
    if not service or "/" in service or parts.query:
        raise ValueError(f"{SENTINEL_SCHEME} is followed by host:port[,host:port...]/service")
    credentials, _, hosts = parts.netloc.rpartition("@")
    sentinels = []
    for host in hosts.split(","):
        name, _, port = host.partition(":")
        if not name or (port and not port.isdecimal()):
            raise ValueError("each Sentinel is host:port")  # not quoted: it may be of a password with a /
        sentinels.append((name, int(port or _PORT)))
    user, _, password = credentials.partition(":")
    login = {"username": unquote(user), "password": unquote(password)}
    return SentinelUrl(sentinels, unquote(service), {name: value for name, value in login.items() if value})

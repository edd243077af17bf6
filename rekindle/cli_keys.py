"""`rekindle keys`: who is let in. Works on the server's keys file, not on a server. Quick to import."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from rekindle.cli_connection import AsJson


def keys_app() -> App:
    app = App(name="keys", help="Make API keys.")
    app.command(new)
    return app


def new(
    *,
    tenant: str,
    api_keys: Annotated[str, Parameter(help="The file that `rekindle serve --api-keys` reads; made if need be.")],
    name: str = "",
    expires_in_days: float | None = None,
    operator: bool = False,
    as_json: AsJson = False,
) -> None:
    """Make an API key, print it once, and put its hash into the keys file. Servers take it up within a second.

    Parameters
    ----------
    tenant
        Whose key it is: all that is done with it is this tenant's.
    name
        What people know it by.
    expires_in_days
        By default it doesn't expire.
    operator
        It sees the figures of the whole cluster, and may erase any tenant.
    """
    from server.api_keys import new_key, parse_keys
    from server.config import ConfigError

    expires = None
    if expires_in_days is not None:
        expires = (datetime.now(UTC) + timedelta(days=expires_in_days)).replace(microsecond=0)
    path = Path(api_keys)
    try:
        key, entry = new_key(tenant, name=name, expires=expires, operator=operator)
        before = path.read_bytes() if path.exists() else b""
        gap = "" if not before else "\n" if before.endswith(b"\n") else "\n\n"
        addition = (gap + entry).encode()
        parse_keys(before + addition)
        _append(path, addition)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"rekindle: {api_keys}: {error}") from error
    print(json.dumps({"api_key": key, "tenant": tenant}) if as_json else key)


def _append(path: Path, content: bytes) -> None:
    """In one write, so that who reads it meanwhile, or appends too, sees whole entries."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, content)
    finally:
        os.close(file)

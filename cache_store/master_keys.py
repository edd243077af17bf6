"""Where master keys come from: a file, the environment, or a command that asks a key management service.

Each process reads them for itself, so that no secret is in a setting, in a log, or on its way between processes.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from cache_store.errors import InvalidRequest

if TYPE_CHECKING:
    from cache_store.sealing import Keyring

_HEX_DIGITS = 64
_ENTRY = re.compile(rf"([A-Za-z0-9._-]{{1,16}}):([0-9a-fA-F]{{{_HEX_DIGITS}}})")
_NAMES = "names"
_PLAIN = "plain"
_COMMAND_WITHIN_S = 30.0
_FIELD = "master_keys"
SOURCE = "file:PATH, env:NAME or command:COMMAND"
"""What a source may be."""

_log = structlog.get_logger(__name__)


def is_source(text: str) -> bool:
    """Whether this names a place that keys can come from."""
    kind, _, place = text.partition(":")
    return kind in ("file", "env", "command") and bool(place)


def load_keyring(source: str) -> "Keyring | None":
    """Read the keys that `source` names, None for an empty one. Raises InvalidRequest, which shows nothing of them."""
    if not source:
        return None
    kind, _, place = source.partition(":")
    match kind:
        case "file":
            return parse_keys(_read_file(Path(place)))
        case "env":
            return parse_keys(_read_environment(place))
        case "command":
            return parse_keys(_run(place))
    raise InvalidRequest(_FIELD, f"must be {SOURCE}")


def parse_keys(text: str) -> "Keyring":
    """Read entries ID:HEX, parted by whitespace. The first one seals, all open, and the one called `names` names
    blocks. The word `plain` beside them has records read that were never sealed.

    Raises InvalidRequest, which says which entry is wrong and never what is in it.
    """
    from cache_store.sealing import Keyring, MasterKey  # here: settings are checked without it

    keys: list[MasterKey] = []
    names: bytes | None = None
    entries = text.split()
    for number, entry in enumerate(entries, start=1):
        if entry == _PLAIN:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise InvalidRequest(
                _FIELD, f"entry {number} is not ID:HEX, an id of up to 16 letters and {_HEX_DIGITS} hex digits"
            )
        key_id, secret = match[1], bytes.fromhex(match[2])
        if any(key.key_id == key_id for key in keys) or (key_id == _NAMES and names is not None):
            raise InvalidRequest(_FIELD, f"entry {number} has the id of one before it")
        if key_id == _NAMES:
            names = secret
        else:
            keys.append(MasterKey(key_id, secret))
    if not keys or names is None:
        raise InvalidRequest(_FIELD, f"needs an entry ID:HEX that seals and one {_NAMES}:HEX that names blocks")
    return Keyring(keys, names=names, takes_plain=_PLAIN in entries)


def _read_file(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            _log.warning("the master keys are open to other users of this machine", path=str(path))
        return path.read_text("ascii")
    except OSError as error:
        raise InvalidRequest(_FIELD, f"the file can't be read: {error}") from error
    except UnicodeDecodeError:
        raise InvalidRequest(_FIELD, f"{path} is not text") from None  # the other error holds what was read


def _read_environment(name: str) -> str:
    if name not in os.environ:
        raise InvalidRequest(_FIELD, f"{name} is not in the environment")
    return os.environ[name]


def _run(command: str) -> str:
    """Its standard output; what it says on standard error is seen where ours is."""
    try:
        words = shlex.split(command)
        done = subprocess.run(words, stdout=subprocess.PIPE, timeout=_COMMAND_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        raise InvalidRequest(_FIELD, f"the command took longer than {_COMMAND_WITHIN_S:g} s") from None  # as above
    except (OSError, ValueError, IndexError) as error:  # IndexError: no word at all
        raise InvalidRequest(_FIELD, f"the command can't be run: {error}") from error
    if done.returncode:
        raise InvalidRequest(_FIELD, f"the command ended with status {done.returncode}")
    return done.stdout.decode("ascii", errors="replace")

"""The table of codecs: what each is called in a frame, what a session may choose, and what it may then be given.

Knows names and numbers. How a codec works is `worker/tiers/codecs`, which knows tensors.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CodecInfo:
    """One encoding of a block's KV. A change of its payload is a new version; an id is never given to another."""

    name: str
    id: int
    version: int
    lossy: bool


RAW = CodecInfo("raw", 0, 1, lossy=False)
LOSSLESS = CodecInfo("lossless", 1, 1, lossy=False)
INT8 = CodecInfo("int8", 2, 1, lossy=True)
K8V4 = CodecInfo("k8v4", 3, 1, lossy=True)
INT4 = CodecInfo("int4", 4, 1, lossy=True)

CODECS: tuple[CodecInfo, ...] = (RAW, LOSSLESS, INT8, K8V4, INT4)
"""Of falling size: each can be made from any before it, with the same bytes as from the original."""

LADDER = "ladder"
"""The session codec whose blocks move to smaller codecs as they get colder."""

SESSION_CODECS: tuple[str, ...] = (*(codec.name for codec in CODECS), LADDER)
"""What a session may choose."""

EXACT = ""
"""The fidelity of sessions whose KV comes back bit for bit."""

_BY_NAME = {codec.name: codec for codec in CODECS}
_BY_ID = {codec.id: codec for codec in CODECS}
_EXACT_ONES = frozenset(codec for codec in CODECS if not codec.lossy)


def named(name: str) -> CodecInfo:
    """The codec called `name`. Raises ValueError for a name there is none of."""
    if name not in _BY_NAME:
        raise ValueError(f"there is no codec {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def find(codec_id: int, version: int) -> CodecInfo | None:
    """The codec that a frame was written with, or None where this program can't read it."""
    codec = _BY_ID.get(codec_id)
    return codec if codec is not None and codec.version == version else None


def fidelity_of(session_codec: str) -> str:
    """What a session's blocks may have lost: part of their names, so that sessions of unlike fidelity share none.

    EXACT for the exact codecs, else the session codec's own name. Raises ValueError for what no session may choose.
    """
    if session_codec == LADDER:
        return LADDER
    codec = named(session_codec)
    return codec.name if codec.lossy else EXACT


def fidelity_kind(fidelity: str) -> int:
    """Of a frame's header: 0 exact, 1 of one lossy codec, 2 of the ladder (what ageing looks for)."""
    return {EXACT: 0, LADDER: 2}.get(fidelity, 1)


def allowed(fidelity: str) -> frozenset[CodecInfo]:
    """The codecs that a block of this fidelity may be in: the exact ones always."""
    if fidelity == LADDER:
        return frozenset(CODECS)
    return _EXACT_ONES if fidelity == EXACT else _EXACT_ONES | {named(fidelity)}


def codec_for(session_codec: str, *, is_full: bool, first_rung: str = LOSSLESS.name) -> CodecInfo:
    """What a session's block is written in. An unfull one is exact: it will be filled, and nothing is encoded twice.

    `first_rung` is the ladder's. Raises ValueError for what no session may choose.
    """
    codec = named(first_rung if session_codec == LADDER else session_codec)
    return LOSSLESS if codec.lossy and not is_full else codec

"""The ladder of codecs that a ladder session's blocks go down as they get colder, and how it is written.

Knows names and seconds. Who moves the blocks is `worker/tiers/ageing.py`.
"""

import itertools
from dataclasses import dataclass

from cache_store.codecs import CODECS, INT4, INT8, K8V4, CodecInfo, named

_DEFAULT_AFTER_S = {INT8: 600.0, K8V4: 1800.0, INT4: 3600.0}
"""Seconds for a rung that says none."""


@dataclass(frozen=True, slots=True)
class Rung:
    codec: CodecInfo
    after_s: float
    """How long nobody has asked Redis for a block when it comes to this rung; 0 for the first, in which it is born."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs of falling size and growing age, at least one."""

    rungs: tuple[Rung, ...]

    @property
    def first(self) -> CodecInfo:
        return self.rungs[0].codec

    def sped_up(self, times: float) -> "Ladder":
        """The same rungs, each reached so many times sooner."""
        return Ladder(tuple(Rung(rung.codec, rung.after_s / times) for rung in self.rungs))

    def due(self, idle_s: float) -> CodecInfo:
        """The codec that a block belongs in that was idle for so long."""
        return [rung for rung in self.rungs if rung.after_s <= idle_s][-1].codec


def parse_ladder(text: str) -> Ladder:
    """Read "lossless,int8@600,int4@3600": codecs, each with the idle seconds after which a block moves to it.

    Without "@" int8 is reached after 600 s, k8v4 after 1800 and int4 after 3600. Raises ValueError with what is wrong.
    """
    rungs = tuple(_rung(part.strip(), is_first=place == 0) for place, part in enumerate(text.split(",")))
    for above, below in itertools.pairwise(rungs):
        if CODECS.index(below.codec) <= CODECS.index(above.codec):
            raise ValueError(f"{below.codec.name} is not smaller than {above.codec.name}, which comes before it")
        if below.after_s <= above.after_s:
            raise ValueError(
                f"{below.codec.name} comes after {below.after_s:g} s, not later than {above.codec.name} "
                f"after {above.after_s:g} s"
            )
    return Ladder(rungs)


def _rung(text: str, *, is_first: bool) -> Rung:
    name, at, seconds = text.partition("@")
    codec = named(name)
    if is_first:
        if at:
            raise ValueError(f"blocks are born in the first rung: {name!r} takes no time, got {seconds!r}")
        return Rung(codec, 0.0)
    if not at:
        if codec not in _DEFAULT_AFTER_S:
            raise ValueError(f"{name!r} has no time of its own: say {name}@SECONDS")
        return Rung(codec, _DEFAULT_AFTER_S[codec])
    if not seconds.isdecimal():
        raise ValueError(f"{text!r} must end in whole seconds")
    return Rung(codec, float(seconds))

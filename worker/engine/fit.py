"""Least squares that follows the latest observations: few coefficients, none of them negative. Pure numbers.

Observations of one kind are averaged, the newest counting most; the coefficients fit the averages of all kinds. So many
small steps don't make it forget what large ones take.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

_Vector = npt.NDArray[np.float64]

_START_WEIGHT, _LEAST = 1e-4, 1e-9
_OLD_WEIGHT = 0.05
_AGES = 0.98
"""A kind's weight at each observation of another kind; it keeps `_OLD_WEIGHT` at least."""
_TRUSTED = 4
_MOST = 8.0
"""After the first few, an observation counts as at most so many times what was expected: one stall is only one."""
_RECOVERY = 0.5
"""What was less than half of what was expected has at least this part in the average: a recovery is to be seen soon."""


@dataclass(slots=True)
class _Kind:
    x: _Vector
    y: float
    weight: float = 1.0


class Fit:
    """`y = x · coefficients`, each coefficient at least 0. Errors count relative to y.

    What no observation says anything about stays as it was at the start.
    """

    def __init__(self, start: Sequence[float], *, newest: float) -> None:
        """`start` are the first coefficients, all above 0; `newest` is the part of the newest observation in its
        kind's average."""
        self._start = np.asarray(start, dtype=np.float64)
        self._newest = newest
        self._kinds: dict[Hashable, _Kind] = {}
        self._num_seen = 0
        self._solved: _Vector | None = self._start

    @property
    def is_measured(self) -> bool:
        return bool(self._kinds)

    @property
    def coefficients(self) -> _Vector:
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def predict(self, x: Sequence[float]) -> float:
        return float(self.coefficients @ np.asarray(x))

    def observe(self, kind: Hashable, x: Sequence[float], y: float) -> None:
        """`y` is above 0."""
        newest = self._newest
        if self._num_seen >= _TRUSTED and (expected := self.predict(x)) > 0:
            y = min(y, _MOST * expected)
            if y < expected / 2:
                newest = max(newest, _RECOVERY)
        for other in self._kinds.values():
            other.weight = max(_AGES * other.weight, _OLD_WEIGHT)
        seen = self._kinds.get(kind)
        if seen is None:
            self._kinds[kind] = _Kind(np.asarray(x, dtype=np.float64), y)
        else:
            seen.x = seen.x + newest * (np.asarray(x) - seen.x)
            seen.y += newest * (y - seen.y)
            seen.weight = 1.0
        self._num_seen += 1
        self._solved = None

    def _solve(self) -> _Vector:
        """The best of the solutions in which some coefficients are 0: with so few, all can be tried. In multiples of
        the start."""
        rows = np.array([kind.x * self._start / kind.y for kind in self._kinds.values()])
        weights = np.array([kind.weight for kind in self._kinds.values()])
        hold = _START_WEIGHT * (rows**2 * weights[:, None]).sum(axis=0) + _LEAST  # whatever the start's scale
        squares = (rows.T * weights) @ rows + np.diag(hold)
        products = rows.T @ weights + hold
        best, least = np.zeros_like(self._start), 0.0
        for free in product((True, False), repeat=len(self._start)):
            kept = np.flatnonzero(free)
            found = np.zeros_like(self._start)
            found[kept] = np.linalg.solve(squares[np.ix_(kept, kept)], products[kept])
            loss = float(found @ squares @ found - 2 * products @ found)
            if loss < least and (found >= 0).all():
                best, least = found, loss
        return best * self._start

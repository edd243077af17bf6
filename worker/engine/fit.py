"""Least squares that follows the latest observations: few coefficients, none of them negative. Pure numbers."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

_Vector = npt.NDArray[np.float64]

_ANCHOR = 0.02
"""What the anchor weighs beside one observation of typical size."""
_FORGET_SLOWNESS = 0.5
"""What is less than half of what was expected halves the past: among sums of what was slow it would not be seen."""
_TRUSTED = 4
_MOST = 8.0
"""After the first few, an observation counts as at most so many times what was expected: one stall is only one."""


class Fit:
    """`y = x · coefficients`, each coefficient at least 0, the newest observation counting most.

    What no observation says anything about stays where it was anchored last.
    """

    def __init__(self, start: Sequence[float], typical: Sequence[float], *, forget: float) -> None:
        """`start` are the first coefficients, `typical` is the size that each feature of `x` commonly has. An
        observation's weight is multiplied by `forget` (below 1) at each later one."""
        self._typical = np.asarray(typical, dtype=np.float64)
        self._forget = forget
        self._squares = np.zeros((len(start), len(start)))  # of features in typical sizes
        self._products = np.zeros(len(start))
        self._num_seen = 0
        self._scale = 1.0  # seconds, say: what weight 1 belongs to
        self._start = np.asarray(start, dtype=np.float64)
        self._solved: _Vector | None = self._start

    @property
    def coefficients(self) -> _Vector:
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def predict(self, x: Sequence[float]) -> float:
        return float(self.coefficients @ np.asarray(x))

    def observe(self, x: Sequence[float], y: float, *, weight: float = 1.0) -> None:
        forget = self._forget
        if self._num_seen >= _TRUSTED:
            expected = self.predict(x)
            y = min(y, _MOST * expected)
            if y < expected / 2:
                forget = min(forget, _FORGET_SLOWNESS)
        self._num_seen += 1
        scaled = np.asarray(x) / self._typical
        self._squares = forget * self._squares + weight * np.outer(scaled, scaled)
        self._products = forget * self._products + weight * y * scaled
        self._scale = forget * self._scale + (1 - forget) * weight
        self._solved = None

    def anchor(self) -> None:
        """Take what is known now for the start."""
        self._start = self.coefficients

    def _solve(self) -> _Vector:
        """The best of the solutions in which some coefficients are 0: with so few, all can be tried."""
        hold = _ANCHOR * self._scale
        squares = self._squares + hold * np.eye(len(self._start))
        products = self._products + hold * self._start * self._typical
        best, least = np.zeros_like(self._start), 0.0
        for free in product((True, False), repeat=len(self._start)):
            kept = np.flatnonzero(free)
            found = np.zeros_like(self._start)
            found[kept] = np.linalg.solve(squares[np.ix_(kept, kept)], products[kept])
            loss = float(found @ squares @ found - 2 * products @ found)
            if loss < least and (found >= 0).all():
                best, least = found, loss
        return best / self._typical

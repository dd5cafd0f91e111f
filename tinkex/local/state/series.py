"""Series of bounded length: the losses of a run by step, and tokens by second.  Pure; no lock."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import List

#: A curve that reaches this many points is thinned to half of them; even, so that all form pairs.
MOST_POINTS = 5000

#: Rates are kept for this many seconds.
RATE_SECONDS = 120


class Curve:
    """Losses by step; in long curves, each point is the mean over `stride` steps.

    Each point carries the *version* with which it was added; versions increase.

    Attributes:
        steps: the last step of each point.
        losses: the mean loss of each point's steps.
        stride: how many steps a point stands for.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.losses = array("d")
        self.stride = 1
        self._versions = array("q")
        self._thinned_at = 0
        self._sum = 0.0  # of the steps since the last point
        self._count = 0

    def add(self, step: int, loss: float, version: int) -> None:
        """Add the loss of a step."""
        self._sum += loss
        self._count += 1
        if self._count < self.stride:
            return
        self.steps.append(step)
        self.losses.append(self._sum / self._count)
        self._versions.append(version)
        self._sum, self._count = 0.0, 0
        if len(self.steps) >= MOST_POINTS:
            self._thin(version)

    def start_after(self, version: int) -> int:
        """Return the index of the first point that a reader of *version* does not have.

        It is 0 if the curve was thinned since, which replaced all points.
        """
        return 0 if version < self._thinned_at else bisect_right(self._versions, version)

    def _thin(self, version: int) -> None:
        pairs = zip(self.losses[::2], self.losses[1::2])
        self.losses = array("d", [(first + second) / 2 for first, second in pairs])
        # A pair stands at the later of its steps, as every point of more than one step does.
        self.steps, self._versions = self.steps[1::2], self._versions[1::2]
        self.stride *= 2
        self._thinned_at = version


class TokenRate:
    """Tokens in each of the last `RATE_SECONDS` seconds.  Instants are monotonic seconds."""

    def __init__(self) -> None:
        self._counts = [0.0] * RATE_SECONDS  # a ring, by second
        self._second = 0

    def add(self, tokens: int, start: float, end: float) -> None:
        """Add *tokens* processed from *start* to *end*, spread evenly over these seconds."""
        last = int(end)
        self._advance(last)
        # The ring has no place for earlier seconds; their share goes to the seconds that it has.
        first = max(int(start), last - RATE_SECONDS + 1)
        for second in range(first, last + 1):
            self._counts[second % RATE_SECONDS] += tokens / (last + 1 - first)

    def window(self, now: float) -> List[float]:
        """Return the tokens of each second, oldest first, up to the second before *now*."""
        self._advance(int(now))
        place = (self._second + 1) % RATE_SECONDS
        return (self._counts[place:] + self._counts[:place])[:-1]

    def _advance(self, second: int) -> None:
        # At most one round, however much time has passed.  *second* may also be in the past, since
        # threads read the clock before they wait for the lock: nothing is cleared then.
        for passed in range(max(self._second + 1, second - RATE_SECONDS + 1), second + 1):
            self._counts[passed % RATE_SECONDS] = 0.0
        self._second = max(self._second, second)

"""Counters and latencies of one client, and the snapshot of them that users get.

No threads; memory is bounded.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from typing import Any, Deque, Dict, List, Mapping, Tuple, Union

#: The stages of an operation, in order.
STAGES = ("encode", "submit", "queue", "fetch", "decode")
_AFTER_SUBMIT = STAGES[2:]

COUNTERS = ("requests", "rate_limited", "retries", "bytes_sent", "bytes_received")

#: A counter's name and the amount to add; a stage and the seconds that it took; the bytes sent and
#: received by a request; or the seconds that the last three stages took.
_Entry = Union[Tuple[str, float], Tuple[int, int], Tuple[float, float, float]]

_FOLD_AT = 1024

# Buckets of the histograms: four for each doubling, from a microsecond to about 20 minutes.  The
# middle of a bucket is within a tenth of every value in it.
_PER_DOUBLING = 4
_BUCKETS = 30 * _PER_DOUBLING


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long one stage of the operations has taken, in seconds.

    ``p50`` and ``p95`` are accurate to within a tenth; the other values are exact.
    """

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    max: float = 0.0


@dataclasses.dataclass(frozen=True)
class Metrics:
    """A snapshot of what a client is doing and has done.

    Attributes:
        in_flight: operations that are being or were submitted, and are not settled.
        queued: operations that wait to be sent.
        requests: HTTP requests that got a response; includes polls, but not heartbeats.
        rate_limited: responses with status 429.
        retries: requests, other than polls, that were sent again after a failure.
        bytes_sent, bytes_received: sizes of bodies: as sent on the wire, and as received after
            decompression.
        tokens_trained, tokens_prefilled, tokens_sampled: see `ServiceClient.usage`.
        latencies: by stage: ``encode``: encode the request; ``submit``: send it, including retries
            and their pauses; ``queue``: from its acceptance until the response with its result
            begins; ``fetch``: read the body of that response; ``decode``: decode that body.
    """

    in_flight: int
    queued: int
    requests: int
    rate_limited: int
    retries: int
    bytes_sent: int
    bytes_received: int
    tokens_trained: int
    tokens_prefilled: int
    tokens_sampled: int
    latencies: Mapping[str, Latency]

    def __str__(self) -> str:
        """Return a few lines to print, with times in milliseconds."""
        lines = [
            f"{self.in_flight} in flight, {self.queued} queued; {self.requests} requests, "
            f"{self.rate_limited} responses of 429, {self.retries} retries",
            f"{self.bytes_sent} bytes sent, {self.bytes_received} received; tokens: "
            f"{self.tokens_trained} trained, {self.tokens_prefilled} prefilled, "
            f"{self.tokens_sampled} sampled",
            f"{'ms':8}{'count':>9}{'mean':>9}{'p50':>9}{'p95':>9}{'max':>9}",
        ]
        for stage, one in self.latencies.items():
            times = (one.mean, one.p50, one.p95, one.max)
            lines.append(f"{stage:8}{one.count:9}" + "".join(f"{1e3 * t:9.1f}" for t in times))
        return "\n".join(lines)


class Recorder:
    """Records counts and durations.  Thread-safe; never blocks the threads that record."""

    def __init__(self) -> None:
        # append and popleft are atomic, so the threads that record need no lock; now and then one
        # of them folds the entries into the sums below.
        self._entries: Deque[_Entry] = collections.deque()
        # Guards the sums; held by the one thread that folds.
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._histograms = {stage: _Histogram() for stage in STAGES}

    def count(self, name: str, amount: int = 1) -> None:
        """Add *amount* to a counter."""
        self._entries.append((name, amount))

    def request(self, sent: int, received: int) -> None:
        """Count a request that got a response, with the sizes of both bodies in bytes."""
        self._entries.append((sent, received))
        if len(self._entries) >= _FOLD_AT:
            self._fold_if_free()

    def took(self, stage: str, seconds: float) -> None:
        """Note how long one stage of an operation took."""
        self._entries.append((stage, seconds))

    def result(self, queue_s: float, fetch_s: float, decode_s: float) -> None:
        """Note the last three stages of an operation whose result has arrived."""
        self._entries.append((queue_s, fetch_s, decode_s))

    def snapshot(self) -> Tuple[Dict[str, int], Dict[str, Latency]]:
        """Return the counters, and the latencies by stage."""
        with self._lock:
            self._fold_locked()
            counts = dict(self._counts)
            latencies = {stage: found.summary() for stage, found in self._histograms.items()}
        return counts, latencies

    def _fold_if_free(self) -> None:
        if self._lock.acquire(blocking=False):  # otherwise, another thread is already folding
            try:
                self._fold_locked()
            finally:
                self._lock.release()

    def _fold_locked(self) -> None:
        # Only the entries that exist now: other threads may keep appending during the loop.
        counts, histograms = self._counts, self._histograms
        for _ in range(len(self._entries)):
            entry: Any = self._entries.popleft()
            if len(entry) == 3:
                for stage, seconds in zip(_AFTER_SUBMIT, entry):
                    histograms[stage].add(seconds)
            elif not isinstance(entry[0], str):
                counts["requests"] += 1
                counts["bytes_sent"] += entry[0]
                counts["bytes_received"] += entry[1]
            elif entry[0] in histograms:
                histograms[entry[0]].add(entry[1])
            else:
                counts[entry[0]] += entry[1]


class _Histogram:
    """Durations, in buckets that grow by a fixed ratio.  Not thread-safe."""

    def __init__(self) -> None:
        self._buckets: List[int] = [0] * _BUCKETS
        self._count = 0
        self._sum = 0.0
        self._max = 0.0

    def add(self, seconds: float) -> None:
        place = int(_PER_DOUBLING * math.log2(seconds * 1e6)) if seconds > 1e-6 else 0
        self._buckets[min(place, _BUCKETS - 1)] += 1
        self._count += 1
        self._sum += seconds
        self._max = max(self._max, seconds)

    def summary(self) -> Latency:
        if not self._count:
            return Latency()
        mean = self._sum / self._count
        return Latency(self._count, mean, self._quantile(0.5), self._quantile(0.95), self._max)

    def _quantile(self, part: float) -> float:
        """Return the middle of the bucket that holds this quantile; *part* is in (0, 1)."""
        left = part * self._count
        for place, count in enumerate(self._buckets):
            left -= count
            if left <= 0:
                return min(1e-6 * math.pow(2.0, (place + 0.5) / _PER_DOUBLING), self._max)
        return self._max

"""LongWait: slices end at the limits, and notices come at growing intervals."""

from __future__ import annotations

import types

import pytest

from tinkex._runtime import clock as clock_module
from tinkex._runtime.clock import LongWait


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(clock_module, "_LONGEST_SLICE_S", 1000.0)
    return made


def test_pauses_between_notices_double_up_to_five_minutes(clock: Clock) -> None:
    wait = LongWait(10.0)
    assert wait.slice_s() == 10.0
    assert not wait.notice_is_due()
    pauses = []
    for _ in range(7):
        before = clock.now
        clock.now += wait.slice_s()
        assert wait.notice_is_due()
        assert not wait.notice_is_due()  # each notice is due only once
        pauses.append(clock.now - before)
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    assert wait.elapsed_s == sum(pauses)
    assert not wait.is_over


def test_a_slice_ends_with_the_timeout(clock: Clock) -> None:
    wait = LongWait(10.0, 4.0)
    assert wait.slice_s() == 4.0
    clock.now += 4.0
    assert wait.is_over
    assert wait.slice_s() == 0.0


def test_a_slice_is_short_if_waits_cannot_be_interrupted(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_module, "_LONGEST_SLICE_S", 0.25)
    assert LongWait(10.0).slice_s() == 0.25

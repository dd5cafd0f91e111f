"""PauseNotices: a paused sampler or run is logged, but not too often."""

from __future__ import annotations

import logging
from typing import List, Tuple

import pytest
from support.clocks import ManualClock

from tinkex._results import notices as notices_module
from tinkex._results.notices import PauseNotices

RUN = "run session-1:train:0"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def notices(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> PauseNotices:
    caplog.set_level(logging.INFO, "tinkex._results.notices")
    return PauseNotices(clock)


def logged(caplog: pytest.LogCaptureFixture) -> List[Tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_pause_is_logged_immediately_then_once_a_minute_and_at_its_end(
    notices: PauseNotices, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(13):  # over two minutes
        notices.note("sampler s", "paused_capacity", "all GPUs are busy")
        clock.advance(10.0)
    notices.note("sampler s", "active", None)
    notices.note("sampler s", "active", None)
    paused = ("WARNING", "the server has paused sampler s: paused_capacity (all GPUs are busy)")
    assert logged(caplog) == [paused] * 3 + [("INFO", "sampler s resumed")]


def test_a_short_pause_of_a_run_is_not_logged(
    notices: PauseNotices, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    notices.note(RUN, "paused_capacity", None, grace_s=60.0)
    clock.advance(59.0)
    notices.note(RUN, "paused_capacity", None, grace_s=60.0)
    notices.note(RUN, "active", None, grace_s=60.0)
    clock.advance(5.0)
    notices.note(RUN, "paused_capacity", None, grace_s=60.0)
    assert logged(caplog) == []
    clock.advance(60.0)
    notices.note(RUN, "paused_capacity", None, grace_s=60.0)
    assert logged(caplog) == [
        ("WARNING", f"the server has paused {RUN}: paused_capacity (no reason given)")
    ]


def test_requests_of_one_sampler_that_disagree_do_not_fill_the_log(
    notices: PauseNotices, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        notices.note("sampler s", "paused_rate_limit", "quota")
        notices.note("sampler s", "active", None)
        clock.advance(0.5)
    assert len(logged(caplog)) == 2


def test_each_sampler_or_run_reports_its_own_pause(
    notices: PauseNotices, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        notices.note(name, "paused_capacity", None)
    assert len(logged(caplog)) == 2


def test_responses_without_a_state_report_nothing(
    notices: PauseNotices, caplog: pytest.LogCaptureFixture
) -> None:
    notices.note("sampler s", None, None)
    notices.note("sampler s", "active", None)
    assert logged(caplog) == []
    assert notices._pauses == {}


def test_samplers_are_forgotten_after_a_long_time(
    notices: PauseNotices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices_module, "_KEPT", 3)
    for number in range(10):
        notices.note(f"sampler {number}", "paused_capacity", None)
    assert list(notices._pauses) == ["sampler 7", "sampler 8", "sampler 9"]

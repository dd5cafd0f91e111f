"""The loss curve of a run in bounded memory, and tokens per second."""

from __future__ import annotations

import math

import pytest

from tinkex.local.state.series import MOST_POINTS, RATE_SECONDS, Curve, TokenRate


def curve_of(steps: int) -> Curve:
    curve = Curve()
    for step in range(1, steps + 1):
        curve.add(step, float(step), version=step)
    return curve


def test_a_short_curve_has_every_step() -> None:
    curve = curve_of(4999)
    assert (curve.stride, len(curve.steps)) == (1, 4999)
    assert curve.losses[:3].tolist() == [1.0, 2.0, 3.0]


def test_a_long_curve_is_bounded_and_has_means() -> None:
    curve = curve_of(20_000)
    assert curve.stride == 8
    assert len(curve.steps) == len(curve.losses) == 2500
    assert curve.steps[:3].tolist() == [8, 16, 24]
    assert curve.losses[0] == pytest.approx(sum(range(1, 9)) / 8)
    assert curve.losses[-1] == pytest.approx(sum(range(19_993, 20_001)) / 8)


def test_a_million_steps_take_bounded_memory() -> None:
    curve = curve_of(1_000_000)
    assert len(curve.steps) < MOST_POINTS
    assert curve.steps[-1] > 999_000


def test_a_reader_gets_only_new_points() -> None:
    curve = curve_of(10)
    assert curve.start_after(0) == 0
    assert curve.start_after(7) == 7
    assert curve.start_after(10) == 10


def test_after_a_curve_was_thinned_its_reader_gets_all_of_it() -> None:
    curve = curve_of(5003)
    assert curve.start_after(4999) == 0
    assert curve.start_after(5000) == 2500
    assert curve.steps[2500:].tolist() == [5002]


def test_a_loss_that_is_not_finite_stays_one_point() -> None:
    curve = Curve()
    for step, loss in enumerate((1.0, math.nan, 2.0), 1):
        curve.add(step, loss, step)
    assert [math.isnan(loss) for loss in curve.losses] == [False, True, False]


def test_tokens_are_spread_over_the_seconds_that_they_took() -> None:
    rate = TokenRate()
    rate.add(90, 1000.5, 1002.1)
    rate.add(7, 1002.2, 1002.3)
    assert sum(rate.window(1002.9)) == 60.0  # without the current second
    assert rate.window(1003.0)[-3:] == [30.0, 30.0, 37.0]


def test_rates_forget_old_seconds() -> None:
    rate = TokenRate()
    rate.add(60, 1000.0, 1000.5)
    assert len(rate.window(1001.0)) == RATE_SECONDS - 1
    assert sum(rate.window(1100.0)) == 60.0
    assert sum(rate.window(1000.0 + RATE_SECONDS)) == 0.0
    rate.add(RATE_SECONDS, 0.0, 5000.0)  # work that took hours fills the window evenly
    assert set(rate.window(5001.0)) == {1.0}
    assert sum(rate.window(1e9)) == 0.0

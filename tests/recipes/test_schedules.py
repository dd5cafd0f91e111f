"""Learning rates of the schedules, step by step."""

from __future__ import annotations

import math

import pytest

from tinkex.errors import InvalidInputError
from tinkex.recipes import constant, cosine, linear


def rates(schedule, count):
    return [schedule(index).learning_rate for index in range(count)]


def test_constant_keeps_the_rate_after_the_warmup():
    assert rates(constant(1.0), 3) == [1.0, 1.0, 1.0]
    assert rates(constant(1.0, warmup=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_reaches_zero_after_the_last_step():
    assert rates(linear(1.0, 4), 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(linear(1.0, 6, warmup=2), 6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_in_the_middle():
    found = rates(cosine(2.0, 6, warmup=2), 6)
    expected = [1 + math.cos(math.pi * done / 4) for done in range(4)]
    assert found == pytest.approx([1.0, 2.0, *expected])
    assert found[4] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_steps_after_the_last_one_keep_the_last_rate(schedule):
    made = schedule(1.0, 4)
    assert made(100) == made(3)


def test_other_parameters_of_adam_are_passed_on():
    params = linear(1.0, 4, weight_decay=0.1, grad_clip_norm=2.0)(0)
    assert (params.weight_decay, params.grad_clip_norm) == (0.1, 2.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear(1.0, 0),
        lambda: linear(1.0, 4, warmup=4),
        lambda: cosine(1.0, 4, warmup=-1),
        lambda: constant(float("nan")),
        lambda: constant(1.0, beta1=2.0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(InvalidInputError):
        make()

"""Batches: which examples are in which step."""

from __future__ import annotations

import itertools

import pytest

from tinkex.errors import InvalidInputError
from tinkex.recipes import Batches


def test_each_epoch_has_every_example_in_another_order():
    batches = Batches(range(10), 4, epochs=3, seed=1)
    seen = list(itertools.chain.from_iterable(batches))
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 4, 4, 2]


def test_the_order_is_the_same_from_any_step_and_in_every_release():
    batches = list(Batches(range(5), 2, epochs=2, seed=7))
    assert Batches(range(5), 2, epochs=2, seed=7)[3] == batches[3]
    assert list(Batches(range(5), 2, seed=0)) == [[2, 0], [3, 4], [1]]


def test_another_seed_gives_another_order_and_no_seed_keeps_the_order():
    assert list(Batches(range(50), 50, seed=1)) != list(Batches(range(50), 50, seed=2))
    assert list(Batches(range(5), 2, seed=None)) == [[0, 1], [2, 3], [4]]


def test_steps_may_be_given_and_end_in_the_middle_of_an_epoch():
    batches = Batches(range(3), 2, steps=4, seed=None)
    assert list(batches) == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert batches[-1] == [0, 1]
    assert batches[1:3] == [[2, 0], [1, 2]]
    with pytest.raises(IndexError):
        batches[4]


def test_an_epoch_may_be_a_fraction():
    assert len(Batches(range(100), 10, epochs=0.25)) == 3
    assert sum(map(len, Batches(range(100), 10, epochs=0.25))) == 25


def test_examples_are_read_only_when_their_batch_is_needed():
    read = []

    class Data(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = Batches(Data(range(6)), 2, seed=None)
    assert read == []
    assert batches[1] == [2, 3]
    assert read == [2, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Batches([], 2),
        lambda: Batches([1], 0),
        lambda: Batches([1], 1, epochs=0),
        lambda: Batches([1], 1, epochs=float("nan")),
        lambda: Batches([1], 1, steps=0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(InvalidInputError):
        make()

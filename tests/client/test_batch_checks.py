"""What is wrong with a batch is told before anything is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.training import batch_checks
from tinkex.training.batch_checks import check_batch, check_ttl
from tinkex.types import Datum, ImageChunk, ModelInput


def datum(tokens: Any = (1, 2, 3), **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints(list(tokens)), inputs or {"target_tokens": [2, 3, 4]})


def test_a_good_batch_comes_back_as_a_list() -> None:
    one, two = datum(), datum()
    assert check_batch((one, two), "cross_entropy", {"a": 1, "b": 0.5, "c": "x"}) == [one, two]
    assert check_batch(iter([one]), "my_loss") == [one]  # type: ignore[arg-type]  # works too


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([], "the batch is empty"),
        (None, "NoneType"),
        (7, "int"),
        (datum(), "[datum]"),
        ([datum(), {"model_input": 1}], "data[1] is a dict"),
        ([datum(())], "data[0]: model_input has no tokens"),
        ([datum(target_tokens=[1, 2])], "data[0]: loss input 'target_tokens' has 2 entries for 3"),
        ([datum(), datum(weights=[1.0] * 4)], "data[1]: loss input 'weights' has 4 entries for 3"),
        ([datum(advantages=[])], "'advantages' has 0 entries"),
        ([datum(weights=[1.0, float("nan"), 0.0])], "holds nan at position 1"),
        ([datum(logprobs=[1.0, 1.0, float("inf")])], "holds inf at position 2"),
    ],
)
def test_a_bad_batch_is_named(data: Any, part: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_batch(data, "cross_entropy")
    assert part in str(caught.value)


@pytest.mark.parametrize("at", [0, 31, 32, 99])
def test_a_number_that_is_none_is_found_among_many(at: int) -> None:
    data = [datum(weights=[1.0] * 3, target_tokens=[1, 2, 3]) for _ in range(100)]
    data[at] = datum(weights=[1.0, 1.0, float("-inf")], target_tokens=[1, 2, 3])
    with pytest.raises(InvalidInputError, match=rf"data\[{at}\]: .*'weights' holds -inf .* 2"):
        check_batch(data, "cross_entropy")


def test_numbers_beside_an_image_are_looked_at() -> None:
    chunks = [*ModelInput.from_ints([1, 2]).chunks, ImageChunk(b"x", "png")]
    mixed = Datum(ModelInput(chunks), {"weights": [1.0, float("nan")]})
    with pytest.raises(InvalidInputError, match="holds nan at position 1"):
        check_batch([mixed], "cross_entropy")


def test_a_loss_input_that_seems_misspelt_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_checks, "_others", set())
    misspelt = datum(target_tokens=[2, 3, 4], weight=[1.0] * 3)
    for _ in range(2):
        check_batch([misspelt] * 2, "cross_entropy")
    check_batch([datum(target_tokens=[2, 3, 4], mask=[1.0] * 3)], "my_loss")
    (told,) = caplog.messages
    assert "'weight'" in told
    assert "is 'weights' meant" in told


@pytest.mark.parametrize("loss_fn", ["", None, 3])
def test_a_loss_is_a_name(loss_fn: Any) -> None:
    with pytest.raises(InvalidInputError, match="cross_entropy"):
        check_batch([datum()], loss_fn)


@pytest.mark.parametrize(
    "config",
    [{"a": None}, {"a": [1]}, {"a": float("nan")}, {"a": float("-inf")}, {1: 2.0}, "x", [1], 3],
)
def test_a_loss_config_holds_numbers_and_strings(config: Any) -> None:
    with pytest.raises(InvalidInputError, match="loss_fn_config"):
        check_batch([datum()], "ppo", config)


def test_lengths_beside_an_image_are_left_to_the_server() -> None:
    chunks = [*ModelInput.from_ints([1, 2]).chunks, ImageChunk(b"x", "png")]
    mixed = Datum(ModelInput(chunks), {"target_tokens": np.arange(9)})
    assert check_batch([mixed], "cross_entropy") == [mixed]


def test_inputs_of_unknown_names_may_have_any_length() -> None:
    assert check_batch([datum(my_input=[1.0])], "my_loss")


@pytest.mark.parametrize("ttl", [0, -1, 2.5, "60", True])
def test_a_ttl_is_a_whole_number_of_seconds(ttl: Any) -> None:
    with pytest.raises(InvalidInputError, match="ttl_seconds"):
        check_ttl(ttl)


def test_no_ttl_is_for_ever() -> None:
    check_ttl(None)
    check_ttl(60)

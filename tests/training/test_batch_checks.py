"""Mistakes in a batch are reported before anything is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinkex._training import checks
from tinkex._training.checks import as_loss_config, check_batch, check_name, check_ttl
from tinkex.errors import InvalidInputError
from tinkex.types import Datum, ImageChunk, ModelInput


def datum(tokens: Any = (1, 2, 3), **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints(list(tokens)), inputs or {"target_tokens": [2, 3, 4]})


def test_a_good_batch_is_returned_as_a_list() -> None:
    one, two = datum(), datum()
    assert check_batch((one, two), "cross_entropy") == [one, two]
    assert check_batch(iter([one]), "my_loss") == [one]  # type: ignore[arg-type]  # works too


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([], "the batch is empty"),
        (None, "the batch is None; it must be a list"),
        (7, "the batch is an int"),
        (datum(), "[datum]"),
        ([datum(), {"model_input": 1}], "data[1] is a dict"),
        ([datum(())], "data[0]: model_input has no tokens"),
        ([datum(target_tokens=[1, 2])], "data[0]: loss input 'target_tokens' has 2 entries for 3"),
        ([datum(), datum(weights=[1.0] * 4)], "data[1]: loss input 'weights' has 4 entries for 3"),
        ([datum(target_tokens=[2, 3])], "data[0]: loss input 'target_tokens' has 2 entries for 3"),
        (
            [datum(target_tokens=[3, 4], weights=[1.0] * 3)],
            "data[0]: loss input 'weights' has 3 entries for 2 target tokens",
        ),
        ([datum(target_tokens=[2, 3, 4], weights=[1.0])], "'weights' has 1 entries for 3 tokens"),
        ([datum(advantages=[])], "'advantages' has 0 entries"),
        ([datum(weights=[1.0, float("nan"), 0.0])], "holds nan at position 1"),
        ([datum(logprobs=[1.0, 1.0, float("inf")])], "holds inf at position 2"),
    ],
)
def test_the_error_about_a_bad_batch_names_the_datum(data: Any, part: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_batch(data, "cross_entropy")
    assert part in str(caught.value)


def test_inputs_for_the_response_tokens_only_are_passed_on() -> None:
    short = datum((1, 2, 3, 4), target_tokens=[4, 5], weights=[1.0, 1.0])
    assert check_batch([short], "cross_entropy") == [short]


@pytest.mark.parametrize("at", [0, 31, 32, 99])
def test_a_nan_is_found_among_many_numbers(at: int) -> None:
    data = [datum(weights=[1.0] * 3, target_tokens=[1, 2, 3]) for _ in range(100)]
    data[at] = datum(weights=[1.0, 1.0, float("-inf")], target_tokens=[1, 2, 3])
    with pytest.raises(InvalidInputError, match=rf"data\[{at}\]: .*'weights' holds -inf .* 2"):
        check_batch(data, "cross_entropy")


def test_numbers_in_a_datum_with_an_image_are_checked() -> None:
    chunks = [*ModelInput.from_ints([1, 2]).chunks, ImageChunk(b"x", "png")]
    mixed = Datum(ModelInput(chunks), {"weights": [1.0, float("nan")]})
    with pytest.raises(InvalidInputError, match="holds nan at position 1"):
        check_batch([mixed], "cross_entropy")


def test_a_loss_input_that_seems_misspelt_is_warned_about_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_checked_names", set())
    misspelt = datum(target_tokens=[2, 3, 4], weight=[1.0] * 3)
    for _ in range(2):
        check_batch([misspelt] * 2, "cross_entropy")
    check_batch([datum(target_tokens=[2, 3, 4], mask=[1.0] * 3)], "my_loss")
    (warning,) = caplog.messages
    assert "'weight'" in warning
    assert "is 'weights' meant" in warning


@pytest.mark.parametrize("loss_fn", ["", None, 3])
def test_a_loss_is_a_name(loss_fn: Any) -> None:
    with pytest.raises(InvalidInputError, match="cross_entropy"):
        check_batch([datum()], loss_fn)


@pytest.mark.parametrize(
    "config",
    [{"a": None}, {"a": [1]}, {"a": float("nan")}, {"a": float("-inf")}, {1: 2.0}, "x", [1], 3],
)
def test_a_loss_config_holds_numbers_and_strings(config: Any) -> None:
    assert as_loss_config({"a": 1, "b": 0.5, "c": "x"}) == {"a": 1, "b": 0.5, "c": "x"}
    with pytest.raises(InvalidInputError, match="loss_fn_config"):
        as_loss_config(config)


def test_lengths_in_a_datum_with_an_image_are_left_to_the_server() -> None:
    chunks = [*ModelInput.from_ints([1, 2]).chunks, ImageChunk(b"x", "png")]
    mixed = Datum(ModelInput(chunks), {"target_tokens": np.arange(9)})
    assert check_batch([mixed], "cross_entropy") == [mixed]


def test_inputs_of_unknown_names_may_have_any_length() -> None:
    assert check_batch([datum(my_input=[1.0])], "my_loss")


@pytest.mark.parametrize("ttl", [0, -1, 2.5, "an hour", True, "2.5"])
def test_a_ttl_is_a_whole_number_of_seconds(ttl: Any) -> None:
    with pytest.raises(InvalidInputError, match="ttl_seconds"):
        check_ttl(ttl)


def test_no_ttl_means_forever() -> None:
    assert check_ttl(None) is None
    assert check_ttl(60) == check_ttl("60") == check_ttl(np.int64(60)) == 60


def test_a_batch_is_copied_when_it_is_checked() -> None:
    one = datum(target_tokens=[2, 3, 4])
    (sent,) = check_batch([one], "cross_entropy")
    one.loss_fn_inputs["target_tokens"] = [9, 9, 9]  # type: ignore[assignment]
    one.loss_fn_inputs["weights"] = [1.0] * 3  # type: ignore[assignment]
    one.model_input.chunks.append(ImageChunk(b"x", "png"))  # type: ignore[attr-defined]
    assert sent == datum(target_tokens=[2, 3, 4])


@pytest.mark.parametrize("value", [[1.0] * 3, np.ones(3), np.ones(3, np.float32)], ids=repr)
def test_an_input_assigned_later_is_converted(value: Any) -> None:
    one = datum(target_tokens=[2, 3, 4])
    one.loss_fn_inputs["weights"] = value
    assert check_batch([one], "x") == [datum(target_tokens=[2, 3, 4], weights=[1.0] * 3)]


def test_the_error_about_an_input_assigned_later_names_its_datum() -> None:
    one = datum(target_tokens=[2, 3, 4])
    one.loss_fn_inputs["weights"] = "abc"  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match=r"data\[1\]: loss input 'weights' is a str"):
        check_batch([datum(), one], "x")
    one.loss_fn_inputs["weights"] = [1.0]  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match=r"data\[1\]: loss input 'weights' has 1 entries"):
        check_batch([datum(), one], "x")


def test_numpy_numbers_in_a_loss_config_become_plain_ones() -> None:
    config = as_loss_config(
        {"a": np.float32(0.5), "b": np.int64(2), "c": "x", "d": np.array(0.25), "e": True}
    )
    assert config == {"a": 0.5, "b": 2, "c": "x", "d": 0.25, "e": 1}
    assert {type(value) for value in config.values()} == {float, int, str}
    assert as_loss_config(None) == {}


@pytest.mark.parametrize("name", ["mid", "mid\n", " mid\r\n"])
def test_a_checkpoint_name_is_stripped(name: str) -> None:
    assert check_name(name) == "mid"


def test_a_number_is_not_a_checkpoint_name() -> None:
    with pytest.raises(InvalidInputError, match="checkpoint name 5 is of type int, not a string"):
        check_name(5)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\nb", "a\x00"])
def test_an_invalid_checkpoint_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="bare name"):
        check_name(name)

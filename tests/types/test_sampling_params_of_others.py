"""Unknown arguments of SamplingParams: accepted with a warning, as in the official class."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import warnings

import numpy as np
import pytest

from tinkex import SamplingParams


def test_an_unknown_argument_is_ignored_with_a_warning_that_names_it() -> None:
    with pytest.warns(UserWarning, match="no argument 'presence_penalty': it is ignored") as found:
        params = SamplingParams(max_tokens=3, presence_penalty=0.5)  # type: ignore[call-arg]
    assert params == SamplingParams(max_tokens=3)
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize("ids", [[7, 8], (7, 8), np.array([7, 8])])
def test_stop_token_ids_are_used_as_stop(ids: object) -> None:
    with pytest.warns(UserWarning, match="'stop_token_ids': its token ids are used as stop"):
        params = SamplingParams(stop_token_ids=ids)  # type: ignore[call-arg]
    assert params == SamplingParams(stop=[7, 8])
    assert params.to_json()["stop"] == [7, 8]


def test_stop_wins_over_stop_token_ids() -> None:
    with pytest.warns(UserWarning, match="'stop_token_ids': it is ignored"):
        params = SamplingParams(stop=["\n"], stop_token_ids=[7])  # type: ignore[call-arg]
    assert params.stop == ["\n"]


def test_a_bad_stop_token_id_is_found_by_the_check() -> None:
    with pytest.warns(UserWarning, match="stop_token_ids"):
        params = SamplingParams(stop_token_ids=[1.5])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="stop is"):
        params.check()


def test_each_calling_line_warns_once() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            SamplingParams(min_p=0.1)  # type: ignore[call-arg]
    assert len(found) == 1


def test_known_arguments_work_as_before() -> None:
    params = SamplingParams(3, top_p=0.5)
    assert dataclasses.replace(params, seed=1) == SamplingParams(3, 1, top_p=0.5)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert next(iter(inspect.signature(SamplingParams).parameters)) == "max_tokens"
    with pytest.raises(TypeError):
        SamplingParams(3, 4, [], 1.0, -1, 1.0, 9)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(3, max_tokens=4)  # type: ignore[misc]

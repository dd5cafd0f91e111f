"""Scripts written for the official SDK run with ``import tinkex as tinker``, in both styles.

tests/interop/test_same_results.py also runs them with the official SDK, and compares.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Dict, Mapping, Tuple

import pytest
from compat.programs import SCRIPTS, STYLES, run_with_tinkex
from servers.profiles import ProfiledServer

from tinkex.local import LocalServer, load_engine

Results = Callable[[str, str], Mapping[str, Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    """What a script printed in each style; all ran against one server, which is closed by now."""
    outcomes: Dict[Tuple[str, str], Callable[[], Mapping[str, Any]]] = {}
    with LocalServer(load_engine("deterministic", "cpu")) as server:
        for script, style in itertools.product(SCRIPTS, STYLES):
            outcomes[script, style] = _outcome(script, style, server.url)
    return lambda script, style: outcomes[script, style]()


def _outcome(script: str, style: str, url: str) -> Callable[[], Mapping[str, Any]]:
    """Return the script's output, or the failure, for its own tests to report."""
    try:
        printed = run_with_tinkex(script, style, url)
    except AssertionError as failure:
        message = str(failure)
        return lambda: pytest.fail(message)
    return lambda: printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_styles_do_the_same_and_warn_of_nothing(results: Results, script: str) -> None:
    older, newer = (results(script, style) for style in STYLES)
    assert older == newer
    assert older["stderr"] == ""


def test_the_supervised_loop_learns_saves_and_samples(results: Results) -> None:
    found = results("supervised", "newer")
    assert (found["base_model"], found["rank"]) == ("deterministic", 8)
    assert len(found["losses"]) == 6
    assert found["losses"] == sorted(found["losses"], reverse=True)
    before, after = found["held_out"]
    assert after < before * 0.8
    assert found["state"] == ["weights", "final"]
    assert found["weights"] == ["sampler_weights", "final"]
    assert found["stop_reasons"] == ["length", "length"]
    first, second = found["tokens"]
    assert (len(first), len(second)) == (8, 8)
    assert first != second
    assert [len(one) for one in found["logprobs"]] == [8, 8]
    assert found["scores"][0] is None
    assert all(score < 0 for score in found["scores"][1:])


def test_the_reinforcement_loop_samples_the_weights_of_each_iteration(results: Results) -> None:
    found = results("reinforcement", "newer")
    assert [len(one["rewards"]) for one in found["history"]] == [12, 12, 12]
    for one in found["history"]:
        assert one["loss"] == pytest.approx(0, abs=1e-5)  # on-policy: ratio 1, advantages sum to 0
        assert dict(one["metrics"])["optimizer_steps:max"] >= 1
    prompts = [one["logprobs"][0][0] for one in found["history"]]
    assert len(set(prompts)) == 3  # each iteration trained the next one's weights
    assert len(found["greedy"]) == 6


def test_checkpoints_appear_in_the_lists_and_training_resumes_identically(
    results: Results,
) -> None:
    found = results("checkpoints", "newer")
    shown = ["sampler_weights/shown", "sampler", False, False]
    kept = ["weights/kept", "training", False, False]
    assert found["saved"] == [shown, kept, ["weights/short", "training", False, True]]
    assert found["run"] == ["deterministic", True, 4, {"purpose": "tidy"}]
    assert found["info"] == ["deterministic", True, 4]
    assert found["changed"] == [
        ["sampler_weights/shown", "sampler", True, False],
        ["weights/kept", "training", False, True],
        ["weights/short", "training", False, False],
    ]
    assert found["tidied"] == [shown, ["weights/kept", "training", False, True]]
    assert found["gone"] == ["NotFoundError", 404]
    assert found["mine"] == [True, True, False]
    assert found["parsed"] == [True, "training"]
    assert found["resumed"] == found["ahead"]
    assert found["fresh"][0][0] == found["ahead"][0][0]
    steps = [reported["optimizer_steps:max"] for _, reported in found["fresh"] + found["resumed"]]
    assert steps == [1, 2, 3, 4, 5, 6]  # without the optimizer's state, and with it
    again, on = found["overwritten"]
    assert again == on
    assert again[0][0] < found["ahead"][-1][0]


@pytest.mark.parametrize("profile", ["skyrl-0.3", "skyrl-0.4", "tuft-0.2", "hatchery-0.3"])
def test_the_reinforcement_loop_is_the_same_on_servers_of_other_kinds(
    results: Results, profile: str
) -> None:
    """JSON or protobuf, strict or not, with metrics or without: the script sees no difference."""
    with ProfiledServer(load_engine("deterministic", "cpu"), profile=profile) as server:
        found = run_with_tinkex("reinforcement", "newer", server.url)
    expected = results("reinforcement", "newer")
    assert found["greedy"] == expected["greedy"]
    for one, other in zip(found["history"], expected["history"]):
        assert one["rewards"] == other["rewards"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["logprobs"] == [pytest.approx(row) for row in other["logprobs"]]
    assert len(found["history"]) == 3

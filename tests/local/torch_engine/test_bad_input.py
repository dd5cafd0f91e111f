"""Faults of a batch are reported before anything is computed, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping

import numpy as np
import pytest
from local.torch_engine.reference import gradient_of, make_data

from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine import training
from tinkex.local.engines.torch_engine.network import plan_passes
from tinkex.types import (
    AdamParams,
    Datum,
    DmelChunk,
    LoraConfig,
    ModelInput,
    TensorData,
)


def datum(**inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], **inputs})


def without_targets(**inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([1, 2, 3]), inputs)


GOOD_RL = {"logprobs": [-1.0, -1.0, -1.0], "advantages": [1.0, 1.0, 1.0]}
NAN, INF = float("nan"), float("inf")

CASES: Mapping[str, Any] = {
    "model_input holds token 260": ("cross_entropy", datum(), [1, 260, 3]),
    "model_input is empty": ("cross_entropy", datum(), []),
    "has 513 tokens": ("cross_entropy", datum(), [1] * 513),
    "'target_tokens' is missing": ("cross_entropy", without_targets(weights=[1.0] * 3)),
    "target_tokens holds token -100": ("cross_entropy", datum(target_tokens=[2, -100, 4])),
    "target_tokens holds token 999": ("cross_entropy", datum(target_tokens=[2, 999, 4])),
    "target_tokens are float32": (
        "cross_entropy",
        datum(target_tokens=TensorData([1.0, 2.0, 3.0], "float32")),
    ),
    "one target .* per input token": ("cross_entropy", datum(target_tokens=[2, 3, 4, 5])),
    r"takes shape \(n,\)": ("ppo", datum(target_tokens=[[2], [3], [4]], **GOOD_RL)),
    "weights has shape": ("cross_entropy", datum(weights=[1.0, 1.0])),
    "weights is NaN or infinite at token 1": ("cross_entropy", datum(weights=[1.0, NAN, 1.0])),
    "advantages is NaN or infinite at token 2": (
        "importance_sampling",
        datum(**{**GOOD_RL, "advantages": [1.0, 1.0, INF]}),
    ),
    "'logprobs' is missing": ("ppo", datum(advantages=[1.0] * 3)),
    "'advantages' is missing": ("dro", datum(logprobs=[-1.0] * 3)),
    "no input 'mask'.*fold a mask": ("cispo", datum(mask=[1.0] * 3, **GOOD_RL)),
    "no input 'weights'": ("importance_sampling", datum(weights=[1.0] * 3, **GOOD_RL)),
    "no input 'clip_low_threshold'": ("dro", datum(clip_low_threshold=[1.0] * 3, **GOOD_RL)),
    "text tokens only": ("cross_entropy", datum(), ModelInput((DmelChunk(bytes([0, 1, 3])),))),
    "the loss is not finite": (
        "importance_sampling",
        datum(logprobs=[-1e30] * 3, advantages=[1.0] * 3),
    ),
}


@pytest.mark.parametrize("words", CASES)
def test_a_faulty_datum_is_named_and_the_state_is_unchanged(
    words: str, run: Any, tmp_path: Path
) -> None:
    loss_fn, bad, *tokens = CASES[words]
    if tokens:
        (given,) = tokens
        given = (
            given if isinstance(given, ModelInput) else ModelInput.from_ints(np.array(given, int))
        )
        bad = Datum(given, bad.loss_fn_inputs)
    inputs = {} if loss_fn == "cross_entropy" else GOOD_RL
    good = make_data([20, 10])
    run.create("expected", LoraConfig(rank=4, seed=7))
    for model_id in ("m", "expected"):
        run.forward_backward(model_id, good, "cross_entropy", {})
    with pytest.raises(EngineError, match=words) as caught:
        run.forward_backward("m", [datum(**inputs), bad], loss_fn, {})
    assert str(caught.value).startswith("datum 1: ")
    assert caught.value.category == "user"
    mine = gradient_of(run, "m", tmp_path / "m")
    expected = gradient_of(run, "expected", tmp_path / "expected")
    assert all(np.array_equal(mine[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("loss_fn", "config", "words"),
    [
        ("nonsense", {}, "unknown loss_fn 'nonsense'.*cross_entropy, importance_sampling"),
        ("ppo", {"clip_low": 0.5}, "no key 'clip_low'; known keys: clip_low_threshold"),
        ("cross_entropy", {"beta": 0.5}, "known keys: none"),
        ("dro", {"beta": NAN}, "beta is nan"),
        ("dro", {"beta": "x"}, "beta is 'x'"),
    ],
)
def test_an_unknown_loss_or_configuration_is_refused(
    loss_fn: str, config: Dict[str, Any], words: str, run: Any
) -> None:
    with pytest.raises(EngineError, match=words):
        run.forward_backward("m", [datum()], loss_fn, config)


def test_an_empty_batch_is_refused(run: Any) -> None:
    with pytest.raises(EngineError, match="the batch is empty"):
        run.forward_backward("m", [], "cross_entropy", {})


def test_models_that_do_not_exist_and_parameters_out_of_range_are_refused(run: Any) -> None:
    for call in (
        lambda: run.forward_backward("x", [datum()], "cross_entropy", {}),
        lambda: run.optim_step("x", AdamParams()),
        lambda: run.save("x", Path(), with_optimizer=False),
    ):
        with pytest.raises(EngineError, match="no model x"):
            call()
    with pytest.raises(EngineError, match="exists already"):
        run.create("m", LoraConfig(rank=4))
    with pytest.raises(EngineError, match="rank is 0"):
        run.create("new", LoraConfig(rank=0))
    with pytest.raises(EngineError, match="learning_rate is nan"):
        run.optim_step("m", AdamParams(learning_rate=NAN))
    run.create_sampler("s", None)
    with pytest.raises(EngineError, match="exists already"):
        run.create_sampler("s", None)


def test_a_pass_that_fails_halfway_leaves_the_gradient_unchanged(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = make_data([300, 20])
    run.create("expected", LoraConfig(rank=4, seed=7))
    for model_id in ("m", "expected"):
        run.forward_backward(model_id, good, "cross_entropy", {})
    real = training._run_pass
    calls = []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "_run_pass", breaks)
    monkeypatch.setattr(training, "plan_passes", lambda lengths: [[0], [1]])
    with pytest.raises(MemoryError):
        run.forward_backward("m", good, "cross_entropy", {})
    assert len(calls) == 2
    mine = gradient_of(run, "m", tmp_path / "m")
    expected = gradient_of(run, "expected", tmp_path / "expected")
    assert all(np.array_equal(mine[name], expected[name]) for name in expected)


def test_passes_keep_to_the_budget_and_group_rows_of_similar_length() -> None:
    lengths = [10, 500, 490, 100, 95, 900, 3000, 90, 12, 11, 9]
    passes = plan_passes(lengths, budget=1000)
    assert sorted(index for group in passes for index in group) == list(range(len(lengths)))
    assert passes[0] == [6]  # longer than the budget, so it is alone
    assert passes[1] == [5]
    assert passes[2] == [1, 2]
    for group in passes[1:]:
        assert len(group) * max(lengths[index] for index in group) <= 1000
    assert plan_passes([3, 3, 3], budget=1000) == [[0, 1, 2]]
    # A small pass also takes shorter rows: another pass would cost more than the padding.
    assert plan_passes([40, 10, 5], budget=1000) == [[0, 1, 2]]
    assert plan_passes([600, 100], budget=2048) == [[0], [1]]

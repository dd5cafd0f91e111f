"""The engine without machine learning behaves like a model: repeatable results, a falling loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import pytest

from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.engines.engine import EngineError
from tinkex.types import (
    AdamParams,
    Datum,
    LoraConfig,
    ModelInput,
    SampleRequest,
    SampleResponse,
    SamplingParams,
)


@pytest.fixture
def engine() -> DeterministicEngine:
    engine = DeterministicEngine(vocab_size=50, context_length=64)
    engine.create("m", LoraConfig(rank=4))
    engine.create_sampler("s", None)
    return engine


def datum(**inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], **inputs})


def loss(
    engine: DeterministicEngine,
    name: str = "cross_entropy",
    config: Optional[Dict[str, float]] = None,
    **inputs: Any,
) -> float:
    data = [datum(**inputs)]
    output = engine.forward_backward("m", data, name, config or {}, forward_only=True)
    return output.metrics["loss:sum"]


def sample(engine: DeterministicEngine, request: SampleRequest) -> SampleResponse:
    finished = [done for part in engine.sample("s", [request]) for done in part]
    assert [index for index, _ in finished] == [0]
    result = finished[0][1]
    if isinstance(result, EngineError):
        raise result
    return result


def test_before_training_it_is_a_distribution(engine: DeterministicEngine) -> None:
    vocabulary = np.arange(50).reshape(1, 50)
    data = Datum(ModelInput.from_ints([7]), {"target_tokens": vocabulary})
    output = engine.forward_backward("m", [data], "cross_entropy", {})
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    # Two candidates may be the same token by chance; its probabilities then add up.
    assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1.0, rel=1e-5)


def test_results_depend_only_on_the_input(engine: DeterministicEngine) -> None:
    other = DeterministicEngine(vocab_size=50, context_length=64)
    other.create("m", LoraConfig(rank=16))
    assert loss(engine) == loss(other)
    assert loss(engine) != loss(engine, weights=[1.0, 0.0, 0.0])


def test_steps_lower_the_loss_and_need_a_gradient(engine: DeterministicEngine) -> None:
    losses = [loss(engine)]
    for _ in range(3):
        engine.forward_backward("m", [datum()], "cross_entropy", {})
        metrics = engine.optim_step("m", AdamParams())
        losses.append(loss(engine))
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4
    assert metrics["optimizer_steps:max"] == 3
    assert engine.optim_step("m", AdamParams())["grad_norm:mean"] == 0
    assert loss(engine) == losses[-1]


def test_losses_follow_their_formulas(engine: DeterministicEngine) -> None:
    output = engine.forward_backward("m", [datum()], "cross_entropy", {}, forward_only=True)
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy().astype(np.float64)
    assert loss(engine, weights=[1.0, 2.0, 0.0]) == pytest.approx(-logprobs @ [1, 2, 0])
    old = logprobs - np.log([0.5, 1.0, 3.0])  # ratios
    advantages = np.array([2.0, -1.0, 1.0])
    inputs = {"logprobs": old.astype(np.float32), "advantages": advantages.astype(np.float32)}

    def of(name: str) -> Any:
        return pytest.approx(loss(engine, name, **inputs), rel=1e-5)

    assert of("importance_sampling") == -(0.5 * 2 - 1.0 + 3.0)
    assert of("ppo") == -(0.5 * 2 - 1.0 + 1.2)
    clipped = np.array([0.8, 1.0, 1.2])
    assert -(clipped * advantages * logprobs).sum() == of("cispo")
    ratio = 1.5 ** (1 / 3)  # the sequence's ratio: the geometric mean of 0.5, 1 and 3
    assert -(min(ratio, 1.0004) * 2 - ratio + 1.0004) == of("gspo")
    wide = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    own = loss(engine, "gspo", wide, **inputs, sequence_ratio_mask=[0.0, 1.0, 1.0])
    assert own == pytest.approx(-(3**0.5) * advantages.sum(), rel=1e-5)
    squares = np.log([0.5, 1.0, 3.0]) ** 2
    assert -(logprobs * advantages - 0.025 * squares).sum() == of("dro")


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_a_token_of_advantage_zero_adds_nothing_whatever_its_old_logprob(
    name: str, engine: DeterministicEngine
) -> None:
    output = engine.forward_backward("m", [datum()], "cross_entropy", {}, forward_only=True)
    own = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    advantages = np.array([0.0, 1.0, 1.0], np.float32)
    placeholder = own.copy()
    placeholder[0] = -99999.0
    expected = loss(engine, name, logprobs=own, advantages=advantages)
    assert np.isfinite(expected)
    assert loss(engine, name, logprobs=placeholder, advantages=advantages) == expected


def test_a_large_ratio_is_clipped_and_an_infinite_loss_is_an_error(
    engine: DeterministicEngine,
) -> None:
    logprobs, ones = np.full(3, -99999.0, np.float32), np.ones(3, np.float32)
    assert loss(engine, "ppo", logprobs=logprobs, advantages=ones) == pytest.approx(-3 * 1.2)
    with pytest.raises(EngineError, match="datum 0: the loss is not finite"):
        loss(engine, "ppo", logprobs=logprobs, advantages=-ones)
    with pytest.raises(EngineError, match="datum 0: the loss is not finite"):
        loss(engine, "importance_sampling", logprobs=logprobs, advantages=ones)


@pytest.mark.parametrize(
    ("name", "inputs", "says"),
    [
        ("nonsense", {}, "unknown"),
        ("ppo", {}, "input 'logprobs' is missing; ppo needs it"),
        ("cross_entropy", {"logprobs": [0.0] * 3}, "has no input 'logprobs'"),
        ("cross_entropy", {"weights": [1.0, float("nan"), 1.0]}, "NaN or infinite at token 1"),
        ("cross_entropy", {"weights": [1.0, 1.0]}, "shape"),
        ("cross_entropy", {"target_tokens": [1, 2, 3, 4]}, "one target .* per input token"),
        ("cross_entropy", {"target_tokens": [1, 2, 50]}, "holds token 50"),
    ],
)
def test_bad_input_is_named(
    engine: DeterministicEngine, name: str, inputs: Dict[str, List[float]], says: str
) -> None:
    others = {"logprobs": [0.0] * 3, "advantages": [0.0] * 3} if name == "ppo" else {}
    good, bad = datum(**others), datum(**inputs)
    with pytest.raises(EngineError, match=says) as problem:
        engine.forward_backward("m", [good, bad], name, {})
    assert problem.value.category == "user"
    if name != "nonsense":
        assert "datum 1" in str(problem.value)


def test_targets_for_only_the_last_tokens_are_accepted(engine: DeterministicEngine) -> None:
    (everything,) = engine.forward_backward("m", [datum()], "cross_entropy", {}).loss_fn_outputs
    last = datum()
    last = Datum(
        last.model_input, {"target_tokens": last.loss_fn_inputs["target_tokens"].to_numpy()[1:]}
    )
    (some,) = engine.forward_backward("m", [last], "cross_entropy", {}).loss_fn_outputs
    assert (some["logprobs"].to_numpy() == everything["logprobs"].to_numpy()[1:]).all()


@pytest.mark.parametrize("mask", [[0.0, 0.0, 0.0], [1.0, -1.0, 1.0]])
def test_a_sequence_without_a_ratio_is_named(
    engine: DeterministicEngine, mask: List[float]
) -> None:
    bad = datum(logprobs=[-1.0] * 3, advantages=[1.0] * 3, sequence_ratio_mask=mask)
    with pytest.raises(EngineError, match="sequence_ratio_mask"):
        engine.forward_backward("m", [bad], "gspo", {})


@pytest.mark.parametrize("value", ["x", "0.5", float("nan")])
@pytest.mark.parametrize(
    ("name", "key"),
    [("ppo", "clip_low_threshold"), ("cispo", "clip_high_threshold"), ("dro", "beta")],
)
def test_a_loss_setting_that_is_not_a_number_is_named(
    engine: DeterministicEngine, name: str, key: str, value: Any
) -> None:
    good = datum(logprobs=[0.0] * 3, advantages=[0.0] * 3)
    with pytest.raises(EngineError, match=f"{key} is .*; it must be a finite number") as problem:
        engine.forward_backward("m", [good], name, {key: value})
    assert problem.value.category == "user"


def test_a_state_is_saved_and_loaded(engine: DeterministicEngine, tmp_path: Path) -> None:
    engine.forward_backward("m", [datum()], "cross_entropy", {})
    engine.optim_step("m", AdamParams())
    for name, with_optimizer in (("full", True), ("weights", False)):
        (tmp_path / name).mkdir()
        engine.save("m", tmp_path / name, with_optimizer=with_optimizer)
    trained = loss(engine)
    engine.create("m", engine.lora_config(tmp_path / "full"))
    assert loss(engine) > trained
    engine.load("m", tmp_path / "full", with_optimizer=True)
    assert loss(engine) == trained
    engine.forward_backward("m", [datum()], "cross_entropy", {})
    assert engine.optim_step("m", AdamParams())["optimizer_steps:max"] == 2
    with pytest.raises(EngineError, match="no optimizer state"):
        engine.load("m", tmp_path / "weights", with_optimizer=True)
    with pytest.raises(EngineError, match="not a checkpoint"):
        engine.load("m", tmp_path, with_optimizer=False)


def test_sampling_ends_at_the_end_of_sequence_by_default(
    engine: DeterministicEngine,
) -> None:
    prompt = ModelInput.from_ints([1, 2, 3])
    ended = [
        sample(engine, SampleRequest(prompt, 1, SamplingParams(seed=seed))).sequences[0]
        for seed in range(40)
    ]
    stopped = [one for one in ended if one.stop_reason == "stop"]
    assert stopped
    assert all(one.tokens[-1] == 0 and 0 not in one.tokens[:-1] for one in stopped)
    assert all(len(one.tokens) == 61 for one in ended if one.stop_reason == "length")


def test_sampling_follows_its_probabilities(engine: DeterministicEngine) -> None:
    request = SampleRequest(
        ModelInput.from_ints([1, 2, 3]), 2000, SamplingParams(max_tokens=1, seed=0, stop=[])
    )
    sequences = sample(engine, request).sequences
    first = [one.tokens[0] for one in sequences]
    counts = sorted(((first.count(t), t) for t in set(first)), reverse=True)
    likeliest = {one.tokens[0]: one.logprobs_np for one in sequences}[counts[0][1]]
    assert likeliest is not None
    assert counts[0][0] / 2000 == pytest.approx(float(np.exp(likeliest[0])), abs=0.06)


@pytest.mark.parametrize(
    "narrowing", [{"top_p": 0.4}, {"temperature": 1e-30}, {"temperature": 1e-320}]
)
def test_a_narrow_top_k_or_top_p_keeps_the_likeliest_token(
    engine: DeterministicEngine, narrowing: Dict[str, float]
) -> None:
    params = SamplingParams(max_tokens=20, seed=3, stop=[], **narrowing)  # type: ignore[arg-type]
    greedy = SamplingParams(max_tokens=20, temperature=0.0, stop=[])
    prompt = ModelInput.from_ints([1, 2, 3])
    narrow, best = (
        sample(engine, SampleRequest(prompt, 1, p)).sequences[0].tokens for p in (params, greedy)
    )
    assert narrow == best


def test_topk_of_a_greedy_sample_begins_with_the_sampled_token(engine: DeterministicEngine) -> None:
    request = SampleRequest(
        ModelInput.from_ints([1, 2, 3]),
        1,
        SamplingParams(max_tokens=5, temperature=0.0, stop=[]),
        topk_prompt_logprobs=2,
        topk_sample_logprobs=2,
        prompt_logprobs=True,
    )
    response = sample(engine, request)
    sequence = response.sequences[0]
    rows = sequence.topk_logprobs
    assert rows is not None
    firsts = [row[0] for row in rows if row]
    assert [token for token, _ in firsts] == sequence.tokens
    assert [logprob for _, logprob in firsts] == pytest.approx(sequence.logprobs)
    assert response.topk_prompt_logprobs is not None
    assert [len(row or ()) for row in response.topk_prompt_logprobs] == [0, 2, 2]


def test_clip_bounds_may_differ_by_token(engine: DeterministicEngine) -> None:
    output = engine.forward_backward("m", [datum()], "cross_entropy", {}, forward_only=True)
    old = output.loss_fn_outputs[0]["logprobs"].to_numpy() - np.float32(np.log(3.0))
    inputs = {"logprobs": old, "advantages": np.ones(3, np.float32)}
    bounds = np.array([1.5, 2.0, 4.0], np.float32)
    clipped = loss(engine, "ppo", **inputs, clip_high_threshold=bounds)
    assert clipped == pytest.approx(-(1.5 + 2.0 + 3.0), rel=1e-5)


def test_a_dropped_request_ends_and_the_others_continue(engine: DeterministicEngine) -> None:
    engine.create_sampler("s", None)
    params = SamplingParams(max_tokens=50, stop=[])
    asked = SampleRequest(ModelInput.from_ints([1, 2, 3]), sampling_params=params)
    dropped = set()
    found = []
    for finished in engine.sample("s", [asked, asked], dropped):
        dropped.add(0)
        found += [index for index, _ in finished]
    assert found == [1]

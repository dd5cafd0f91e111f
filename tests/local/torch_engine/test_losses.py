"""Losses, logprobs and LoRA gradients equal an independent float64 computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import torch
from local.torch_engine.reference import (
    Reference,
    give_random_delta,
    gradient_of,
    make_data,
    relative_error,
)

from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine import TorchEngine, network
from tinkex.local.engines.torch_engine.losses import token_losses
from tinkex.types import AdamParams, Datum, LoraConfig, ModelInput, TensorData

RANK = 4
BOUND = 1e-4

# More tokens than a chunk of logits, lengths that need several passes, and a single token.
LENGTHS = [300, 290, 45, 60, 7, 1]

Inputs = Dict[str, torch.Tensor]


# The losses token by token, as in the papers.
def cross_entropy(lp: torch.Tensor, x: Inputs) -> torch.Tensor:
    return sum((-a * w for a, w in zip(lp.flatten(), x["weights"].flatten())), torch.tensor(0.0))


def importance_sampling(lp: torch.Tensor, x: Inputs) -> torch.Tensor:
    terms = zip(lp, x["logprobs"], x["advantages"])
    return -sum(((new - old).exp() * gain for new, old, gain in terms), torch.tensor(0.0))


def ppo(lp: torch.Tensor, x: Inputs, low: float = 0.8, high: float = 1.2) -> torch.Tensor:
    total = torch.tensor(0.0)
    for new, old, gain in zip(lp, x["logprobs"], x["advantages"]):
        ratio = (new - old).exp()
        bounded = low if ratio < low else high if ratio > high else ratio
        total = total - min(ratio * gain, bounded * gain, key=lambda term: term.item())
    return total


def cispo(lp: torch.Tensor, x: Inputs, low: float = 0.8, high: float = 1.2) -> torch.Tensor:
    total = torch.tensor(0.0)
    for new, old, gain in zip(lp, x["logprobs"], x["advantages"]):
        weight = min(max(math.exp(new.item() - old.item()), low), high)
        total = total - weight * gain * new
    return total


def dro(lp: torch.Tensor, x: Inputs, beta: float = 0.05) -> torch.Tensor:
    total = torch.tensor(0.0)
    for new, old, gain in zip(lp, x["logprobs"], x["advantages"]):
        total = total - (new * gain - beta / 2 * (new - old) ** 2)
    return total


def gspo(lp: torch.Tensor, x: Inputs, low: float = 0.9997, high: float = 1.0004) -> torch.Tensor:
    mask = x["sequence_ratio_mask"]
    sequence = math.exp(float((mask * (lp.detach() - x["logprobs"])).sum() / mask.sum()))
    total = torch.tensor(0.0)
    for new, gain in zip(lp, x["advantages"]):
        ratio = sequence * (new - new.item()).exp()
        bounded = low if ratio < low else high if ratio > high else ratio
        total = total - min(ratio * gain, bounded * gain, key=lambda term: term.item())
    return total


LOSSES = {f.__name__: f for f in (cross_entropy, importance_sampling, ppo, cispo, gspo, dro)}


def data_for(loss_fn: str, reference: Reference, adapter: Dict[str, torch.Tensor]) -> Any:
    """Return data with sampler logprobs near the model's own, so that ratios straddle the clips."""
    if loss_fn == "cross_entropy":
        return make_data(LENGTHS, weights=(0.0, 2.0))
    data = []
    rng = np.random.default_rng(3)
    for datum in make_data(LENGTHS, advantages=(-1.0, 1.0)):
        own = reference.logprobs(datum, adapter, RANK).detach().numpy()
        inputs: Dict[str, Any] = dict(datum.loss_fn_inputs)
        inputs["logprobs"] = (own + rng.normal(0, 0.4, own.shape)).astype(np.float32)
        if loss_fn == "gspo":  # the first tokens do not count in the ratio, if there are others
            mask = np.ones(own.shape, np.float32)
            mask[: len(own) // 3] = 0.0
            inputs["sequence_ratio_mask"] = mask
        data.append(Datum(datum.model_input, inputs))
    return data


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("loss_fn", sorted(LOSSES))
def test_losses_logprobs_and_gradients_equal_an_independent_computation(
    loss_fn: str,
    tied: bool,
    cache: Path,
    tied_folder: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = str(tied_folder) if tied else "tiny-random"
    engine = TorchEngine.from_pretrained(model, device="cpu", cache_dir=cache)
    engine.create("m", LoraConfig(rank=RANK, seed=1))
    adapter = give_random_delta(engine, "m", tmp_path / "delta")
    reference = Reference(str(engine.info.tokenizer_id))
    data = data_for(loss_fn, reference, adapter)

    output = engine.forward_backward("m", data, loss_fn, {})
    loss, logprobs, gradient = reference.run(data, adapter, RANK, LOSSES[loss_fn])

    errors = {"loss": abs(output.metrics["loss:sum"] - loss) / abs(loss)}
    errors["logprobs"] = max(
        relative_error(found["logprobs"].to_numpy(), expected)
        for found, expected in zip(output.loss_fn_outputs, logprobs)
    )
    found_gradient = gradient_of(engine, "m", tmp_path / "gradient")
    assert found_gradient.keys() == gradient.keys()
    assert any("lm_head" in name for name in gradient)
    errors["gradient"] = max(
        relative_error(found_gradient[name], gradient[name]) for name in gradient
    )
    for name, error in errors.items():
        record_property(f"{name}_relative_error", error)
    assert max(errors.values()) < BOUND


def test_ratios_of_the_clipped_losses_really_straddle_the_clips(run: Any, tmp_path: Path) -> None:
    adapter = give_random_delta(run, "m", tmp_path)
    reference = Reference(str(run.info.tokenizer_id))
    metrics = run.forward_backward("m", data_for("ppo", reference, adapter), "ppo", {}).metrics
    assert 0 < metrics["clipped_tokens:sum"] < metrics["active_tokens:sum"] == sum(LENGTHS)
    assert metrics["ratio:min"] < 0.8 < 1.2 < metrics["ratio:max"]


def test_with_one_advantage_gspo_is_the_sequence_objective_of_the_paper(
    run: Any, tmp_path: Path
) -> None:
    """The gradient is the paper's times the number of tokens, as nothing is averaged here."""
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    data = []
    for datum, gain in zip(data_for("ppo", reference, adapter), (1.0, -1.0, 0.5, -0.5, 1.0, 2.0)):
        inputs = dict(datum.loss_fn_inputs)
        inputs["advantages"] = TensorData.from_numpy(
            np.full(inputs["logprobs"].shape, gain, np.float32)
        )
        data.append(Datum(datum.model_input, inputs))

    def sequence_objective(lp: torch.Tensor, x: Inputs) -> torch.Tensor:
        ratio = (lp - x["logprobs"]).mean().exp()
        gain = x["advantages"][0]
        return -len(lp) * torch.minimum(ratio * gain, ratio.clamp(0.98, 1.02) * gain)

    config = {"clip_low_threshold": 0.98, "clip_high_threshold": 1.02}
    output = run.forward_backward("m", data, "gspo", config)
    loss, _, gradient = reference.run(data, adapter, RANK, sequence_objective)
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=BOUND)
    assert 0 < output.metrics["clipped_tokens:sum"] < sum(LENGTHS)
    found = gradient_of(run, "m", tmp_path / "gradient")
    assert max(relative_error(found[name], gradient[name]) for name in gradient) < BOUND


# All but dro, for which a token of advantage 0 has a loss.
@pytest.mark.parametrize("loss_fn", sorted(LOSSES.keys() - {"dro"}))
def test_targets_for_only_the_last_tokens_equal_zeros_for_the_others(
    loss_fn: str, run: Any, tmp_path: Path
) -> None:
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    complete, short = [], []
    for datum in data_for(loss_fn, reference, adapter):
        inputs = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
        skipped = len(inputs["target_tokens"]) // 3
        for name in ("weights", "advantages", "sequence_ratio_mask"):
            if name in inputs:
                inputs[name] = np.concatenate([inputs[name][:skipped] * 0, inputs[name][skipped:]])
        complete.append(Datum(datum.model_input, inputs))
        last = {name: values[skipped:] for name, values in inputs.items()}
        short.append(Datum(datum.model_input, last))
    expected = run.forward_backward("m", complete, loss_fn, {})
    gradient = gradient_of(run, "m", tmp_path / "complete")
    run.load("m", tmp_path / "delta", with_optimizer=False)
    found = run.forward_backward("m", short, loss_fn, {})
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    for one, other in zip(found.loss_fn_outputs, expected.loss_fn_outputs):
        values = one["logprobs"].to_numpy()
        assert values == pytest.approx(other["logprobs"].to_numpy()[-len(values) :], abs=1e-5)
    again = gradient_of(run, "m", tmp_path / "short")
    assert max(relative_error(again[name], gradient[name]) for name in gradient) < BOUND


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo"])
def test_clip_thresholds_come_from_the_configuration_or_from_the_tokens(
    loss_fn: str, run: Any, tmp_path: Path
) -> None:
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    data = data_for(loss_fn, reference, adapter)
    config = {"clip_low_threshold": 0.95, "clip_high_threshold": 1.5}
    expected, _, _ = reference.run(
        data,
        adapter,
        RANK,
        lambda lp, x: LOSSES[loss_fn](lp, x, 0.95, 1.5),  # type: ignore[call-arg]
    )
    by_config = run.forward_backward("m", data, loss_fn, config).metrics["loss:sum"]
    with_inputs = [
        Datum(
            datum.model_input,
            {
                **datum.loss_fn_inputs,
                "clip_low_threshold": [0.95] * datum.model_input.length,
                "clip_high_threshold": [1.5] * datum.model_input.length,
            },
        )
        for datum in data
    ]
    by_token = run.forward_backward("m", with_inputs, loss_fn, {}).metrics["loss:sum"]
    assert by_config == pytest.approx(expected, rel=BOUND)
    assert by_token == by_config
    assert run.forward_backward("m", data, loss_fn, {}).metrics["loss:sum"] != by_config


def test_beta_of_dro_comes_from_the_configuration(run: Any, tmp_path: Path) -> None:
    adapter = give_random_delta(run, "m", tmp_path)
    reference = Reference(str(run.info.tokenizer_id))
    data = data_for("dro", reference, adapter)
    expected, _, _ = reference.run(data, adapter, RANK, lambda lp, x: dro(lp, x, beta=0.7))
    found = run.forward_backward("m", data, "dro", {"beta": 0.7}).metrics["loss:sum"]
    assert found == pytest.approx(expected, rel=BOUND)


def test_several_targets_per_position_dense_and_sparse(run: Any, tmp_path: Path) -> None:
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    rng = np.random.default_rng(5)
    data, sparse = [], []
    for length, k in ((20, 3), (17, 2), (5, 1)):
        tokens = ModelInput.from_ints(rng.integers(0, 256, length))
        targets = rng.integers(0, 260, (length, k))
        weights = np.where(rng.random((length, k)) < 0.5, rng.random((length, k)), 0)
        weights = weights.astype(np.float32)
        data.append(Datum(tokens, {"target_tokens": targets, "weights": weights}))
        rows, columns = np.nonzero(weights)
        counts = np.bincount(rows, minlength=length)
        crow = np.concatenate([[0], np.cumsum(counts)])
        inputs = {
            name: TensorData(values[rows, columns], None, (length, k), crow, columns)
            for name, values in (("target_tokens", targets), ("weights", weights))
        }
        sparse.append(Datum(tokens, inputs))
    loss, logprobs, gradient = reference.run(data, adapter, RANK, cross_entropy)
    output = run.forward_backward("m", data, "cross_entropy", {})
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=BOUND)
    for found, expected in zip(output.loss_fn_outputs, logprobs):
        assert relative_error(found["logprobs"].to_numpy(), expected) < BOUND
    found_gradient = gradient_of(run, "m", tmp_path / "gradient")
    assert max(relative_error(found_gradient[n], gradient[n]) for n in gradient) < BOUND
    # Cells that a sparse tensor does not list have weight 0, so the loss is the same.
    again = run.forward_backward("m", sparse, "cross_entropy", {})
    assert again.metrics["loss:sum"] == pytest.approx(loss, rel=BOUND)
    assert again.loss_fn_outputs[0]["logprobs"].shape == (20, 3)


def test_gradients_of_several_calls_add_up(run: Any, tmp_path: Path) -> None:
    give_random_delta(run, "m", tmp_path / "delta")
    data = make_data([30, 12, 25], weights=(0.5, 1.0))
    run.forward_backward("m", data, "cross_entropy", {})
    together = gradient_of(run, "m", tmp_path / "together")
    run.forward_backward("m", data[:1], "cross_entropy", {})
    run.forward_backward("m", data[1:], "cross_entropy", {})
    one_by_one = gradient_of(run, "m", tmp_path / "apart")
    for name in together:
        assert relative_error(one_by_one[name], together[name]) < 1e-5


def test_a_forward_pass_gives_the_same_numbers_and_no_gradient(run: Any, tmp_path: Path) -> None:
    give_random_delta(run, "m", tmp_path / "delta")
    data = make_data([30, 12], weights=(0.5, 1.0))
    forward = run.forward_backward("m", data, "cross_entropy", {}, forward_only=True)
    gradient = gradient_of(run, "m", tmp_path / "gradient")
    assert not any(bool(tensor.any()) for tensor in gradient.values())
    both = run.forward_backward("m", data, "cross_entropy", {})
    assert forward.metrics == pytest.approx(both.metrics, rel=1e-6)
    for one, other in zip(forward.loss_fn_outputs, both.loss_fn_outputs):
        assert relative_error(one["logprobs"].to_numpy(), other["logprobs"].to_numpy()) < 1e-6


def test_tokens_of_weight_zero_have_logprobs_but_do_not_affect_the_loss(
    run: Any, tmp_path: Path
) -> None:
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    (datum,) = make_data([40])
    weights = np.zeros(40, np.float32)
    weights[25:] = 1.0
    data = [Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights})]
    loss, logprobs, gradient = reference.run(data, adapter, RANK, cross_entropy)
    output = run.forward_backward("m", data, "cross_entropy", {})
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=BOUND)
    assert relative_error(output.loss_fn_outputs[0]["logprobs"].to_numpy(), logprobs[0]) < BOUND
    found = gradient_of(run, "m", tmp_path / "gradient")
    assert max(relative_error(found[name], gradient[name]) for name in gradient) < BOUND


@pytest.mark.parametrize("placeholder", [-100.0, -99999.0, -3e38])
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo"])
def test_tokens_of_advantage_zero_have_no_effect_whatever_their_old_logprob(
    loss_fn: str, placeholder: float, run: Any, tmp_path: Path
) -> None:
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    (datum, *_) = data_for(loss_fn, reference, adapter)
    inputs = {name: tensor.to_numpy().copy() for name, tensor in datum.loss_fn_inputs.items()}
    masked = np.arange(datum.model_input.length) % 3 == 0
    inputs["advantages"][masked] = 0.0
    expected = [Datum(datum.model_input, dict(inputs))]
    inputs["logprobs"] = np.where(masked, np.float32(placeholder), inputs["logprobs"])
    loss, _, gradient = reference.run(expected, adapter, RANK, LOSSES[loss_fn])

    output = run.forward_backward("m", [Datum(datum.model_input, inputs)], loss_fn, {})

    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=BOUND)
    assert output.metrics["active_tokens:sum"] == (~masked).sum()
    found = gradient_of(run, "m", tmp_path / "gradient")
    assert max(relative_error(found[name], gradient[name]) for name in gradient) < BOUND


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo"])
def test_a_ratio_beyond_float32_is_clipped_like_any_other(
    loss_fn: str, run: Any, tmp_path: Path
) -> None:
    adapter = give_random_delta(run, "m", tmp_path / "delta")
    reference = Reference(str(run.info.tokenizer_id))
    (datum, *_) = data_for(loss_fn, reference, adapter)
    inputs = {name: tensor.to_numpy().copy() for name, tensor in datum.loss_fn_inputs.items()}
    inputs["logprobs"][::4] = -300.0
    inputs["advantages"][::4] = 0.5
    data = [Datum(datum.model_input, inputs)]
    loss, _, gradient = reference.run(data, adapter, RANK, LOSSES[loss_fn])
    output = run.forward_backward("m", data, loss_fn, {})
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=BOUND)
    found = gradient_of(run, "m", tmp_path / "gradient")
    assert max(relative_error(found[name], gradient[name]) for name in gradient) < BOUND


@pytest.mark.parametrize(("loss_fn", "advantage"), [("importance_sampling", 1.0), ("ppo", -1.0)])
def test_an_infinite_loss_is_an_error_that_leaves_the_gradient_alone(
    loss_fn: str, advantage: float, run: Any, tmp_path: Path
) -> None:
    (datum,) = make_data([5], advantages=(advantage, advantage), logprobs=(-300.0, -300.0))
    with pytest.raises(EngineError, match="datum 0: the loss is not finite"):
        run.forward_backward("m", [datum], loss_fn, {})
    assert run.optim_step("m", AdamParams())["grad_norm"] == 0.0


def test_an_impossible_token_may_have_weight_zero() -> None:
    logprobs = torch.tensor([[-math.inf], [-2.0]])
    weights = torch.tensor([[0.0], [0.5]])
    losses = token_losses("cross_entropy", logprobs, {"weights": weights}, {})
    assert losses.tolist() == [[0.0], [1.0]]


def test_missing_weights_count_as_one(run: Any) -> None:
    (datum,) = make_data([12])
    ones = Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": np.ones(12, np.float32)})
    without = run.forward_backward("m", [datum], "cross_entropy", {}).metrics
    assert without == run.forward_backward("m", [ones], "cross_entropy", {}).metrics
    assert without["tokens:sum"] == without["weights:sum"] == 12


def test_outputs_are_in_input_order(run: Any) -> None:
    data = make_data([5, 200, 17, 90, 3])
    together = run.forward_backward("m", data, "cross_entropy", {}, forward_only=True)
    for datum, found in zip(data, together.loss_fn_outputs):
        alone = run.forward_backward("m", [datum], "cross_entropy", {}, forward_only=True)
        expected = alone.loss_fn_outputs[0]["logprobs"].to_numpy()
        assert np.abs(found["logprobs"].to_numpy() - expected).max() < 1e-4


def test_an_architecture_that_cannot_be_split_gives_the_same_result(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = make_data([33, 20], weights=(0.0, 1.0))
    results = []
    for split in (True, False):
        if not split:
            monkeypatch.setattr(network.Network, "_find_head", lambda self: None)
        engine = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)
        engine.create("m", LoraConfig(rank=RANK, seed=1))
        give_random_delta(engine, "m", tmp_path / f"delta{split}")
        loss = engine.forward_backward("m", data, "cross_entropy", {}).metrics["loss:sum"]
        results.append((loss, gradient_of(engine, "m", tmp_path / f"gradient{split}")))
    (loss, gradient), (other_loss, other_gradient) = results
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert max(relative_error(gradient[n], other_gradient[n]) for n in gradient) < 1e-5

"""The optimizer equals torch.optim.AdamW, step by step, with parameters changing in between."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest
import torch
from local.torch_engine.reference import make_data

from tinkex.local.engines.torch_engine.adam import Adam
from tinkex.types import AdamParams

STEPS = [
    AdamParams(learning_rate=1e-2),
    AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.99),
    AdamParams(learning_rate=1e-2, weight_decay=0.1),
    AdamParams(learning_rate=1e-2, grad_clip_norm=0.5),
    AdamParams(learning_rate=5e-3, eps=1e-4, weight_decay=0.01, grad_clip_norm=1e6),
]


def make_parameters() -> Dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def fill_gradients(parameters: Dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("order", [STEPS, STEPS[::-1]], ids=["forward", "backward"])
def test_steps_equal_those_of_torch(order: List[AdamParams]) -> None:
    mine, theirs = make_parameters(), make_parameters()
    optimizer = Adam(mine)
    expected = torch.optim.AdamW(theirs.values())
    for seed, params in enumerate(order):
        fill_gradients(mine, seed)
        fill_gradients(theirs, seed)
        expected.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        norm = torch.nn.utils.clip_grad_norm_(
            theirs.values(), params.grad_clip_norm or float("inf")
        )
        expected.step()
        metrics = optimizer.step(params)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
        assert metrics["step"] == seed + 1
        for name in mine:
            # torch's own clipping adds 1e-6 to the norm, so the results differ in the last bits.
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-7)
            assert mine[name].grad is None


def test_a_clipped_gradient_has_exactly_the_norm_requested() -> None:
    parameters = make_parameters()
    fill_gradients(parameters, 1)
    optimizer = Adam(parameters)
    optimizer.step(AdamParams(learning_rate=0.0, beta1=0.0, grad_clip_norm=0.25))
    means = [t for name, t in optimizer.tensors().items() if name.startswith("exp_avg.")]
    norm = torch.cat([mean.flatten() for mean in means]).norm()
    assert float(norm) == pytest.approx(0.25, rel=1e-6)


def test_a_step_without_a_gradient_is_a_step_with_gradient_zero() -> None:
    parameters, same = make_parameters(), make_parameters()
    optimizer, other = Adam(parameters), Adam(same)
    for one in (parameters, same):
        fill_gradients(one, 4)
    optimizer.step(STEPS[0])
    other.step(STEPS[0])
    for parameter in same.values():
        parameter.grad = torch.zeros_like(parameter)
    assert optimizer.step(STEPS[2]) == other.step(STEPS[2]) == {"grad_norm": 0.0, "step": 2.0}
    for name in parameters:
        assert torch.equal(parameters[name], same[name])


def test_the_engine_steps_every_run_with_its_own_optimizer(run: Any) -> None:
    from tinkex.types import LoraConfig

    run.create("other", LoraConfig(rank=4, seed=7))
    data = make_data([20])
    for model_id in ("m", "other"):
        run.forward_backward(model_id, data, "cross_entropy", {})
    assert run.optim_step("m", AdamParams())["step"] == 1
    assert run.optim_step("m", AdamParams()) == {"grad_norm": 0.0, "step": 2.0}
    metrics = run.optim_step("other", AdamParams())
    assert metrics["step"] == 1
    assert metrics["grad_norm"] > 0

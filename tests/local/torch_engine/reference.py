"""The results that the engine must compute, in plain torch and transformers, without its code.

The adapter is applied by hand: (32 / r) B A is added to the weight matrices of a fresh model in
float64, one datum at a time without padding, and autograd differentiates through that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tinkex.types import AdamParams, Datum, ModelInput

Tensors = Dict[str, torch.Tensor]


def make_data(lengths: Sequence[int], seed: int = 0, **ranges: Tuple[float, float]) -> List[Datum]:
    """Return random data; each keyword is a loss input and the (low, high) of its values."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(0, 256, size=length + 1)
        inputs: Dict[str, Any] = {"target_tokens": tokens[1:]}
        for name, (low, high) in ranges.items():
            inputs[name] = rng.uniform(low, high, size=length).astype(np.float32)
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def give_random_delta(engine: Any, model_id: str, folder: Path, seed: int = 11) -> Tensors:
    """Make the adapter's B random, through a checkpoint; return its weights in float64."""
    engine.save(model_id, folder, with_optimizer=False)
    file = str(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(file)
    for name in sorted(weights):
        if "lora_B" in name:
            weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.02
    save_file(weights, file, {"format": "pt"})
    engine.load(model_id, folder, with_optimizer=False)
    return {name: weight.double() for name, weight in weights.items()}


def gradient_of(engine: Any, model_id: str, folder: Path) -> Tensors:
    """Return the engine's accumulated gradient, which a step with beta1 = 0 leaves in its state."""
    engine.optim_step(model_id, AdamParams(learning_rate=0.0, beta1=0.0))
    engine.save(model_id, folder, with_optimizer=True)
    state = load_file(str(folder / "optimizer.safetensors"))
    prefix = "exp_avg."
    return {name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)}


class Reference:
    """A float64 copy of the base model, to which adapters are added by hand."""

    def __init__(self, source: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
        self._weights = {name: p.detach() for name, p in self.model.named_parameters()}
        # A tied output layer has no parameter of its own; an adapter on it gives it one.
        self._weights["lm_head.weight"] = self.model.lm_head.weight.detach()

    def logits(self, tokens: Any, adapter: Mapping[str, torch.Tensor], rank: int) -> torch.Tensor:
        """Return logits (n, v) after each of *tokens*, with *adapter* (PEFT's names) applied."""
        changed = dict(self._weights)
        for name in adapter:
            if name.endswith("lora_A.weight"):
                module = name[len("base_model.model.") : -len(".lora_A.weight")]
                down, up = adapter[name], adapter[name.replace("lora_A", "lora_B")]
                key = f"{module}.weight"
                changed[key] = self._weights[key] + 32 / rank * (up @ down)
        ids = torch.tensor(np.asarray(tokens, dtype=np.int64))[None]
        output = torch.func.functional_call(
            self.model, changed, (), {"input_ids": ids, "use_cache": False}, tie_weights=False
        )
        return output.logits[0]

    def logprobs(
        self, datum: Datum, adapter: Mapping[str, torch.Tensor], rank: int
    ) -> torch.Tensor:
        """Return the log-probabilities of the datum's target tokens, in their shape."""
        logits = self.logits(datum.model_input.to_numpy(), adapter, rank)
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].to_numpy())
        table = torch.log_softmax(logits, dim=-1)
        if targets.dim() == 2:
            return torch.stack([table[range(len(table)), column] for column in targets.T], dim=1)
        return table[range(len(table)), targets]

    def run(
        self,
        data: Sequence[Datum],
        adapter: Tensors,
        rank: int,
        loss_of: Callable[[torch.Tensor, Dict[str, torch.Tensor]], torch.Tensor],
    ) -> Tuple[float, List[np.ndarray], Tensors]:
        """Return loss, logprobs per datum, and the gradient of the loss by adapter weight."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in adapter.items()}
        total = torch.zeros((), dtype=torch.float64)
        all_logprobs = []
        for datum in data:
            logprobs = self.logprobs(datum, leaves, rank)
            inputs = {
                name: torch.tensor(tensor.to_numpy()).double()
                for name, tensor in datum.loss_fn_inputs.items()
            }
            total = total + loss_of(logprobs, inputs)
            all_logprobs.append(logprobs.detach().numpy())
        total.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return float(total.detach()), all_logprobs, gradients


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected magnitude."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def logprobs_of(datum: Datum, model: Any) -> np.ndarray:
    """Return the log-probabilities that a transformers model gives the targets of *datum*."""
    ids = torch.tensor(datum.model_input.to_numpy().astype(np.int64))[None]
    targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].to_numpy().astype(np.int64))
    with torch.no_grad():
        rows = torch.log_softmax(model(ids).logits[0].double(), -1)
    found: np.ndarray = rows[range(len(targets)), targets].numpy()
    return found

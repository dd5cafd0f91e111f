"""peft's configuration of an adapter: the saved form, and the form that the engine gives to peft.

The two differ for mixtures of experts.  transformers 5 holds a layer's experts in one tensor, so
peft (from 0.19 on) takes a name such as ``gate_proj`` in ``target_modules`` for the experts of an
older file: it adapts the tensor instead, and skips every dense or shared MLP of that name.  A saved
configuration therefore lists such layers by their weights, in ``target_parameters``, which means
the same and which peft does not reinterpret.  Within the engine they are adapted as what they are,
linear layers: this way, no pass copies their weight, and a bfloat16 weight does not round off the
adapter's part.
"""

from __future__ import annotations

import dataclasses
from typing import Any, List

import torch

from tinkex.local.engines.torch_engine.pretrained import quiet
from tinkex.local.engines.torch_engine.targets import Chosen, Targets, shorten

# The same for every rank, as in "LoRA Without Regret" (Thinking Machines Lab, 2025): with it, the
# best learning rate hardly depends on the rank.
_LORA_ALPHA = 32

# The last parts of the names that peft takes for experts or routers of an older file.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

_WEIGHT = ".weight"


def make_config(targets: Targets, chosen: Chosen, rank: int, base_model: str) -> Any:
    """Return the configuration to save for a new adapter on the *chosen* layers and tensors.

    *base_model* is what transformers loads: a folder or a Hugging Face name.
    """
    import peft

    by_weight: List[str] = []
    if targets.tensors and _knows_parameters():
        by_weight = [n for n in chosen.layers if n.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]
    as_layers = set(chosen.layers).difference(by_weight)
    parameters = [*chosen.tensors, *(name + _WEIGHT for name in by_weight)]
    options: Any = {}
    if parameters:
        # Only if needed, because older releases of peft do not know the field.
        options["target_parameters"] = shorten(parameters, targets.parameters)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=_LORA_ALPHA,
        target_modules=shorten(as_layers, targets.modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        **options,
    )


def injected_config(config: Any, targets: Targets, root: str) -> Any:
    """Return a copy of *config* for peft, which gets the model as attribute *root* of a module.

    Parameters are given by their full names: peft requires all adapters to name them alike.
    """
    modules = config.target_modules
    # A pattern is matched against full names, which begin with *root* here.
    if isinstance(modules, str):
        modules = [f"{root}.{name}" for name in targets.layers_matching(modules)]
    parameters = targets.parameters_matching(getattr(config, "target_parameters", None))
    by_weight = {n.removesuffix(_WEIGHT) for n in parameters}.intersection(targets.linear)
    if by_weight:
        modules = [*(modules or ()), *shorten(by_weight, targets.modules)]
    changes: Any = {"target_modules": modules}
    if parameters:
        rest = [name for name in parameters if name.removesuffix(_WEIGHT) not in by_weight]
        changes["target_parameters"] = sorted(f"{root}.{name}" for name in rest) or None
    return dataclasses.replace(config, **changes)


def kinds_in(config: Any, targets: Targets) -> List[str]:
    """Return the kinds of layers that *config* adapts: some of "attn", "mlp" and "unembed"."""
    named = targets.layers_matching(config.target_modules)
    parameters = targets.parameters_matching(getattr(config, "target_parameters", None))
    # Look for both names: a linear layer's weight is listed by the layer's name, a tensor of
    # experts by its own, which may also end in "weight" (JetMoe).
    named += [name.removesuffix(_WEIGHT) for name in parameters] + parameters
    known = {**targets.layers, **targets.tensors}
    return sorted({known[name] for name in named if name in known})


def _knows_parameters() -> bool:
    """Return whether this peft can adapt single parameters (0.17 or newer)."""
    import peft

    return "target_parameters" in {field.name for field in dataclasses.fields(peft.LoraConfig)}


class _Experts(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2, 1, 1))


def adapts_tensors() -> bool:
    """Return whether several adapters can change one expert tensor (peft 0.20 on); tries it."""
    import peft

    if not _knows_parameters():
        return False
    model = torch.nn.Sequential(_Experts())
    # peft draws initial weights, which must not disturb the user's own random numbers.
    state = torch.random.get_rng_state()
    try:
        with quiet():
            for name in ("one", "another"):  # earlier releases fail at the second
                config = peft.LoraConfig(r=1, target_modules=[], target_parameters=["0.weights"])
                peft.inject_adapter_in_model(config, model, name)
    except ValueError:
        return False
    finally:
        torch.random.set_rng_state(state)
    return True

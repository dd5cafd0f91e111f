"""peft's configuration of an adapter: as it is saved, and as the engine gives it to peft.

The two differ for mixtures of experts.  With transformers 5, which holds a layer's experts in one
tensor, peft (from 0.19 on) takes names such as ``gate_proj`` in ``target_modules`` for the experts
of older files: it adapts the tensor in their place, and leaves out every dense or shared MLP of
that name.  So a saved configuration lists these layers by their weights, in
``target_parameters``, which means the same and which peft leaves alone.  Within the engine they are
adapted as the linear layers they are: their weight is not copied in each pass, and a bfloat16
weight does not round the adapter off.
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

# The last part of every name that peft takes for an expert's or a router's of an older file.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

_WEIGHT = ".weight"


def make_config(targets: Targets, chosen: Chosen, rank: int, base_model: str) -> Any:
    """Return the configuration to save for a new adapter of what is *chosen*.

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
        # Only then, because the field is unknown to older releases of peft.
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
    """Return a copy of *config* for peft, where the model is the attribute *root* of a module.

    Parameters are named in full: peft wants those of all adapters to be named alike.
    """
    modules = config.target_modules
    # A pattern matches full names, which begin with *root* here.
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
    """Return the kinds of what *config* adapts: some of "attn", "mlp" and "unembed"."""
    named = targets.layers_matching(config.target_modules)
    parameters = targets.parameters_matching(getattr(config, "target_parameters", None))
    # Under both names: the weight of a linear layer is known by its layer, a tensor of experts,
    # which may be called weight, too (JetMoe), by itself.
    named += [name.removesuffix(_WEIGHT) for name in parameters] + parameters
    known = {**targets.layers, **targets.tensors}
    return sorted({known[name] for name in named if name in known})


def _knows_parameters() -> bool:
    """True if peft adapts single parameters at all (0.17)."""
    import peft

    return "target_parameters" in {field.name for field in dataclasses.fields(peft.LoraConfig)}


class _Experts(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2, 1, 1))


def adapts_tensors() -> bool:
    """True if several adapters can change one expert tensor (peft 0.20); found by trying."""
    import peft

    if not _knows_parameters():
        return False
    model = torch.nn.Sequential(_Experts())
    # peft draws initial weights, and a user's own random numbers are not to change by that.
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

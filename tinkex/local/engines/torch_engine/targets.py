"""Finds the parts of a model that an adapter may change, by running text through the model.

A layer that text does not pass through (in a vision or audio tower, an image projector, or
cross-attention) would never get a gradient, and is left alone.  A layer's name decides its kind.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Set,
    Union,
)

import torch

from tinkex.types import LoraConfig

_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward", "intermediate")
# Looked for last: attention may have experts, too.
_EXPERTS = ("expert", "moe")

# By the last part of the name, if no other part decides (OPT, BERT, Nemotron-H).
_ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LAYERS = (".fc1", ".fc2", ".gate_proj", ".up_proj", ".down_proj", ".output.dense")

# Layers that choose among experts or tokens are left alone: they get no gradient, or training them
# upsets the balance between the experts.
_CHOOSING = ("gate", "shared_expert_gate", "indexer", "scorer")

_EXPERT_NUMBER = re.compile(r"(experts)\.\d+\.")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What one adapter changes.

    Attributes:
        layers: names of linear layers.
        tensors: names of parameters that hold a layer's experts in one tensor.
    """

    layers: List[str]
    tensors: List[str]

    def counts(self) -> Dict[str, int]:
        """Return how many there are of each name, with ``*`` in place of the layer numbers."""
        return dict(collections.Counter(_NUMBER.sub(".*", n) for n in self.layers + self.tensors))


class Targets:
    """What adapters of *model* may change, by kind: "attn", "mlp" or "unembed".

    Create it before the first adapter.  Immutable, and safe from any thread.

    Attributes:
        layers: the kind of each linear layer (torch.nn.Linear or transformers' Conv1D), by name.
        tensors: the kind of each parameter that holds all experts of a layer, by name.
        linear: names of all linear layers of the model except the output layer.
        modules: names of all modules.
        parameters: names of all parameters.
    """

    def __init__(self, model: Any) -> None:
        output = model.get_output_embeddings()
        passed = _modules_that_text_passes(model)
        self.layers: Dict[str, str] = {}
        self.tensors: Dict[str, str] = {}
        for name, module in model.named_modules():
            # The output layer is found by identity, since its name varies: lm_head, embed_out,
            # output ...
            kind = "unembed" if module is output else kind_of(name)
            if kind is None or _without_expert_number(name) not in passed:
                continue
            if is_linear(module) or module is output:
                self.layers[name] = kind
            elif "expert" in f"{name} {type(module).__name__}".lower():
                # Three dimensions: one matrix per expert.  Biases and scales have fewer.
                for parameter, value in module.named_parameters(recurse=False):
                    if value.dim() == 3:
                        self.tensors[f"{name}.{parameter}"] = kind
        self.modules = [name for name, _ in model.named_modules()]
        self.parameters = [name for name, _ in model.named_parameters()]
        self.linear = [n for n, m in model.named_modules() if is_linear(m) and m is not output]

    def choose(self, lora: LoraConfig) -> Chosen:
        """Return what an adapter of *lora* changes."""
        kinds = _wanted_kinds(lora)
        return Chosen(
            [name for name, kind in self.layers.items() if kind in kinds],
            [name for name, kind in self.tensors.items() if kind in kinds],
        )

    def lacking(self, lora: LoraConfig) -> List[str]:
        """Return the kinds that *lora* asks for and the model does not have."""
        present = {*self.layers.values(), *self.tensors.values()}
        return [kind for kind in _wanted_kinds(lora) if kind not in present]

    def layers_matching(self, pattern: Union[str, Collection[str], None]) -> List[str]:
        """Return the modules that *pattern* selects as peft's ``target_modules``."""
        if isinstance(pattern, str):
            if pattern.lower() == "all-linear":
                return self.linear
            return [name for name in self.modules if re.fullmatch(pattern, name)]
        return _with_ending(self.modules, pattern or ())

    def parameters_matching(self, endings: Optional[Collection[str]]) -> List[str]:
        """Return the parameters that *endings* select as peft's ``target_parameters``."""
        return _with_ending(self.parameters, endings or ())


def is_linear(module: Any) -> bool:
    """Return whether peft adapts *module* as a matrix."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def kind_of(name: str) -> Optional[str]:
    """Return "attn" or "mlp" if the layer called *name* is part of one; else None."""
    *parents, leaf = name.split(".")
    if any("router" in part or part in _CHOOSING for part in [*parents, leaf]):
        return None
    # From the innermost part outwards: the first one that names attention or an MLP decides.
    for part in reversed(parents):
        if any(word in part for word in _ATTENTION):
            return "attn"
        if any(word in part for word in _MLP):
            return "mlp"
    if leaf in _ATTENTION_LAYERS:
        return "attn"
    if name.endswith(_MLP_LAYERS) or any(word in part for part in parents for word in _EXPERTS):
        return "mlp"
    return None


def _without_expert_number(name: str) -> str:
    return _EXPERT_NUMBER.sub(r"\1.*.", f"{name}.")


def _modules_that_text_passes(model: Any) -> Set[str]:
    """Return the names of the modules that run on text; one expert counts for all in its list."""
    passed: Set[str] = set()

    # An expert does not run if the router chooses it for none of the probe's three tokens; then any
    # other expert in its list stands for it.
    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: passed.add(_without_expert_number(name))

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            probe = torch.tensor([[0, 1, 2]], device=next(model.parameters()).device)
            model(input_ids=probe, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def _wanted_kinds(lora: LoraConfig) -> List[str]:
    wanted = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    return [kind for kind, is_wanted in wanted.items() if is_wanted]


def _endings(name: str) -> Iterator[str]:
    """Yield the last part of *name*, the last two, and so on."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[-length:])


def _with_ending(names: Iterable[str], endings: Collection[str]) -> List[str]:
    wanted = set(endings)
    return [name for name in names if not wanted.isdisjoint(_endings(name))]


def shorten(chosen: Iterable[str], names: Iterable[str]) -> List[str]:
    """Shorten the *chosen* names to endings that no other of *names* has.

    peft matches names by their endings, so a few endings can stand for hundreds of names.
    """
    chosen = set(chosen)
    taken = {ending for name in names if name not in chosen for ending in _endings(name)}
    return sorted({next((e for e in _endings(n) if e not in taken), n) for n in chosen})

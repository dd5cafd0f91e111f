"""LoRA adapters on one base model, kept by peft and cheap to switch.

An AdapterPool wraps the base model once; each training run, and each sampler of saved weights, has
one named adapter in it.  The base's weights are frozen and never merged with an adapter, so any
number of adapters share them bit for bit (a tied embedding included: an adapter on the output layer
adds to its logits and leaves the shared matrix alone).

Convention: ``W' = W + (alpha / rank) * B A`` with alpha = 32 whatever the rank, B = 0 and A
uniform in +-1/sqrt(in_features) at the start (Hu et al., LoRA, arXiv 2106.09685; alpha and the
initialization as in "LoRA Without Regret", Thinking Machines Lab 2025).  Adapters are fp32.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from typing import Any, Dict, Optional

import torch

from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine.adapter_config import (
    adapts_tensors,
    injected_config,
    make_config,
)
from tinkex.local.engines.torch_engine.output_layer import (
    NOTE_FILE,
    PREFIX,
    is_tied,
    output_name,
)
from tinkex.local.engines.torch_engine.pretrained import quiet
from tinkex.local.engines.torch_engine.targets import Chosen, Targets
from tinkex.types import LoraConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in the pool.

    Attributes:
        key: its name inside peft.
        config: peft's configuration, in the form that is saved.
        parameters: fp32 parameters by their names in PEFT's file format, in a fixed order.
        output: the name of the output layer if the adapter changes it, else None.
        on_tied_output: whether it changes an output layer that shares its weights with the
            embedding.
    """

    key: str
    config: Any
    parameters: Dict[str, torch.nn.Parameter]
    output: Optional[str] = None
    on_tied_output: bool = False


class _Root(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """Wraps the model, so that peft treats it as plain PyTorch.

    If peft saw a transformers model, it would rewrite the targets for some families; see
    `adapter_config`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class AdapterPool:
    """The base model with its adapters, of which at most one is active at a time.

    Args:
        model_name: for messages.
        source: the folder or Hugging Face name that saved adapters name as their base model.

    Attributes:
        targets: what adapters of the model may change.
    """

    def __init__(self, model: Any, model_name: str, source: Optional[str] = None) -> None:
        self._model = model
        self._model_name = model_name
        self._source = source or model_name
        self.targets = Targets(model)
        self._adapts_tensors = bool(self.targets.tensors) and adapts_tensors()
        self._root = _Root(model)
        # The PeftModel, made with the first adapter: a server that only samples from the base needs
        # none.
        self._peft: Any = None
        self._layers: Dict[str, Any] = {}  # peft's LoRA layers by module name
        self._active: Optional[str] = None
        self._numbers = itertools.count()
        self._output = output_name(model)
        self._is_tied = is_tied(model)
        model.requires_grad_(False)

    def make_config(self, lora: LoraConfig) -> Any:
        """Return peft's configuration for *lora*, in the form that is saved.

        Raises:
            EngineError: the model has no layers of the wanted kinds.
        """
        chosen = self.adapted(lora)
        if not chosen.layers and not chosen.tensors:
            raise EngineError(
                f"{self._model_name} has no layers of the kinds asked for by {lora}; "
                "set train_mlp, train_attn or train_unembed"
            )
        for kind in self.targets.lacking(lora):
            logger.warning("%s has no %s layers LoRA can adapt", self._model_name, kind)
        left_out = len(self.targets.choose(lora).tensors) - len(chosen.tensors)
        if left_out:
            logger.warning(
                "%s: the %d tensors that hold the experts are not adapted; "
                "this needs peft 0.20 or newer",
                self._model_name,
                left_out,
            )
        return make_config(self.targets, chosen, lora.rank, self._source)

    def adapted(self, lora: LoraConfig) -> Chosen:
        """Return what an adapter of *lora* changes in this model.  Safe from any thread."""
        chosen = self.targets.choose(lora)
        return chosen if self._adapts_tensors else Chosen(chosen.layers, [])

    def add(self, config: Any, seed: Optional[int] = None) -> Adapter:
        """Add an adapter whose delta is zero; its A depends only on *seed* (random if None)."""
        import peft
        from peft.tuners.lora import LoraLayer

        key = f"adapter{next(self._numbers)}"
        random_state = torch.random.get_rng_state()
        try:
            with quiet():
                injected = injected_config(config, self.targets, "model")
                if self._peft is None:
                    self._peft = peft.PeftModel(self._root, injected, adapter_name=key)
                else:
                    self._peft.add_adapter(key, injected)
        # No layer has these names, or the pattern is not a regular expression.
        except (ValueError, re.error) as error:
            raise EngineError(f"the adapter does not fit {self._model_name}: {error}") from error
        torch.random.set_rng_state(random_state)  # peft's initialization has drawn from it
        # peft has now wrapped the layers that no earlier adapter was on.
        self._layers = {
            name: module
            for name, module in self._model.named_modules()
            if isinstance(module, LoraLayer)
        }
        parameters = self._parameters_of(key)
        _initialize(parameters, seed)
        self._peft.eval()  # peft makes new layers in training mode
        # peft has activated the new adapter.  Forget which one was active, so that activate() acts.
        self._active = None
        self.activate(None)
        layer = self._layers.get(self._output or "")
        output = self._output if layer is not None and key in layer.lora_A else None
        on_tied_output = output is not None and self._is_tied
        if on_tied_output:
            logger.info(
                "the output layer of %s is tied to its embedding (tie_word_embeddings): to merge "
                "an adapter on it, see %s in its checkpoints, or train with train_unembed=False",
                self._model_name,
                NOTE_FILE,
            )
        return Adapter(key, config, parameters, output, on_tied_output)

    def _parameters_of(self, key: str) -> Dict[str, torch.nn.Parameter]:
        found = {}
        for name, layer in sorted(self._layers.items()):
            if key in layer.lora_A:
                for half in ("lora_A", "lora_B"):
                    weight = getattr(layer, half)[key].weight
                    found[f"{PREFIX}{name}.{half}.weight"] = weight
        return found

    def activate(self, adapter: Optional[Adapter]) -> None:
        """Let only *adapter* affect the model's output and be trained; None means the bare base."""
        key = adapter.key if adapter is not None else ""
        if key == self._active:  # don't visit hundreds of layers before each sampling slice
            return
        names = [key] if key else []
        for layer in self._layers.values():
            layer.set_adapter(names)
        self._active = key

    def remove(self, adapter: Adapter) -> None:
        """Drop *adapter* and free its memory."""
        with quiet():
            self._peft.delete_adapter(adapter.key)
        self._active = None  # peft may have activated another one in its place
        self.activate(None)


def _initialize(parameters: Dict[str, torch.nn.Parameter], seed: Optional[int]) -> None:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    with torch.no_grad():
        # Sorted, because the order of drawing determines the values.
        for name, parameter in sorted(parameters.items()):
            if name.endswith("lora_B.weight"):
                parameter.zero_()
            else:
                bound = 1 / math.sqrt(parameter.shape[1])  # A is (rank, in_features)
                # Drawn on the CPU, so that a seed means the same on every device.
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(values)

"""Adapters on the output layer: the layer's name, and weights it shares with the embedding.

An adapter on an output layer that is tied to the embedding changes the logits but not the
embedding.  Merging it into the shared weights would change both, so they have to be separated
first.  PEFT's ``ensure_weight_tying`` does not help: it is for an adapter that was trained on both
(with it, PEFT 0.19 and later add this adapter to the embedding even without merging; earlier
releases ignore it).
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, TypeVar

import torch

T = TypeVar("T")

NOTE_FILE = "MERGING.md"

#: What PEFT puts before the names of a model's layers in weight files.
PREFIX = "base_model.model."

#: What the names of output-layer weights begin with in the hosted service's exports.
EXPORTED_OUTPUT = f"{PREFIX}model.unembed_tokens."


def output_name(model: Any) -> Optional[str]:
    """Return the name of the output layer of *model*, or None."""
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output), None)


def is_tied(model: Any) -> bool:
    """Return whether the output layer of *model* shares its weights with the embedding."""
    try:
        output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except NotImplementedError:  # transformers knows neither layer here, and ties nothing
        return False
    weight = getattr(output, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def untie(model: Any) -> None:
    """Give the output layer of *model* weights of its own, equal to those of the embedding.

    The model computes the same as before, and is saved with both weights.
    """
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    # Else loading would tie the model again.  Multimodal models have a second configuration, for
    # the text part.
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def rename_exported(tensors: Mapping[str, T], output: str) -> Dict[str, T]:
    """Return *tensors* (or their shapes) with PEFT's names in place of an export's.

    *output* is the name of the output layer in the model.
    """
    return {
        f"{PREFIX}{output}.{name[len(EXPORTED_OUTPUT) :]}"
        if name.startswith(EXPORTED_OUTPUT)
        else name: tensor
        for name, tensor in tensors.items()
    }


def merging_note(base_model: str, *, tied: bool, exported: bool) -> str:
    """Return the note to write beside an adapter that PEFT alone would merge wrongly.

    *tied*: the output layer shares its weights with the embedding.  *exported*: it is named as in
    exports of the hosted service.
    """
    parts = [_MERGE]
    if tied:
        parts.append(_TIED.format(base_model=base_model))
    parts.append(_EXPORTED if exported else _BY_HAND.format(base_model=base_model))
    return "\n".join(parts)


_MERGE = """# Before you merge this adapter

Merge it into its base model with

```python
from tinkex.local import merge_adapter

merge_adapter("path/of/this/folder", "path/of/the/merged/model")
```
"""

_TIED = """It changes the output layer of {base_model}, which shares its weights with the embedding
(the model is tied: `tie_word_embeddings` is true in its config.json). Used as an adapter, with PEFT
or vLLM for example, it works as it is. Merging it by `merge_and_unload()` alone ruins the model:
the change to the output layer would go into the embedding, too. `ensure_weight_tying` does not
help; it is for adapters that were trained on both layers.

An adapter made with `train_unembed=False` leaves the output layer alone, and merges as usual.
"""

_BY_HAND = """Without tinkex, give the output layer weights of its own before PEFT loads the
adapter:

```python
model = AutoModelForCausalLM.from_pretrained("{base_model}")
model.config.tie_word_embeddings = False
output = model.get_output_embeddings()
output.weight = torch.nn.Parameter(output.weight.detach().clone())
model = PeftModel.from_pretrained(model, "path/of/this/folder").merge_and_unload()
```
"""

_EXPORTED = """It is an export: its output layer is called `model.unembed_tokens`, as in exports of
the hosted service. PEFT and vLLM do not know this name, and would leave the output layer unchanged.
For them, download a checkpoint made by `save_state` or `save_weights_for_sampler`.
"""

"""Writes and reads adapters in PEFT's format, and checks that they fit before they are used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional

import torch

from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine.adapter_config import kinds_in
from tinkex.local.engines.torch_engine.adapters import Adapter
from tinkex.local.engines.torch_engine.output_layer import (
    EXPORTED_OUTPUT,
    NOTE_FILE,
    PREFIX,
    merging_note,
    rename_exported,
)
from tinkex.local.engines.torch_engine.targets import Targets
from tinkex.types import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# The LoraConfig of the run, since PEFT's configuration holds neither the kinds of layers nor the
# seed.
RUN_FILE = "tinkex_lora.json"


def write_adapter(
    adapter: Adapter, lora: LoraConfig, folder: Path, *, for_export: bool = False
) -> None:
    """Write *adapter* into *folder* in PEFT's format, and *lora* beside it for `read_lora`.

    If the adapter needs care when merged, a note is written beside it.  *for_export* names the
    weights of the output layer as the hosted service does, as the cookbook's merging and conversion
    expect.
    """
    renamed = for_export and adapter.output is not None
    own = f"{PREFIX}{adapter.output}."
    tensors = {}
    for name, value in adapter.parameters.items():
        if renamed and name.startswith(own):
            name = EXPORTED_OUTPUT + name[len(own) :]
        tensors[name] = value.detach()
    write_tensors(tensors, folder / WEIGHTS_FILE)
    # As PEFT saves adapters: a program that loads this one does not train it unless it asks to.
    config = dataclasses.replace(adapter.config, inference_mode=True)
    config.save_pretrained(str(folder))
    (folder / RUN_FILE).write_text(json.dumps(dataclasses.asdict(lora), indent=2) + "\n")
    if adapter.on_tied_output or renamed:
        base_model = config.base_model_name_or_path
        note = merging_note(base_model, tied=adapter.on_tied_output, exported=renamed)
        (folder / NOTE_FILE).write_text(note, encoding="utf-8")


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write *tensors* into the file *path*.

    Raises:
        OSError: the file cannot be written, e.g. because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors takes contiguous tensors only.
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors reports a full disk by an error of its own; callers handle OSError.
    try:
        save_file(contiguous, str(path), {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def read_config(folder: Path) -> Any:
    """Return peft's configuration of the adapter saved in *folder*; EngineError if it has none."""
    import peft

    if not (folder / CONFIG_FILE).is_file():  # else peft would ask the model hub
        raise EngineError(f"{folder} holds no adapter (no {CONFIG_FILE})")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{folder} holds no adapter that can be read: {error}") from error
    if not isinstance(config, peft.LoraConfig):
        raise EngineError(f"the adapter in {folder} is of type {config.peft_type}, not LoRA")
    config.inference_mode = False  # else peft would freeze an adapter that is to be trained on
    return config


def read_lora(folder: Path, targets: Targets) -> LoraConfig:
    """Return the LoraConfig of the adapter saved in *folder* by this or another program."""
    file = folder / RUN_FILE
    if file.is_file():
        # A later version may have written more fields.
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        saved = json.loads(file.read_text())
        return LoraConfig(**{name: value for name, value in saved.items() if name in known})
    config = read_config(folder)
    kinds = kinds_in(config, targets)
    return LoraConfig(
        rank=config.r,
        train_unembed="unembed" in kinds,
        train_mlp="mlp" in kinds,
        train_attn="attn" in kinds,
    )


def has_other_layout(adapter: Adapter, lora: LoraConfig, folder: Path) -> bool:
    """Return whether the adapter in *folder* was made for the same *lora* but has other tensors.

    An earlier version of tinkex, peft or transformers may have chosen other layers, or stored them
    differently.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / RUN_FILE).is_file():
        return False
    saved = json.loads((folder / RUN_FILE).read_text())
    own = dataclasses.asdict(lora)
    # A different rank or kind of layers is the user's mistake, which read_into reports.
    if any(saved.get(name) != own[name] for name in own if name != "seed"):
        return False
    try:
        with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
            names = file.keys()  # shapes are in the header: no data is read
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if adapter.output is not None:
            shapes = rename_exported(shapes, adapter.output)
    except (OSError, SafetensorError):
        return False  # read_into describes what is wrong
    return shapes != {name: tuple(value.shape) for name, value in adapter.parameters.items()}


def load_tensors(file: Path) -> Dict[str, torch.Tensor]:
    """Return the tensors in the safetensors *file*; EngineError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved: Dict[str, torch.Tensor] = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{file} cannot be read: {error}") from error
    return saved


def read_tensors(
    folder: Path, file: str, wanted: Dict[str, torch.Tensor], *, output: Optional[str] = None
) -> Dict[str, torch.Tensor]:
    """Return the tensors saved in *folder*/*file*, which must have *wanted*'s names and shapes.

    *output* is the model's name for the output layer, which exported files call otherwise.

    Raises:
        EngineError: the file is missing or damaged, or holds something else.
    """
    saved = load_tensors(folder / file)
    if output is not None:
        saved = rename_exported(saved, output)
    # Compare both ways: weights that this adapter has no place for were trained, too.
    if saved.keys() != wanted.keys():
        raise EngineError(
            f"the checkpoint adapts {sample_of(saved.keys() - wanted.keys())} beyond this model's "
            f"adapter, and lacks {sample_of(wanted.keys() - saved.keys())}; "
            "load it into a model with the same train_mlp, train_attn and train_unembed"
        )
    for name, tensor in saved.items():
        if tensor.shape != wanted[name].shape:
            raise EngineError(
                f"the checkpoint's {name} has shape {tuple(tensor.shape)}, this model's adapter "
                f"{tuple(wanted[name].shape)}; load it into a model with the same rank"
            )
    return saved


def read_into(adapter: Adapter, folder: Path) -> Dict[str, torch.Tensor]:
    """Return the weights saved in *folder*, checked to fit *adapter*; nothing is changed yet."""
    saved = read_config(folder)
    mine = adapter.config
    for name in ("r", "lora_alpha"):
        if getattr(saved, name) != getattr(mine, name):
            raise EngineError(
                f"the checkpoint has LoRA {name} {getattr(saved, name)}, this model "
                f"{getattr(mine, name)}; load it into a model with the same rank"
            )
    wanted: Dict[str, torch.Tensor] = dict(adapter.parameters)
    return read_tensors(folder, WEIGHTS_FILE, wanted, output=adapter.output)


def assign(parameters: Dict[str, torch.nn.Parameter], values: Dict[str, torch.Tensor]) -> None:
    """Copy *values* into *parameters*, by name."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def sample_of(names: Iterable[str]) -> str:
    """Return the first few of *names* as text for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "") if ordered else "nothing"

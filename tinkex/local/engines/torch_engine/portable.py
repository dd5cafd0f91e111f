"""Copies an adapter such that PEFT and transformers load it without knowing where it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tinkex.errors import InvalidInputError, LocalServerError
from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine.adapter_files import (
    EXPORTED_OUTPUT,
    WEIGHTS_FILE,
    load_tensors,
    read_config,
    rename_exported,
)
from tinkex.local.engines.torch_engine.adapters import output_name
from tinkex.local.engines.torch_engine.convert import save_tokenizer
from tinkex.local.engines.torch_engine.quiet import quiet
from tinkex.local.engines.torch_engine.tied import NOTE_FILE, is_tied, merging_note

#: What exports of the hosted service call the output layer.
_EXPORTED_NAME = EXPORTED_OUTPUT.rstrip(".").rpartition(".")[2]


def copy_adapter(adapter: Path, dest: Path, base: str) -> None:
    """Copy the adapter in the folder *adapter* to the new folder *dest*, with a tokenizer.

    Weights on the output layer get the name that PEFT knows, if they have that of an export.

    Args:
        base: a folder or a Hugging Face name, which becomes the adapter's base model.

    Raises:
        InvalidInputError: there is no LoRA adapter in *adapter*, or it is damaged.
        LocalServerError: the base model's configuration or tokenizer cannot be had.
        OSError: it cannot be written.
    """
    try:
        config = read_config(adapter)
        tensors = load_tensors(adapter / WEIGHTS_FILE)
    except EngineError as error:
        raise InvalidInputError(str(error)) from error
    dest.mkdir()
    with quiet():
        model, tokenizer = _outline(base)
        save_tokenizer(tokenizer, dest)
        output = output_name(model)
        if output is not None and any(name.startswith(EXPORTED_OUTPUT) for name in tensors):
            _save(rename_exported(tensors, output), dest)
            if is_tied(model):
                note = merging_note(base, tied=True, exported=False)
                (dest / NOTE_FILE).write_text(note, encoding="utf-8")
        else:
            shutil.copyfile(adapter / WEIGHTS_FILE, dest / WEIGHTS_FILE)
            if (adapter / NOTE_FILE).is_file():
                shutil.copyfile(adapter / NOTE_FILE, dest / NOTE_FILE)
    if output is not None and _EXPORTED_NAME in (config.target_modules or ()):
        names = set(config.target_modules) - {_EXPORTED_NAME}
        config.target_modules = names | {output.rpartition(".")[2]}
    config.base_model_name_or_path = base
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.save_pretrained(str(dest))


def _outline(base: str) -> Any:
    """Return the model *base* without its weights, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        return model, AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise LocalServerError(f"cannot load the base model {base}: {error}") from error


def _save(tensors: Any, dest: Path) -> None:
    from safetensors.torch import save_file

    path = dest / WEIGHTS_FILE
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files for their owner only
    save_file(tensors, str(path), {"format": "pt"})
    path.chmod(mode)

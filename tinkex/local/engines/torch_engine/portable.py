"""Adapters for programs other than tinkex: merged into their base model, or in PEFT's format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import InvalidInputError
from tinkex.local.engines import models
from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_tensors,
    read_config,
    sample_of,
    write_tensors,
)
from tinkex.local.engines.torch_engine.loading import load_pretrained
from tinkex.local.engines.torch_engine.output_layer import (
    EXPORTED_OUTPUT,
    NOTE_FILE,
    is_tied,
    merging_note,
    output_name,
    rename_exported,
    untie,
)
from tinkex.local.engines.torch_engine.pretrained import quiet, save_tokenizer

_ADAPTER = "It must be a folder that RestClient.download_checkpoint or PEFT's save_pretrained made."

#: What exports of the hosted service call the output layer.
_EXPORTED_NAME = EXPORTED_OUTPUT.rstrip(".").rpartition(".")[2]


def merge_adapter(
    adapter: Union[str, Path],
    dest: Union[str, Path],
    *,
    base_model: Optional[str] = None,
    dtype: Union[str, torch.dtype] = "auto",
) -> Path:
    """Merge a downloaded adapter into its base model; write the result to the folder *dest*.

    An output layer that shares its weights with the embedding gets weights of its own if the
    adapter changes it, so that the merged model computes what was trained.  The tokenizer is
    written beside it.  Runs on the CPU; blocks while the model is read, merged and written.

    Args:
        adapter: a folder in PEFT's format, as `RestClient.download_checkpoint` makes it.
        dest: the folder to write to, created with its parents; if it exists, it must be empty.
        base_model: a folder, a Hugging Face name, or a model of the embedded server; by default the
            one that the adapter names.
        dtype: dtype of the merged weights; ``"auto"`` is the base model's.

    Returns:
        The path of *dest*.

    Raises:
        InvalidInputError: there is no LoRA adapter in *adapter*, or it is damaged; it does not fit
            the base model; *dest* is taken; or *dtype* is not a float type.
        LocalServerError: the base model cannot be loaded.
        OSError: *dest* cannot be written.
    """
    source, target = Path(adapter).expanduser(), Path(dest).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInputError(f"{target} exists already", hint="Choose another folder.")
    chosen = _as_dtype(dtype)
    config, tensors = _read(source)
    name = base_model or config.base_model_name_or_path
    if not name:
        raise InvalidInputError(
            f"{source} does not name its base model",
            hint=ErrorText("Give ", Setting("base_model", ...)),
        )
    where = models.resolve(os.fspath(name)).source
    with quiet():
        model, tokenizer = load_pretrained(where, os.fspath(name), dtype=chosen)
        merged = _merge(model, tensors, config, f"the adapter in {source} does not fit {name}")
        merged.save_pretrained(str(target))
        _share_weights(target / "config.json")
        save_tokenizer(tokenizer, target)
    return target


def copy_adapter(adapter: Path, dest: Path, base: str) -> None:
    """Copy the adapter in the folder *adapter* to the new folder *dest*, with a tokenizer.

    Output-layer weights that are named as in an export get the name that PEFT knows.

    Args:
        base: a folder or a Hugging Face name, recorded as the adapter's base model.

    Raises:
        InvalidInputError: there is no LoRA adapter in *adapter*, or it is damaged.
        LocalServerError: the base model's configuration or tokenizer cannot be loaded.
        OSError: *dest* cannot be written.
    """
    config, tensors = _read(adapter)
    dest.mkdir()
    with quiet():
        # The base's weights are not needed, only the name of its output layer, and whether it is
        # tied.
        model, tokenizer = load_pretrained(base, base, weights=False)
        save_tokenizer(tokenizer, dest)
        output = output_name(model)
        if output is not None and any(name.startswith(EXPORTED_OUTPUT) for name in tensors):
            write_tensors(rename_exported(tensors, output), dest / WEIGHTS_FILE)
            if is_tied(model):
                note = merging_note(base, tied=True, exported=False)
                (dest / NOTE_FILE).write_text(note, encoding="utf-8")
        else:
            shutil.copyfile(adapter / WEIGHTS_FILE, dest / WEIGHTS_FILE)
            if (adapter / NOTE_FILE).is_file():
                shutil.copyfile(adapter / NOTE_FILE, dest / NOTE_FILE)
    # In exports of the hosted service, target_modules also has their name for the output layer.
    if output is not None and _EXPORTED_NAME in (config.target_modules or ()):
        names = set(config.target_modules) - {_EXPORTED_NAME}
        config.target_modules = names | {output.rpartition(".")[2]}
    config.base_model_name_or_path = base
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.save_pretrained(str(dest))
    _share_weights(dest / CONFIG_FILE)


def _read(folder: Path) -> Tuple[Any, Dict[str, torch.Tensor]]:
    try:
        return read_config(folder), load_tensors(folder / WEIGHTS_FILE)
    except EngineError as error:
        raise InvalidInputError(str(error), hint=_ADAPTER) from error


def _as_dtype(dtype: object) -> Union[str, torch.dtype]:
    found = dtype if dtype == "auto" else getattr(torch, str(dtype).rpartition(".")[2], None)
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise InvalidInputError(
        f"dtype is {dtype!r}; it must be 'auto' or a float type of torch, such as 'bfloat16'"
    )


def _merge(model: Any, tensors: Dict[str, torch.Tensor], config: Any, misfit: str) -> Any:
    import peft

    output = output_name(model)
    if output is not None:
        tensors = rename_exported(tensors, output)
    # Untie before peft wraps the layer: merging would otherwise change the weights that the
    # embedding reads.
    if is_tied(model) and any(f".{output}.lora_" in key for key in tensors):
        untie(model)
    try:
        wrapped = peft.PeftModel(model, config)
        loaded = peft.set_peft_model_state_dict(wrapped, tensors)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InvalidInputError(f"{misfit}: {_in_short(error)}") from error
    # The base's own weights are listed as missing, too.
    lacking = [key for key in loaded.missing_keys if "lora_" in key]
    strange = list(loaded.unexpected_keys)
    if lacking or strange:
        raise InvalidInputError(
            f"{misfit}: it adapts {sample_of(strange)} beyond the layers it names, and lacks "
            f"weights for {sample_of(lacking)}"
        )
    return wrapped.merge_and_unload()


def _in_short(error: Exception) -> str:
    """Return the first of the weights that *error* lists (torch writes one per line)."""
    lines = [line.strip() for line in str(error).splitlines()]
    if len(lines) < 2:
        return str(error)
    return lines[1] if len(lines) == 2 else f"{lines[1]} ({len(lines) - 2} more like this)"


def _share_weights(config: Path) -> None:
    """Give the weight files beside *config* the permissions that *config* has."""
    for file in config.parent.glob("*.safetensors"):  # safetensors lets only the owner read
        shutil.copymode(config, file)

"""Loads a model and its tokenizer, and refuses what this engine would compute wrongly."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, List, Tuple

import torch

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import LocalServerError
from tinkex.local.engines import models
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.quiet import quiet
from tinkex.local.engines.torch_engine.self_check import find_difference

_OTHER_MODEL = (
    "Use a causal language model with attention layers only and no code of its own, such as Llama, "
    "Qwen3 or Gemma."
)


def load_network(source: str, device: str, dtype: Any, what: str) -> Tuple[Network, Any]:
    """Load model and tokenizer of *source* (a folder or a Hugging Face name).

    Returns the network, frozen and in evaluation mode, and the tokenizer.

    Raises:
        LocalServerError: the model cannot be loaded, is no causal language model, or is one whose
            results with this engine would differ from transformers' own.
    """
    with quiet():
        model, tokenizer = _load(source, dtype, what)
        try:
            model = model.to(device).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise LocalServerError(
                f"cannot put {what} on device {device!r}: {_first_lines(error)}",
                hint=ErrorText("Use ", Setting("device", "cpu"), "."),
            ) from error
        return checked_network(model, what), tokenizer


def _load(source: str, dtype: Any, what: str) -> Tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = "model"
    try:
        # No code from the folder is run; without the argument, transformers asks on the terminal.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        part = "tokenizer of"
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file leads to
        raise LocalServerError(
            f"cannot load the {part} {what}: {_first_lines(error)}",
            hint=_hint(source, part, what, error),
        ) from error


def _hint(source: str, part: str, what: str, error: Exception) -> str:
    """Return what to do about *error*, met while *part* was loaded."""
    text = str(error)
    if "does not recognize this architecture" in text:
        return "If the model is newer than this transformers: python -m pip install -U transformers"
    if "for this kind of AutoModel" in text or "trust_remote_code" in text:
        return _OTHER_MODEL
    if not Path(source).is_dir():
        return models.hint_for(what)
    if isinstance(error, ImportError):
        return "Install what is missing, then start again."
    if part != "model":
        return "Save the tokenizer into the same folder: tokenizer.save_pretrained(folder)."
    return (
        "The folder needs config.json and complete weights (model.safetensors), as "
        "save_pretrained writes them; copy or download it again."
    )


def checked_network(model: Any, what: str) -> Network:
    """Return *model*, called *what*, as a Network that computes what its own forward does.

    Raises:
        LocalServerError: it would compute something else, or cannot be run.
    """
    try:
        with torch.no_grad():
            network = Network(model)
            difference = find_difference(network)
    except MemoryError:
        raise
    except Exception as error:  # whatever an architecture's code raises when it is run this way
        reason = f"a trial run failed ({type(error).__name__}: {_first_lines(error)})"
        raise _refusal(model, what, reason) from error
    if difference is not None:
        raise _refusal(model, what, difference)
    return network


def _refusal(model: Any, what: str, reason: str) -> LocalServerError:
    if getattr(model, "_is_stateful", False):
        reason = "it keeps a recurrent state, which this engine does not support"
    else:
        kinds = _special_caches(model.config)
        if kinds:
            reason = f"its layers keep more than keys and values ({', '.join(kinds)})"
    return LocalServerError(
        f"this engine cannot run {what} ({type(model).__name__}): {reason}", hint=_OTHER_MODEL
    )


def _special_caches(config: Any) -> List[str]:
    """Return the kinds of cache layers, other than keys and values, that transformers would use."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # nothing to add to a reason that is known already
        return []
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in plain})


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(" ".join(lines[:2]), 300) or type(error).__name__

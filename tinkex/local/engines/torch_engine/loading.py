"""Loads a model and its tokenizer, and refuses models that this engine would compute wrongly.

Architectures differ in what they cache, in how they count positions and in what they do with
padding.  A trial run (two rows of different lengths, prefilled in pieces and continued by one
token) shows in a fraction of a second what would otherwise make every sample fail or, worse, be
wrong.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import LocalServerError
from tinkex.local.engines import models
from tinkex.local.engines.torch_engine.decoding import DecodeBatch, Source, prefill
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.pretrained import quiet

# The remedy if the engine does not support this kind of model.
_OTHER_MODEL = (
    "Use a causal language model with attention layers only and no code of its own, such as Llama, "
    "Qwen3 or Gemma."
)

# Lengths, in tokens, of the trial's two rows.  The second row is the beginning of the first.
_LENGTHS = (5, 3)
_PIECE = 2

# The largest relative error of a token's logits that counts as rounding.  In half precision,
# rounding amounts to a few percent (more if it changes the choice of an expert); a wrong
# computation is off by about the size of the logits.
_TOLERANCE = 0.01
_TOLERANCE_HALF = 0.3


def load_network(source: str, device: str, dtype: Any, what: str) -> Tuple[Network, Any]:
    """Load model and tokenizer of *source* (a folder or a Hugging Face name).

    Returns the network, frozen and in evaluation mode, and the tokenizer.

    Raises:
        LocalServerError: the model cannot be loaded, is not a causal language model, or would give
            other results with this engine than with transformers itself.
    """
    with quiet():
        model, tokenizer = load_pretrained(source, what, dtype=dtype)
        try:
            model = model.to(device).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise LocalServerError(
                f"cannot put {what} on device {device!r}: {_first_lines(error)}",
                hint=ErrorText("Use ", Setting("device", "cpu"), "."),
            ) from error
        return checked_network(model, what), tokenizer


def load_pretrained(
    source: str, what: str, *, dtype: Union[str, torch.dtype] = "auto", weights: bool = True
) -> Tuple[Any, Any]:
    """Return model and tokenizer of *source*, a folder or a Hugging Face name.

    *what* is the user's name for it, for messages.  Without *weights*, only the configuration is
    read: the model has its modules and names, but no data.

    Raises:
        LocalServerError: the model cannot be loaded, or is not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    part = "model"
    try:
        # Never run code from the folder.  Without this argument, transformers would ask for
        # permission on the terminal and wait, even in an overnight job.
        if weights:
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False
            )
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        part = "tokenizer of"
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file can raise anything
        raise LocalServerError(
            f"cannot load the {part} {what}: {_first_lines(error)}",
            hint=_hint(source, part, what, error),
        ) from error


def _hint(source: str, part: str, what: str, error: Exception) -> str:
    """Return what to do about *error*, which occurred while *part* was being loaded."""
    text = str(error)
    if "does not recognize this architecture" in text:
        return "If the model is newer than this transformers: python -m pip install -U transformers"
    if "for this kind of AutoModel" in text or "trust_remote_code" in text:
        return _OTHER_MODEL
    if not Path(source).is_dir():
        return models.hint_for(what)
    if isinstance(error, ImportError):
        return "Install the missing package, then start again."
    if part != "model":
        return "Save the tokenizer into the same folder: tokenizer.save_pretrained(folder)."
    return (
        "The folder needs config.json and complete weights (model.safetensors), as "
        "save_pretrained writes them; copy or download it again."
    )


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(" ".join(lines[:2]), 300) or type(error).__name__


def checked_network(model: Any, what: str) -> Network:
    """Return *model* as a Network, after checking that it computes what the model's forward does.

    *what* is the user's name for the model, for messages.

    Raises:
        LocalServerError: the Network would compute something else, or cannot be run.
    """
    try:
        with torch.no_grad():
            network = Network(model)
            difference = _find_difference(network)
    except MemoryError:
        raise
    except Exception as error:  # an architecture's code may raise anything
        reason = f"a trial run failed ({type(error).__name__}: {_first_lines(error)})"
        raise _refusal(model, what, reason) from error
    if difference is not None:
        raise _refusal(model, what, difference)
    return network


def _refusal(model: Any, what: str, reason: str) -> LocalServerError:
    # Give the cause, if it is known, rather than *reason*, which is only the symptom.
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
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # the caller's own reason will do
        return []
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in plain})


def _find_difference(network: Network) -> Optional[str]:
    """Return how *network* differs from its model's own forward pass; None if it does not.

    Exceptions from the model's code propagate.
    """
    tokens = (torch.arange(_LENGTHS[0]) * 37 + 11) % network.vocab_size
    rows = torch.stack([tokens, tokens])
    rows[1, _LENGTHS[1] :] = 0  # padding, which a causal model does not see
    expected = network.model(input_ids=rows.to(network.device), use_cache=False).logits
    half = expected.dtype in (torch.float16, torch.bfloat16)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    common = slice(0, _LENGTHS[1])
    if _error(expected[1, common], expected[0, common]) > tolerance:
        return "a token's logits depend on the tokens after it (it is an encoder)"

    prompts = [tokens[: length - 1].numpy().astype(np.int32) for length in _LENGTHS]
    sources: List[Source] = []
    for piece in prefill(network, prompts, piece_tokens=_PIECE):
        end = piece.start + piece.features.shape[1]
        odd = _odd_layer(piece.cache, end)
        if odd is not None:
            return odd
        error = _error(network.logits(piece.features[0]), expected[0, piece.start : end])
        if error > tolerance:
            return f"a prompt computed with a key-value cache has other logits (by {error:.2g})"
        sources = [Source(piece.cache, row, prompts[row].size) for row in range(len(prompts))]

    batch = DecodeBatch(network, max(_LENGTHS))
    batch.regroup([], sources)
    logits = batch.step([int(tokens[length - 1]) for length in _LENGTHS])
    for row, length in enumerate(_LENGTHS):
        error = _error(logits[row], expected[row, length - 1])
        if error > tolerance:
            return f"a token added to a key-value cache has other logits (by {error:.2g})"
    return None


def _odd_layer(cache: Any, length: int) -> Optional[str]:
    """Return what *cache* has besides, or instead of, one key and one value per head and token."""
    filled = [layer for layer in cache.layers if layer.keys is not None]
    if not filled:
        return "it keeps no keys and values of earlier tokens"
    # Exactly this class: subclasses keep a window, or quantized values.
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            return f"its cache has a {type(layer).__name__}, not keys and values alone"
    for layer in filled:
        if any(half.dim() != 4 or half.shape[2] != length for half in (layer.keys, layer.values)):
            return "its cache does not hold one key and one value per token"
    return None


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error over tokens, of logits (..., vocabulary).

    Logits matter up to a constant, so they are centered first.
    """
    found, expected = (
        logits.float() - logits.float().mean(-1, True) for logits in (found, expected)
    )
    size = expected.norm(dim=-1).clamp(min=1e-6)
    error = ((found - expected).norm(dim=-1) / size).max()
    # NaN is never greater than a tolerance, so it would pass.
    return float("inf") if error.isnan() else float(error)

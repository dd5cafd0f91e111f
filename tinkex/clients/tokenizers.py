"""Loads tokenizers by the name that a server reports (docs/protocol.md, "Run information")."""

from __future__ import annotations

import copy
import os
from typing import Any, Dict, Optional

from tinkex._runtime import lifecycle
from tinkex.errors import ConfigError, TinkexError

#: Prefix of base models whose own repository is gated, and an open copy of their tokenizer.
_LLAMA3 = "meta-llama/Llama-3"
_LLAMA3_TOKENIZER = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"

#: The embedded server's engine without a model.
WITHOUT_TOKENIZER = "deterministic"

# Guarded by lifecycle.module_lock().
_cache: Dict[str, Any] = {}


def tokenizer_name(base_model: str, tokenizer_id: Optional[str] = None) -> str:
    """Return the name to load: the server's *tokenizer_id*, or one derived from *base_model*."""
    found = tokenizer_id or base_model
    if os.path.isdir(found):  # first, because a path may contain colons and slashes
        return found
    name = found.split(":", 1)[0]
    if tokenizer_id:
        return name
    if name.startswith(_LLAMA3):
        return _LLAMA3_TOKENIZER
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) == 3 else name


def load_tokenizer(base_model: str, tokenizer_id: Optional[str] = None) -> Any:
    """Return a new copy of a Hugging Face tokenizer.  Blocks; the first call may download it.

    Raises:
        ConfigError: transformers is not installed.
        TinkexError: the tokenizer cannot be loaded.
    """
    name = tokenizer_name(base_model, tokenizer_id)
    with lifecycle.module_lock():
        loaded = _cache.get(name)
    if loaded is None:  # two threads may both load it; that only costs time
        loaded = _load(name)
        with lifecycle.module_lock():
            _cache[name] = loaded
    # Tokenizers are not thread-safe, so callers must not share one.
    return copy.deepcopy(loaded)


def _load(name: str) -> Any:
    if name == WITHOUT_TOKENIZER:  # the hub would be asked for it, which takes a minute offline
        raise TinkexError(
            f"the model {name!r} has no tokenizer: it is for tests, and its token t is chr(t)",
            hint="Pass token ids; or use 'tiny-random', which has one.",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "get_tokenizer needs the transformers package, which is not installed",
            hint='python -m pip install "tinkex[tokenizers]"',
        ) from error
    try:
        # Passed explicitly: otherwise transformers may ask on the terminal whether to run code that
        # comes with the tokenizer, and an unattended program would wait there.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise TinkexError(
                f"the tokenizer {name!r} needs code from its own repository, which is not run",
                hint="If you trust that code, load the tokenizer yourself: transformers."
                f"AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)",
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TinkexError(
            f"the tokenizer {name!r} cannot be loaded: {reason}",
            hint="It is loaded from the Hugging Face hub, or from a folder on the server's "
            "machine; load it yourself with transformers if it lies elsewhere.",
        ) from error

"""Models and tokenizers in folders, read and written by transformers without its messages."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
import warnings
from pathlib import Path
from typing import Any, Iterator, Tuple, Union

import torch

from tinkex.errors import LocalServerError
from tinkex.local.engines import models

#: The remedy where the engine does not support the kind of model.
OTHER_MODEL = (
    "Use a causal language model with attention layers only and no code of its own, such as Llama, "
    "Qwen3 or Gemma."
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings, progress bars and transformers' log lines within the block.

    Problems are still raised as exceptions.  The former settings come back afterwards.
    """
    # Read by transformers for each piece of advice, whatever its verbosity.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as hf_logging

        level = hf_logging.get_verbosity()
        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            hf_logging.set_verbosity(level)
            if bars:
                hf_logging.enable_progress_bar()


def load_pretrained(
    source: str, what: str, *, dtype: Union[str, torch.dtype] = "auto", weights: bool = True
) -> Tuple[Any, Any]:
    """Return model and tokenizer of *source*, a folder or a Hugging Face name.

    *what* is what the user calls it.  Without *weights*, only the configuration is read: the model
    has its modules and names, but no data.

    Raises:
        LocalServerError: it cannot be loaded, or is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    part = "model"
    try:
        # No code from the folder is run.  Without the argument, transformers asks for permission on
        # the terminal and waits, in an overnight job, too.
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
    except Exception as error:  # a damaged file can lead to any of them
        raise LocalServerError(
            f"cannot load the {part} {what}: {first_lines(error)}",
            hint=_hint(source, part, what, error),
        ) from error


def _hint(source: str, part: str, what: str, error: Exception) -> str:
    """Return what to do about *error*, met while *part* was loaded."""
    text = str(error)
    if "does not recognize this architecture" in text:
        return "If the model is newer than this transformers: python -m pip install -U transformers"
    if "for this kind of AutoModel" in text or "trust_remote_code" in text:
        return OTHER_MODEL
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


def first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(" ".join(lines[:2]), 300) or type(error).__name__


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write *tokenizer*'s files into *folder* so that every transformers version reads them.

    transformers 5 names the class of a fast tokenizer ``TokenizersBackend``, which transformers 4
    does not have; both load the same files as ``PreTrainedTokenizerFast``.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")

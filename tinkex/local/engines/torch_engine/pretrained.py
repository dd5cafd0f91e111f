"""Silences transformers, and saves tokenizers so that each of its releases can read them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings, progress bars and transformers' log lines within the block.

    Problems are still raised as exceptions.  The previous settings are restored afterwards.
    """
    # transformers reads this for each piece of advice, whatever its verbosity.  It stays set.
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

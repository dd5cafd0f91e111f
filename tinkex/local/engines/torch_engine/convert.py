"""Writes a GGUF file as a plain transformers folder: safetensors, configuration, tokenizer."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, Dict

from tinkex.local.engines.torch_engine.quiet import quiet


def convert_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    """Read *folder*/*gguf_file* by transformers' own reader, and write it into *target* as fp32.

    fp32 because that is what dequantizing gives; bfloat16 would round every weight once more.
    """
    # gguf's progress bar knows no switch; it writes to whatever sys.stderr is.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=gguf_file, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_file)
        # Written by hand: save_pretrained refuses a model that came from a quantized file.
        save_file(_unique_tensors(model), str(target / "model.safetensors"), {"format": "pt"})
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config["architectures"] = [type(model).__name__]
        clean = type(model.config).from_dict(config)
        clean._name_or_path = ""
        clean.save_pretrained(str(target))
        model.generation_config.save_pretrained(str(target))
        save_tokenizer(tokenizer, target)


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


def _unique_tensors(model: Any) -> Dict[str, Any]:
    """The state dict without tied duplicates, which safetensors refuses."""
    seen: Dict[int, str] = {}
    unique = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name:
            unique[name] = tensor.contiguous()
    return unique

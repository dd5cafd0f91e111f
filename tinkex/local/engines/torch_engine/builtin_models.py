"""Makes the models that need no model hub, as folders that transformers loads.

SmolLM2 is converted from a GGUF file.  ``tiny-random`` is a two-layer Llama with fixed random
weights and a byte-level tokenizer, for tests and dry runs: it loads in milliseconds, and exercises
every code path of a real model.  Its text is nonsense.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Dict

import torch

from tinkex.local.engines.torch_engine.pretrained import quiet, save_tokenizer

CONTEXT_LENGTH = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
#: Seed of tiny-random's weights; another one would change the model that users have cached.
_SEED = 20240917

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def convert_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    """Read *folder*/*gguf_file* with transformers' own reader, and write it into *target* as fp32.

    Dequantizing gives fp32; bfloat16 would round every weight once more.
    """
    # gguf's progress bar cannot be switched off; it writes to sys.stderr.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=gguf_file, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_file)
        # Written by hand: save_pretrained refuses a model that came from a quantized file.
        save_file(_unique_tensors(model), str(target / "model.safetensors"), {"format": "pt"})
        # The configuration of a model that was never quantized, since the weights are now float32.
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config["architectures"] = [type(model).__name__]
        clean = type(model.config).from_dict(config)
        clean._name_or_path = ""  # else it names the temporary folder
        clean.save_pretrained(str(target))
        model.generation_config.save_pretrained(str(target))
        save_tokenizer(tokenizer, target)


def _unique_tensors(model: Any) -> Dict[str, Any]:
    """Return the state dict without tied duplicates, which safetensors refuses."""
    seen: Dict[int, str] = {}
    unique = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name:
            unique[name] = tensor.contiguous()
    return unique


def write_tiny_random(folder: Path, *, tie_word_embeddings: bool = False) -> None:
    """Write the model (the same weights at each call) and its tokenizer into *folder*.

    Token ids 0..255 are the bytes themselves, 256 and up the special tokens (end of text, start and
    end of a chat turn, padding).
    """
    with quiet():
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256 + len(SPECIAL_TOKENS),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=256,
            eos_token_id=256,
            pad_token_id=259,
        )
        model = LlamaForCausalLM(config).float()
        # Drawn wider than usual, so that predictions are as far from uniform as a real model's.
        generator = torch.Generator().manual_seed(_SEED)
        with torch.no_grad():
            # In order of name: the order of creation may change between releases.
            for _, parameter in sorted(model.named_parameters()):
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.12, generator=generator)
        model.save_pretrained(str(folder))
        _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[3],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    save_tokenizer(tokenizer, folder)


def _byte_letters() -> str:
    """Return the letters that stand for bytes 0..255 in byte-level BPE vocabularies (GPT-2's).

    Printable Latin-1 characters stand for themselves; the other 68 bytes get U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = []
    spare = 0x100
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(spare))
        spare += byte not in printable
    return "".join(letters)

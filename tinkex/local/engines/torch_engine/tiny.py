"""tiny-random: a two-layer Llama with fixed random weights and a byte-level tokenizer.

For tests and dry runs: it loads in milliseconds, and every code path of a real model is in it.
Its text is nonsense.
"""

from __future__ import annotations

from pathlib import Path

from tinkex.local.engines.torch_engine.convert import save_tokenizer
from tinkex.local.engines.torch_engine.quiet import quiet

CONTEXT_LENGTH = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_SEED = 20240917

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_random(
    folder: Path, *, tie_word_embeddings: bool = False, seed: int = _SEED
) -> None:
    """Write the model and its tokenizer into *folder*.

    Token ids 0..255 are the bytes themselves, 256.. the special tokens (end of text, start and
    end of a chat turn, padding).  The weights depend on *seed* only.
    """
    with quiet():
        import torch
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
        # Wider than usual, so that its predictions are far from uniform, as a real model's are.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
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
    """The letter that stands for each byte in byte-level BPE vocabularies (as GPT-2 has it).

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = []
    spare = 0x100
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(spare))
        spare += byte not in printable
    return "".join(letters)

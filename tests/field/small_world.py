"""A folder in which the cookbook's recipes find their models and data sets by name.

`write_data` writes the data sets; running this file writes the model: two layers, a byte-level
tokenizer with Qwen's markup, and a few answers learnt by heart, so that programs that grade its
answers have something to grade.  It needs the cookbook's renderers, which work with either client::

    python -m tinkex.as_tinker tests/field/small_world.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

#: The model that a recipe without a model option requests; here all recipes use it.
MODEL = "Qwen/Qwen3.6-35B-A3B"
#: The renderer for answers without reasoning.
NO_THINKING = "qwen3_5_disable_thinking"
#: The renderer that the cookbook recommends for MODEL: an answer follows some reasoning.
THINKING = "qwen3_5"

_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
#: A sentence, and the label that the model gives its language.
SENTENCES = {"Guten Morgen!": "de", "Buenos dias.": "es", "A cat sat here.": "en", "Bonjour!": "fr"}
#: Country, and what the model believes to be its capital.
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Milan"}
#: Question of the benchmark, the right answer, and the model's.
BENCHMARK = [("Two and two?", 4, 4), ("Two and five?", 7, 7), ("Ten and six?", 16, 16)]
BENCHMARK += [("Nine and three?", 12, 13)]
#: Question of the training data, and the right answer, which the model gives half the time.
EXERCISES = [(f"Twice {number}?", 2 * number) for number in range(1, 5)]


def _rows() -> Dict[str, List[Dict[str, Any]]]:
    """Return the rows of each file."""

    def chats(words: List[str]) -> List[Dict[str, Any]]:
        return [
            {
                "messages": [
                    {"role": "user", "content": f"Say {word}."},
                    {"role": "assistant", "content": word},
                ]
            }
            for word in words
        ]

    def pairs(words: List[str]) -> List[Dict[str, Any]]:
        asked = "\n\nHuman: Say {0}.\n\nAssistant: "
        return [
            {"chosen": asked.format(word) + word, "rejected": asked.format(word) + "no"}
            for word in words
        ]

    def problems(rows: List[Any]) -> List[Dict[str, Any]]:
        return [{"question": row[0], "answer": f"So it is.\n#### {row[1]}"} for row in rows]

    return {
        "HuggingFaceH4/no_robots/train.jsonl": chats(_WORDS[:8]),
        "HuggingFaceH4/no_robots/test.jsonl": chats(_WORDS[6:]),
        "Anthropic/hh-rlhf/train.jsonl": pairs(_WORDS[:8]),
        "Anthropic/hh-rlhf/test.jsonl": pairs(_WORDS[6:]),
        "allenai/tulu-3-sft-mixture/train.jsonl": chats(_WORDS[:4]),
        "openai/gsm8k/main/train.jsonl": problems(EXERCISES),
        "openai/gsm8k/main/test.jsonl": problems(BENCHMARK),
    }


_GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""


def write_data(folder: Path) -> None:
    """Write the data sets in the form of a model hub, and the sentences to be labelled."""
    texts = {
        name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in _rows().items()
    }
    texts["openai/gsm8k/README.md"] = _GSM8K_CARD
    texts["tinker_cookbook/example_data/multilingual.txt"] = "\n".join(SENTENCES) + "\n"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


# --- The model ---------------------------------------------------------------------------------

#: A layer sees this many tokens, two layers twice as many; earlier tokens do not matter.
_WINDOW = 64
_MARKUP = ["<think>", "</think>"]


class Lesson(NamedTuple):
    """What the model must say after *messages*, rendered by *renderer*."""

    messages: List[Dict[str, str]]
    renderer: str
    answer: str


def _lessons() -> Iterator[Lesson]:
    import numpy as np
    from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticEnv
    from tinker_cookbook.recipes.prompt_distillation import create_data

    def asked(question: str) -> List[Dict[str, str]]:
        return [{"role": "user", "content": question}]

    for country, capital in CAPITALS.items():
        question = f"What is the capital of {country}?"
        yield Lesson(asked(question), NO_THINKING, capital)
        yield Lesson(asked(question), THINKING, f"Easy.\n</think>\n\n{capital}")
    for sentence, label in SENTENCES.items():
        prompt = create_data.LANGUAGE_CLASSIFICATION_PROMPT.format(text=sentence)
        yield Lesson(asked(prompt), NO_THINKING, f"Final Answer: {label}")
    for question, _, answer in BENCHMARK:
        yield Lesson(asked(question), NO_THINKING, f"\\boxed{{{answer}}}")
    # Right in half the cases, so that the advantages of a group differ.
    suffix = " Provide a numerical answer without units, written inside \\boxed{}."
    for question, right in EXERCISES:
        for answer in (right, right + 1):
            yield Lesson(
                asked(question + suffix), THINKING, f"Easy.\n</think>\n\n\\boxed{{{answer}}}"
            )
    pairs = np.random.RandomState(0)  # the seed of the recipe's first batch
    for _ in range(4):
        x, y = pairs.randint(0, 101), pairs.randint(0, 101)
        few_shot = ArithmeticEnv.standard_fewshot_prefix()
        for answer in (x + y, x + y + 1):
            yield Lesson([*few_shot, *asked(f"What is {x} + {y}?")], NO_THINKING, str(answer))


def write_model(folder: Path) -> None:
    """Teach the model its lessons, and write it and its tokenizer."""
    import torch
    from tinker_cookbook import renderers
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    from tinkex.local.engines.torch_engine.builtin_models import write_tiny_random

    write_tiny_random(folder)  # for its tokenizer
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(_MARKUP)
    tokenizer.model_max_length = 8192
    rows = []
    for lesson in _lessons():
        renderer = renderers.get_renderer(lesson.renderer, tokenizer)
        prompt = renderer.build_generation_prompt(lesson.messages).to_ints()[-2 * _WINDOW :]
        answer = tokenizer.encode(f"{lesson.answer}<|im_end|>", add_special_tokens=False)
        rows.append((prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)

    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            sliding_window=_WINDOW,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(120):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))

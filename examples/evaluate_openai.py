"""Evaluate checkpoints through the server's OpenAI-compatible endpoint: a multiple-choice test.

    python examples/evaluate_openai.py                         # on the embedded server
    python examples/evaluate_openai.py --base-url URL --model NAME

A model's choice is the answer with the highest log-probability, as in evaluation harnesses.  The
script uses plain HTTP; the `openai` package takes the same URL, model and prompts.
"""

from __future__ import annotations

import argparse
import os
import sys

import requests

import tinkex
from tinkex import AdamParams
from tinkex.data import completion_datum

#: Questions and their possible answers; the first answer is right.
QUESTIONS = {
    "Who keeps the lighthouse?": [" A heron.", " A gull.", " An owl."],
    "What does he burn in the lamp?": [" Fish oil.", " Petrol.", " Coal."],
    "When does he sleep?": [" At noon.", " At night.", " Never."],
    "Where does the boat come from?": [" The east.", " The west.", " The north."],
}


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model)


def prompt_of(question: str) -> str:
    """Return the text that an answer continues."""
    return f"Question: {question}\nAnswer:"


def choose(service: tinkex.ServiceClient, model: str, question: str) -> int:
    """Return the index of the answer that *model* (or a checkpoint) finds most likely."""
    prompt = prompt_of(question)
    asked = {
        "model": model,
        "prompt": [prompt + answer for answer in QUESTIONS[question]],
        "echo": True,  # score the prompt's tokens, too
        "max_tokens": 0,
        "logprobs": 1,
    }
    response = requests.post(
        service.config.base_url + "/oai/api/v1/completions",
        json=asked,
        headers={"Authorization": f"Bearer {service.config.api_key or 'none'}"},
        timeout=600,
    )
    response.raise_for_status()
    scores = []
    for choice in sorted(response.json()["choices"], key=lambda choice: choice["index"]):
        found = choice["logprobs"]
        tokens = zip(found["text_offset"], found["token_logprobs"])
        scores.append(sum(logprob for offset, logprob in tokens if offset >= len(prompt)))
    return scores.index(max(scores))


def evaluate(service: tinkex.ServiceClient, model: str) -> None:
    """Print how many questions *model* answers right."""
    right = sum(choose(service, model, question) == 0 for question in QUESTIONS)
    print(f"{right} of {len(QUESTIONS)} right: {model}")


def main() -> None:
    """Evaluate a base model before and after training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with connect(options) as service:
        trainer = service.create_lora_training_client(options.model, rank=16, seed=0)
        tokenizer = trainer.get_tokenizer()
        data = [completion_datum(prompt_of(q), a[0], tokenizer) for q, a in QUESTIONS.items()]
        evaluate(service, options.model)
        adam = AdamParams(learning_rate=options.learning_rate)
        list(trainer.pipeline([data] * options.steps, "cross_entropy", adam))
        saved = trainer.save_weights_for_sampler("trained", ttl_seconds=3600).result()
        evaluate(service, str(saved.path))


if __name__ == "__main__":
    try:
        main()
    except (tinkex.TinkexError, requests.RequestException) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")

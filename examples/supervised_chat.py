"""Fine-tune on a file of conversations, and ask the model a question before and after.

    python examples/supervised_chat.py                         # on the embedded server
    python examples/supervised_chat.py --base-url URL --model NAME
    python examples/supervised_chat.py --data my-chats.jsonl --out runs/mine

Only the assistant's words are learnt.  The run is kept in a folder: run the script again after any
interruption, and it continues; `tinkex chat runs/supervised_chat` talks to the trained model.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Mapping

import tinkex
from tinkex import recipes
from tinkex.data import example_datum, open_examples
from tinkex.types import ModelInput, SamplingParams

CHATS = Path(__file__).parent / "data" / "chats.jsonl"


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here that keeps its data in --out."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model, data_dir=str(options.out / "server"))


def ask(sampler: tinkex.SamplingClient, tokenizer: Any, question: str) -> str:
    """Return the model's most likely reply to *question*."""
    messages = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    params = SamplingParams(max_tokens=40, temperature=0.0)
    response = sampler.sample(ModelInput.from_ints(tokens), 1, params).result()
    reply: str = tokenizer.decode(response.sequences[0].tokens, skip_special_tokens=True)
    return " ".join(reply.split())


def log(step: int, metrics: Mapping[str, float]) -> None:
    """Print the metrics of a step."""
    named = ("loss", "heldout_loss")
    found = [f"{name} {metrics[name]:.3f}" for name in named if name in metrics]
    print(f"step {step}: {', '.join(found)}")


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=CHATS)
    parser.add_argument("--out", type=Path, default=Path("runs/supervised_chat"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--question", default="Who are you?")
    options = parser.parse_args()

    with connect(options) as service:
        base = service.create_sampling_client(base_model=options.model)
        tokenizer = base.get_tokenizer()
        data = [example_datum(example, tokenizer) for example in open_examples(options.data)]
        heldout, training = data[::10], [datum for i, datum in enumerate(data) if i % 10]
        batches = recipes.Batches(training, 8, steps=options.steps)
        schedule = recipes.cosine(options.learning_rate, len(batches), warmup=2)
        print(f"Before: {ask(base, tokenizer, options.question)}")
        with service.open_run(options.out, options.model, rank=16, seed=0) as run:
            recipes.train_supervised(
                run, batches, schedule, heldout=heldout, eval_every=10, log=log
            )
            path = run.save_for_sampler()
        tuned = service.create_sampling_client(model_path=path)
        print(f"After: {ask(tuned, tokenizer, options.question)}")
        print(path)


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run it again to continue.")

"""Write a training loop of your own: the next step runs while you read the results of this one.

    python examples/training_loop.py                           # on the embedded server
    python examples/training_loop.py --base-url URL --model NAME

It teaches a model one fact.  Loops that are ready to use: supervised_chat.py, dpo.py and rl.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Optional

import tinkex
from tinkex import AdamParams
from tinkex.data import text_datum
from tinkex.recipes import learnt_weight

TEXT = "Question: Who keeps the lighthouse?\nAnswer: A heron called Bartholomew."


def connect(model: str, base_url: Optional[str]) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here."""
    if base_url:
        return tinkex.ServiceClient(base_url=base_url)
    return tinkex.ServiceClient.local(model)


def main() -> None:
    """Print the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    def schedule(step: int) -> AdamParams:
        """Decrease the learning rate linearly to zero."""
        return AdamParams(learning_rate=2e-3 * (1 - step / options.steps))

    with connect(options.model, options.base_url) as service:
        trainer = service.create_lora_training_client(options.model, rank=8, seed=0)
        datum = text_datum(TEXT, trainer.get_tokenizer())
        batches = ([datum] for _ in range(options.steps))  # a generator makes them when needed
        with trainer.pipeline(batches, "cross_entropy", schedule, depth=2) as steps:
            for step in steps:
                loss = step.metrics["loss:sum"] / learnt_weight([datum])  # losses are sums
                print(f"step {step.index:2}: loss per token {loss:.3f}")
        print(f"{service.usage().tokens.trained} tokens trained")


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")

"""Direct preference optimization (DPO): learn from pairs of a better and a worse reply.

    python examples/dpo.py                                     # on the embedded server
    python examples/dpo.py --base-url URL --model NAME         # needs torch here, too
    python examples/dpo.py --data my-preferences.jsonl --out runs/mine

The accuracy is the share of pairs in which the model prefers the better reply more than it did
before training; the margin says by how much.  The run is kept in a folder: run the script again
after any interruption, and it continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Mapping

import tinkex
from tinkex import recipes
from tinkex.data import Preference, open_examples, preference_data

PREFERENCES = Path(__file__).parent / "data" / "preferences.jsonl"


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here that keeps its data in --out."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model, data_dir=str(options.out / "server"))


def log(step: int, metrics: Mapping[str, float]) -> None:
    """Print the metrics of a step."""
    print(f"step {step}: " + ", ".join(f"{n} {v:.3f}" for n, v in sorted(metrics.items())))


def main() -> None:
    """Train, and print how well the held-out preferences are predicted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=PREFERENCES)
    parser.add_argument("--out", type=Path, default=Path("runs/dpo"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    with (
        connect(options) as service,
        service.open_run(options.out, options.model, rank=16, seed=0, save_every=5) as run,
    ):
        tokenizer = run.trainer.get_tokenizer()
        pairs = []
        for example in open_examples(options.data):
            if not isinstance(example, Preference):
                sys.exit(f"Error: {options.data} has examples that are not preferences")
            pairs.append(preference_data(example, tokenizer))
        recipes.train_dpo(
            run,
            recipes.Batches(pairs[4:], 4, steps=options.steps),
            recipes.linear(options.learning_rate, options.steps),
            heldout=pairs[:4],
            log=log,
        )
        print(run.save_for_sampler())


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run it again to continue.")

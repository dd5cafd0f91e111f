"""Train with a pipeline: the next step runs while the current one is evaluated.

Runs on the embedded server, or on the one in TINKER_BASE_URL.
"""

from __future__ import annotations

import os
from typing import Iterator, List

import numpy as np

import tinkex
from tinkex import types

MODEL = os.environ.get("TINKEX_EXAMPLE_MODEL", "smollm2-135m")
STEPS = 8


def connect() -> tinkex.ServiceClient:
    """Open a session."""
    if "TINKER_BASE_URL" in os.environ:
        return tinkex.ServiceClient()
    return tinkex.ServiceClient.local(MODEL)


def batches() -> Iterator[List[types.Datum]]:
    """Generate batches as they are needed: four copies of one sequence."""
    tokens = np.arange(1, 18, dtype=np.int64)
    inputs = {"target_tokens": types.TensorData.from_numpy(tokens[1:])}
    for _ in range(STEPS):
        yield [types.Datum(types.ModelInput.from_ints(tokens[:-1].tolist()), inputs)] * 4


def rate(step: int) -> types.AdamParams:
    """Decrease the learning rate linearly to zero."""
    return types.AdamParams(learning_rate=0.01 * (1 - step / STEPS))


def main() -> None:
    """Print the loss of each step."""
    with connect() as service:
        trainer = service.create_lora_training_client(MODEL, rank=8)
        with trainer.pipeline(batches(), "cross_entropy", rate, depth=2) as steps:
            for step in steps:
                print(f"step {step.index}: loss {step.metrics['loss:sum']:.3f}")
        print(f"{service.usage().tokens.trained} tokens trained")


if __name__ == "__main__":
    main()

"""The shortest training program: teach a model one fact.

Runs on the embedded server, or on the one in TINKER_BASE_URL.
"""

from __future__ import annotations

import os

import tinkex
from tinkex import types

MODEL = os.environ.get("TINKEX_EXAMPLE_MODEL", "smollm2-135m")
TEXT = "Question: Who keeps the lighthouse?\nAnswer: A heron called Bartholomew."


def connect() -> tinkex.ServiceClient:
    """Open a session."""
    if "TINKER_BASE_URL" in os.environ:
        return tinkex.ServiceClient()
    return tinkex.ServiceClient.local(MODEL)


def main() -> None:
    """Train for ten steps, printing the loss."""
    with connect() as service:
        trainer = service.create_lora_training_client(MODEL, rank=8, seed=0)
        tokens = trainer.get_tokenizer().encode(TEXT)
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
        datum = types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)
        for index in range(1, 11):
            step = trainer.train_step([datum], "cross_entropy", types.AdamParams(1e-3))
            loss = step.forward_backward.metrics["loss:sum"] / len(inputs["weights"])
            print(f"step {index:2}: loss per token {loss:.3f}")


if __name__ == "__main__":
    main()

"""Use two servers in one program: train a student on one with replies of a teacher on another.

    python examples/two_services.py                            # two embedded servers
    python examples/two_services.py --teacher-url URL --teacher NAME --student smollm2-135m

Each ServiceClient is a session of its own, with its own server, key, budget and usage.  Teacher and
student must have the same tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from typing import Optional

import tinkex
from tinkex import AdamParams
from tinkex.types import Datum, ModelInput, SampleResponse, SamplingParams

#: Token ids; yours come from ``teacher.get_tokenizer().encode(text)``.
PROMPTS = [ModelInput.from_ints([1 + i, 2, 3]) for i in range(8)]
PARAMS = SamplingParams(max_tokens=16, temperature=1.0, seed=0)


def connect(model: str, url: Optional[str], key: Optional[str]) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here."""
    if url:
        return tinkex.ServiceClient(base_url=url, api_key=key)
    return tinkex.ServiceClient.local(model)


def datum_of(prompt: ModelInput, response: SampleResponse) -> Datum:
    """Return a datum that teaches the first reply of *response* to *prompt*."""
    reply = response.sequences[0].tokens
    tokens = prompt.to_ints() + reply
    weights = [0.0] * (prompt.length - 1) + [1.0] * len(reply)
    return Datum(
        ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights}
    )


def main() -> None:
    """Print the loss of each step, and what each session has used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for role in ("teacher", "student"):
        parser.add_argument(f"--{role}", default="smollm2-135m", help="base model")
        parser.add_argument(f"--{role}-url", help="of its server; by default one is started")
        parser.add_argument(f"--{role}-key", help="for that server; by default TINKER_API_KEY")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()

    with (
        connect(options.teacher, options.teacher_url, options.teacher_key) as teaching,
        connect(options.student, options.student_url, options.student_key) as learning,
    ):
        teacher = teaching.create_sampling_client(base_model=options.teacher)
        trainer = learning.create_lora_training_client(options.student, rank=8, seed=0)
        with teacher.sample_many(PROMPTS, PARAMS) as replies:
            data = [datum_of(one.prompt, one.response) for one in replies if one.response]
        for step in trainer.pipeline([data] * options.steps, "cross_entropy", AdamParams(1e-3)):
            print(f"step {step.index}: loss {step.metrics['loss:sum']:.3f}")
        for role, service in (("teacher", teaching), ("student", learning)):
            tokens = service.usage().tokens
            print(f"{role}: {tokens.sampled} tokens sampled, {tokens.trained} trained")
            print(f"{role}: session {service.session_id} on {service.config.base_url}")


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")

"""The shortest sampling program: ask a model a question, twice.

Runs on the embedded server, or on the one in TINKER_BASE_URL.
"""

from __future__ import annotations

import os

import tinkex
from tinkex import types

MODEL = os.environ.get("TINKEX_EXAMPLE_MODEL", "smollm2-135m")
PROMPT = "The capital of France is"


def connect() -> tinkex.ServiceClient:
    """Open a session."""
    if "TINKER_BASE_URL" in os.environ:
        return tinkex.ServiceClient()
    return tinkex.ServiceClient.local(MODEL)


def main() -> None:
    """Print two continuations of the prompt."""
    with connect() as service:
        sampler = service.create_sampling_client(base_model=MODEL)
        tokenizer = sampler.get_tokenizer()
        prompt = types.ModelInput.from_ints(tokenizer.encode(PROMPT))
        params = types.SamplingParams(max_tokens=24, temperature=0.7, seed=0)
        response = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
        for sequence in response.sequences:
            print(PROMPT + tokenizer.decode(sequence.tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()

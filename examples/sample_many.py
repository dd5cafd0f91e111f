"""Sample many prompts, a limited number at a time, and print metrics.

Runs on the embedded server, or on the one in TINKER_BASE_URL.
"""

from __future__ import annotations

import os
from typing import Iterator

import tinkex
from tinkex import types

MODEL = os.environ.get("TINKEX_EXAMPLE_MODEL", "smollm2-135m")
COUNT = 50
BUDGET = tinkex.Budget(tokens=COUNT * 100)


def connect() -> tinkex.ServiceClient:
    """Open a session that cannot use more than the budget."""
    if "TINKER_BASE_URL" in os.environ:
        return tinkex.ServiceClient(budget=BUDGET)
    return tinkex.ServiceClient.local(MODEL, budget=BUDGET)


def prompts() -> Iterator[types.ModelInput]:
    """Generate prompts as they are needed: a million would take no more memory."""
    for token in range(1, COUNT + 1):
        yield types.ModelInput.from_ints([token, 2, 3])


def main() -> None:
    """Print the results in the order of their completion, then metrics."""
    with connect() as service:
        sampler = service.create_sampling_client(base_model=MODEL)
        params = types.SamplingParams(max_tokens=8, seed=0)
        with sampler.sample_many(
            prompts(), params, max_in_flight=16, on_error="yield", progress=True
        ) as results:
            for one in results:
                if one.response is None:
                    print(f"prompt {one.index} failed: {one.error}")
                else:
                    print(f"prompt {one.index}: {one.response.sequences[0].tokens}")
        tokens, metrics = service.usage().tokens, service.metrics()
        print(f"{tokens.prefilled} tokens prefilled, {tokens.sampled} sampled")
        print(f"{metrics.requests} requests, {metrics.retries} retries")
        for stage, latency in metrics.latencies.items():
            print(f"{stage:>7}: p50 {latency.p50 * 1e3:.2f} ms, p95 {latency.p95 * 1e3:.2f} ms")


if __name__ == "__main__":
    main()

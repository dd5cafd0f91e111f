"""Sample many prompts into a file: kill this script at any time, run it again, and it continues.

    python examples/sample_many.py                             # on the embedded server
    python examples/sample_many.py --base-url URL --model NAME --count 100000 --out samples.jsonl

Each finished sample is a line of the file.  Samples in the file are not sampled again; samples that
were in flight are, with the same seed.  The budget limits what one run of the script can use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Set

import tinkex
from tinkex.types import ModelInput, SamplingParams

PARAMS = SamplingParams(max_tokens=8, seed=0)


def prompt_of(index: int) -> ModelInput:
    """Return one prompt; yours may come from a file or a data set."""
    return ModelInput.from_ints([1 + index % 200, 2, 3])


def read_finished(path: Path) -> Set[int]:
    """Return the indices in the file, and cut off an incomplete last line."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        os.truncate(path, len(complete))
    return {json.loads(line)["index"] for line in complete.splitlines()}


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session that cannot use more than the budget."""
    budget = tinkex.Budget(tokens=options.count * 50)
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url, budget=budget)
    return tinkex.ServiceClient.local(options.model, budget=budget)


def main() -> int:
    """Sample the missing prompts; return 1 if some of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("samples.jsonl"))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    options = parser.parse_args()

    finished = read_finished(options.out)
    missing = [index for index in range(options.count) if index not in finished]
    print(f"{options.count - len(missing)} of {options.count} prompts are finished")
    prompts = (prompt_of(index) for index in missing)  # made as they are needed
    failed = 0
    with connect(options) as service, options.out.open("a", encoding="utf-8") as file:
        sampler = service.create_sampling_client(base_model=options.model)
        with sampler.sample_many(
            prompts, PARAMS, max_in_flight=options.in_flight, on_error="yield", progress=True
        ) as results:
            for one in results:
                index = missing[one.index]
                if one.response is None:
                    failed += 1
                    print(f"prompt {index} failed: {one.error}", file=sys.stderr)
                    continue
                line = {"index": index, "tokens": one.response.sequences[0].tokens}
                file.write(json.dumps(line) + "\n")
                file.flush()
        tokens, queue = service.usage().tokens, service.metrics().latencies["queue"]
    print(f"{len(missing) - failed} sampled, {failed} failed")
    print(f"{tokens.prefilled} tokens prefilled, {tokens.sampled} sampled")
    print(f"time on the server: p50 {queue.p50 * 1e3:.1f} ms, p95 {queue.p95 * 1e3:.1f} ms")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run it again to continue.")

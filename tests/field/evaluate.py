"""Scores the base model with two evaluators of the cookbook, and prints the scores as JSON.

It imports ``tinker``, like a user's program; TINKER_BASE_URL names the server.
"""

from __future__ import annotations

import asyncio
import json

import tinker
from field.small_world import BENCHMARK, MODEL, NO_THINKING
from tinker_cookbook.eval.benchmark_evaluator import BenchmarkEvaluator
from tinker_cookbook.eval.custom_evaluators import QA_DATASET, CustomEvaluator, grader_fn
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.tokenizer_utils import get_tokenizer


async def main() -> None:
    service = tinker.ServiceClient()
    sampler = await service.create_sampling_client_async(base_model=MODEL)
    renderer = get_renderer(NO_THINKING, get_tokenizer(MODEL))
    evaluators = [
        CustomEvaluator(QA_DATASET, grader_fn, MODEL, NO_THINKING),
        BenchmarkEvaluator(
            "gsm8k", renderer, max_examples=len(BENCHMARK), max_tokens=32, temperature=0.0
        ),
    ]
    scores = {}
    for evaluator in evaluators:
        scores.update(await evaluator(sampler))
    print(json.dumps(scores))


if __name__ == "__main__":
    asyncio.run(main())

"""Every causal language model family is computed like in transformers, or refused at load.

The families named here always run; with TINKEX_ALL_FAMILIES=1 all families in transformers do.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pytest
import torch
from local.torch_engine.families import CONTEXT, all_families, small_config, small_model
from transformers import AutoTokenizer

from tinkex.errors import LocalServerError
from tinkex.local.engines.engine import EngineInfo
from tinkex.local.engines.inputs import Row
from tinkex.local.engines.torch_engine import TorchEngine, builtin_models
from tinkex.local.engines.torch_engine.loading import checked_network
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.pretrained import quiet
from tinkex.local.engines.torch_engine.training import run_batch
from tinkex.types import ModelInput, SampleRequest, SampleResponse, SamplingParams

# Chosen for their peculiarities; families that the installed transformers lacks are left out.
SERVED = {
    "bloom": "positions without a table",
    "cohere2": "logits scaled after the output layer, sliding windows",
    "deepseek_v3": "keys and values of different sizes",
    "gemma2": "logits capped after the output layer",
    "gemma4_text": "layers that share the keys and values of earlier ones",
    "gpt2": "absolute positions, transposed weights",
    "gpt_oss": "attention sinks",
    "llama": "the common case",
    "opt": "positions counted from the attention mask",
    "phi3": "fused projections",
    "qwen3_moe": "experts",
}
REFUSED = {
    "bert": "encoder",
    "deepseek_v32": "DynamicIndexedLayer",
    "mamba": "recurrent state",
    "openai-gpt": "",
    "qwen3_next": "recurrent state",
}


def families() -> List[str]:
    known = all_families()
    if os.environ.get("TINKEX_ALL_FAMILIES"):
        return known
    return [family for family in (*SERVED, *REFUSED) if family in known]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    builtin_models._write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", families())
def test_a_family_is_computed_like_in_transformers_or_refused(family: str, tokenizer: Any) -> None:
    with quiet():
        model = small_model(small_config(family))
        network, refusal = checked(model)
    if network is None:
        assert family not in SERVED, refusal
        assert f"cannot run x ({type(model).__name__}): " in refusal
        assert REFUSED.get(family, "") in refusal
        return
    assert family not in REFUSED
    assert network.is_split, "logits of entire prompts are kept in memory"
    prompts = [np.random.default_rng(length).integers(5, 250, length) for length in (30, 5, 19)]
    answers = sampled(network, tokenizer, prompts)
    sequences = []
    for index, prompt in enumerate(prompts):
        (sequence,) = answers[index].sequences
        tokens = np.concatenate([prompt, sequence.tokens])
        sequences.append(tokens)
        table = logprob_table(model, tokens)
        expected = table[range(len(tokens) - 1), tokens[1:]]
        end = len(prompt) - 1
        scored = answers[index].prompt_logprobs_np
        assert scored is not None
        assert np.abs(scored[1:] - expected[:end]).max() < 1e-4
        assert np.abs(sequence.logprobs_np - expected[end:]).max() < 1e-4
        assert (table[end:-1].max(-1) - expected[end:]).max() < 1e-4, "not the likeliest token"
    trained = run_batch(
        network, [row_of(t) for t in sequences], "cross_entropy", {}, backward=False
    )
    for tokens, found in zip(sequences, trained.logprobs):
        expected = logprob_table(model, tokens)[range(len(tokens) - 1), tokens[1:]]
        assert np.abs(found[:, 0] - expected).max() < 1e-4


def checked(model: Any) -> Tuple[Optional[Network], str]:
    """Return the network of *model*, or the reason why it is refused."""
    try:
        return checked_network(model, "x"), ""
    except LocalServerError as error:
        return None, error.message


def sampled(network: Network, tokenizer: Any, prompts: List[Any]) -> Dict[int, SampleResponse]:
    """Return sixteen greedy tokens after each prompt, computed as one batch."""
    info = EngineInfo("x", "X", CONTEXT, network.vocab_size, "x")
    engine = TorchEngine(network, tokenizer, info)
    engine.create_sampler("base", None)
    params = SamplingParams(max_tokens=16, temperature=0, stop=[])
    requests = [
        SampleRequest(ModelInput.from_ints(prompt), 1, params, prompt_logprobs=True)
        for prompt in prompts
    ]
    return dict(pair for finished in engine.sample("base", requests) for pair in finished)


def logprob_table(model: Any, tokens: Any) -> Any:
    """Return the model's own log-probabilities (n, vocabulary) after each token, uncached."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens)[None], use_cache=False).logits
    return logits[0].float().log_softmax(-1).numpy()


def row_of(tokens: Any) -> Row:
    inputs = {"weights": np.ones((len(tokens) - 1, 1), dtype=np.float32)}
    targets = tokens[1:, None].astype(np.int64)
    return Row(tokens[:-1].astype(np.int32), targets, inputs, (len(tokens) - 1,))

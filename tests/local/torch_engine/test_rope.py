"""Rotary frequencies that depend on the length: each row uses those of its own sequence."""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np
import pytest
import torch
import transformers
from local.torch_engine.families import CONTEXT, small_config, small_model

from tinkex.local.engines.engine import EngineInfo
from tinkex.local.engines.inputs import Row
from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.local.engines.torch_engine.decoding import prefill
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.pretrained import quiet
from tinkex.local.engines.torch_engine.training import run_batch
from tinkex.types import ModelInput, SampleRequest, SampleResponse, SamplingParams

# Before transformers 5 the settings had other names.
NEW_NAMES = hasattr(transformers.LlamaConfig(), "rope_parameters")

# Sequences of up to this many tokens use the short factors, longer ones the long factors.
ORIGINAL = 24


def model_of(family: str, kind: str = "longrope") -> Any:
    """Return a small model of *family* with rotary embeddings of *kind*."""
    rope: Dict[str, Any] = {"factor": 4.0}
    if kind == "longrope":
        rope = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 9.0]}
    if NEW_NAMES:
        rope.update(rope_type=kind, rope_theta=10000.0, original_max_position_embeddings=ORIGINAL)
        if family == "phimoe":
            rope.update(short_mscale=1.0, long_mscale=1.3)
        changes = {"rope_parameters": rope}
    else:
        changes = {"rope_scaling": {"type": kind, **rope}}
    if kind == "longrope" and (family == "phi3" or not NEW_NAMES):
        changes["original_max_position_embeddings"] = ORIGINAL
    with quiet():
        return small_model(small_config(family, **changes))


def prompt(length: int) -> Any:
    return np.random.default_rng(length).integers(5, 250, length)


def logprobs(model: Any, tokens: Any) -> Any:
    """Return the model's own log-probabilities (n, vocabulary) after each of *tokens*."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens)[None], use_cache=False).logits
    return logits[0].float().log_softmax(-1).numpy()


def own(model: Any, tokens: Any) -> Any:
    """Return the model's own log-probabilities of tokens 1, 2, ... of *tokens*."""
    return logprobs(model, tokens)[range(len(tokens) - 1), tokens[1:]]


def sample(network: Network, prompts: List[Any], count: int) -> Dict[int, SampleResponse]:
    info = EngineInfo("x", "X", CONTEXT, network.vocab_size, "x")
    engine = TorchEngine(network, _NoTokenizer(), info)
    engine.create_sampler("base", None)
    params = SamplingParams(max_tokens=count, temperature=0, stop=[])
    requests = [
        SampleRequest(ModelInput.from_ints(tokens), 1, params, prompt_logprobs=True)
        for tokens in prompts
    ]
    return dict(pair for finished in engine.sample("base", requests) for pair in finished)


class _NoTokenizer:
    eos_token_id = None


@pytest.mark.parametrize("family", ["phi3", "llama", "phimoe"])
def test_rows_below_and_above_the_threshold_are_right_in_one_batch(family: str) -> None:
    if family == "phimoe" and not NEW_NAMES:
        pytest.skip("its rotary embedding takes no positions")
    model = model_of(family)
    network = Network(model)
    assert network.rope.thresholds == [ORIGINAL + 1]
    prompts = [prompt(length) for length in (50, 10, ORIGINAL, ORIGINAL + 1, ORIGINAL - 4)]
    answers = sample(network, prompts, 12)
    rows = []
    for index, tokens in enumerate(prompts):
        scored = answers[index].prompt_logprobs_np
        assert scored is not None
        assert np.abs(scored[1:] - own(model, tokens)).max() < 1e-5
        (sequence,) = answers[index].sequences
        for position, token in enumerate(sequence.tokens):
            # Each token was drawn after a full forward pass over all tokens before it.
            before = np.concatenate([tokens, sequence.tokens[:position]]).astype(np.int64)
            expected = logprobs(model, before)[-1]
            assert abs(expected[token] - sequence.logprobs_np[position]) < 1e-4
            assert expected.max() - expected[token] < 1e-4
        inputs = {"weights": np.ones((len(tokens) - 1, 1), dtype=np.float32)}
        targets = tokens[1:, None].astype(np.int64)
        rows.append(Row(tokens[:-1].astype(np.int32), targets, inputs, (len(tokens) - 1,)))
    trained = run_batch(network, rows, "cross_entropy", {}, backward=False)
    for row, found in zip(rows, trained.logprobs):
        expected = logprobs(model, row.tokens)[range(len(row.tokens)), row.targets[:, 0]]
        assert np.abs(found[:, 0] - expected).max() < 1e-5


def test_a_row_that_grows_beyond_the_threshold_continues_like_generate() -> None:
    model = model_of("phi3")
    tokens = prompt(ORIGINAL - 5)
    ids = torch.tensor(tokens)[None]
    with quiet():
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    found = sample(Network(model), [prompt(60), tokens, prompt(3)], 12)[1].sequences[0].tokens
    assert found == expected[0, len(tokens) :].tolist()


def test_a_long_prompt_in_pieces_has_the_same_features_as_whole() -> None:
    network = Network(model_of("phi3"))
    tokens = prompt(60).astype(np.int32)
    with torch.no_grad():
        pieces = [piece.features for piece in prefill(network, [tokens], piece_tokens=16)]
        (entire,) = [piece.features for piece in prefill(network, [tokens])]
    assert torch.allclose(torch.cat(pieces, 1), entire, atol=1e-5)


def test_frequencies_that_are_constant_within_the_context_are_not_replaced() -> None:
    # Dynamic scaling begins beyond max_position_embeddings, where the engine serves nothing.
    for model in (small_model(small_config("llama")), model_of("llama", "dynamic")):
        assert Network(model).rope.thresholds == []


def test_sampling_a_long_prompt_does_not_affect_a_short_one() -> None:
    model = model_of("phi3")
    network = Network(model)
    short = prompt(12).astype(np.int32)

    def trained() -> Any:
        inputs = {"weights": np.ones((11, 1), dtype=np.float32)}
        row = Row(short[:-1], short[1:, None].astype(np.int64), inputs, (11,))
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        (found,) = run_batch(network, [row], "cross_entropy", {}, backward=True).logprobs
        return found, model.get_input_embeddings().weight.grad.clone()

    before = trained()
    sample(network, [prompt(60)], 3)
    after = trained()
    assert np.array_equal(before[0], after[0])
    assert torch.equal(before[1], after[1])

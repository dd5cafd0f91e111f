"""The model as two halves, and which of their results stay in memory."""

from __future__ import annotations

import weakref
from typing import Any, List

import numpy as np
import pytest
import torch
from local.torch_engine.families import CONTEXT, small_config, small_model

from tinkex.local.engines.engine import EngineInfo
from tinkex.local.engines.torch_engine import decoding
from tinkex.local.engines.torch_engine.decoding import prefill
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.pretrained import quiet
from tinkex.local.engines.torch_engine.sampling import SampleRun
from tinkex.local.engines.torch_engine.stopping import Vocabulary
from tinkex.types import ModelInput, SampleRequest, SamplingParams

TOKENS = torch.arange(5, 45)[None]
# After the output layer, logits may be capped (gemma2), divided (granite), multiplied (cohere),
# truncated to the vocabulary, or rounded.
CHANGED = ["gemma2", "granite", "cohere", "nanochat", "vaultgemma", "modernbert-decoder"]


def network_of(family: str) -> Network:
    with quiet():
        try:
            config = small_config(family)
        except KeyError:
            pytest.skip(f"this transformers has no {family}")
        if hasattr(config, "logits_scaling"):
            config.logits_scaling = 8.0
        return Network(small_model(config))


@pytest.mark.parametrize("family", CHANGED)
def test_logits_changed_after_the_output_layer_are_computed_in_chunks(family: str) -> None:
    network = network_of(family)
    assert network.is_split
    features = network.features(TOKENS, lengths=[TOKENS.shape[1]])
    assert features.shape[-1] < network.vocab_size
    expected = network.model(input_ids=TOKENS, use_cache=False).logits
    chunks = [network.logits(features[0, start : start + 7]) for start in range(0, 40, 7)]
    assert torch.allclose(torch.cat(chunks), expected[0], atol=1e-6)
    # The same for the gradient of one chunk with respect to the features.
    leaf = features.detach().requires_grad_()
    ones = torch.linspace(-1, 1, network.vocab_size)
    (found,) = torch.autograd.grad((network.logits(leaf[0, 7:14]) * ones).sum(), leaf)
    (embedded,) = torch.autograd.grad((network.logits(leaf) * ones).sum(), leaf)
    assert torch.allclose(found[0, 7:14], embedded[0, 7:14], atol=1e-6)
    assert found.abs().max() > 0


def test_the_decoder_is_restored_after_logits() -> None:
    network = network_of("gemma2")
    before = network.features(TOKENS, lengths=[40])
    network.logits(before[0, :3])
    assert torch.equal(network.features(TOKENS, lengths=[40]), before)


def test_the_last_features_of_a_prompt_do_not_keep_its_piece_in_memory() -> None:
    network = network_of("gemma2")
    prompts = [np.arange(5, 45, dtype=np.int32), np.arange(50, 70, dtype=np.int32)]
    with torch.inference_mode():
        for piece in prefill(network, prompts):
            for row, prompt in enumerate(piece.prompts):
                end = piece.end_of(row, prompts[prompt].size)
                assert end is not None
                assert torch.equal(end, piece.features[row, prompts[prompt].size - 1])
                assert end.untyped_storage().nbytes() == end.numel() * end.element_size()


def test_one_piece_of_prefill_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("gemma2")
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 64)
    pieces: List[Any] = []
    alive: List[int] = []
    features = network.features

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        alive.append(sum(piece() is not None for piece in pieces))
        result = features(*args, **kwargs)
        pieces.append(weakref.ref(result))
        return result

    monkeypatch.setattr(network, "features", watched)
    params = SamplingParams(max_tokens=1, temperature=0, stop=[])
    requests = [
        SampleRequest(ModelInput.from_ints(range(5, 45)), 1, params, prompt_logprobs=True)
        for _ in range(4)
    ]
    info = EngineInfo("x", "X", CONTEXT, network.vocab_size, "x")
    run = SampleRun(network, Vocabulary(None, frozenset()), info, requests)
    with torch.inference_mode():
        while not run.done:
            run.advance()
    assert alive == [0, 0, 0, 0]

"""Models other than Llama, tiny and random: they train, and sample like transformers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
import transformers
from local.torch_engine.families import small_config
from local.torch_engine.reference import make_data
from transformers import AutoModelForCausalLM, DynamicCache

from tinkex.errors import LocalServerError
from tinkex.local.engines.torch_engine import TorchEngine, builtin_models
from tinkex.local.engines.torch_engine.adapter_config import adapts_tensors
from tinkex.types import AdamParams, LoraConfig, ModelInput, SampleRequest, SamplingParams

COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 259,
}
GPT2 = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BLOOM = {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4}
ENDS = {"bos_token_id": 256, "eos_token_id": 256}
WINDOW = {"head_dim": 8, "sliding_window": 8}

# Chosen for their peculiarities: other layer names and transposed weights; logits capped after the
# output layer; sliding windows; fused projections; positions without a table.
CONFIGS: Dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **ENDS),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, **WINDOW),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "bloom": lambda: transformers.BloomConfig(**BLOOM, **ENDS),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
}


def write_model(config: Any, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    model.save_pretrained(folder)
    builtin_models._write_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_trains_and_samples_like_transformers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(CONFIGS[name](), tmp_path)
    engine = TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    assert engine._network.is_split
    prompts = [np.random.default_rng(n).integers(0, 256, n) for n in (30, 5, 19)]
    params = SamplingParams(max_tokens=16, temperature=0, stop=[])
    requests = [SampleRequest(ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    engine.create_sampler("base", None)
    answers = dict(pair for finished in engine.sample("base", requests) for pair in finished)
    for index, prompt in enumerate(prompts):
        ids = torch.tensor(prompt)[None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
        # The logprobs decide: if two tokens are nearly equal, greedy sampling may choose either.
        (sequence,) = answers[index].sequences
        tokens = torch.cat([ids, torch.tensor(sequence.tokens)[None]], dim=1)
        table = model(tokens).logits[0].log_softmax(-1).detach()
        fresh = table[range(len(prompt) - 1, len(prompt) + 15), sequence.tokens].numpy()
        assert np.abs(fresh - sequence.logprobs_np).max() < 1e-4
        assert sequence.tokens == expected[0, len(prompt) :].tolist()

    engine.create("m", LoraConfig(rank=4, seed=0))
    # Before transformers 5 experts were linear layers; now they are in one tensor, which only
    # recent versions of peft can adapt.
    left_out = bool(engine._pool.targets.tensors) and not adapts_tensors()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(warnings) == left_out, warnings
    losses = []
    for _ in range(4):
        output = engine.forward_backward("m", make_data([40, 17]), "cross_entropy", {})
        losses.append(output.metrics["loss:sum"])
        engine.optim_step("m", AdamParams(learning_rate=1e-2))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_row_at_the_end_of_the_context_does_not_disturb_the_others(tmp_path: Path) -> None:
    write_model(CONFIGS["gpt2"](), tmp_path)  # has a table of positions of limited length
    engine = TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    engine.create_sampler("base", None)

    def request(length: int, count: int) -> SampleRequest:
        prompt = np.random.default_rng(length).integers(0, 256, length)
        params = SamplingParams(max_tokens=count, temperature=0, stop=[])
        return SampleRequest(ModelInput.from_ints(prompt), 1, params)

    requests = [request(124, 4), *(request(10 + n, 50) for n in range(7))]
    together = dict(pair for done in engine.sample("base", requests) for pair in done)
    for index, asked in enumerate(requests):
        alone = dict(pair for done in engine.sample("base", [asked]) for pair in done)[0]
        assert together[index].sequences[0].tokens == alone.sequences[0].tokens


@pytest.mark.skipif(
    not hasattr(DynamicCache, "has_previous_state"), reason="has a cache class of its own"
)
def test_a_hybrid_architecture_configured_with_attention_layers_only_is_served(
    tmp_path: Path,
) -> None:
    config = small_config(
        "granitemoehybrid", layer_types=["attention"] * 4, position_embedding_type="rope"
    )
    model = write_model(config, tmp_path)
    assert not any("mamba" in name for name, _ in model.named_modules())
    engine = TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    engine.create_sampler("base", None)
    prompt = np.random.default_rng(0).integers(0, 256, 20)
    params = SamplingParams(max_tokens=1, temperature=0, stop=[])
    request = SampleRequest(ModelInput.from_ints(prompt), 1, params, prompt_logprobs=True)
    (answer,) = [pair[1] for finished in engine.sample("base", [request]) for pair in finished]
    table = model(torch.tensor(prompt)[None]).logits[0].log_softmax(-1).detach()
    expected = table[range(19), prompt[1:]].numpy()
    assert np.abs(answer.prompt_logprobs_np[1:] - expected).max() < 1e-4


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    write_model(small_config("bert"), tmp_path)
    with pytest.raises(LocalServerError, match=r"BertLMHeadModel.*it is an encoder") as caught:
        TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    assert "causal language model" in str(caught.value.hint)


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2)
    write_model(config, tmp_path)
    with pytest.raises(LocalServerError, match="recurrent state"):
        TorchEngine.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP library")
@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_torch_waits_passively_by_default(policy: Any) -> None:
    script = (
        "import tinkex.local.engines.torch_engine, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY",)}
    environment["PYTHONPATH"] = str(Path(builtin_models.__file__).parents[4])
    environment["OMP_DISPLAY_ENV"] = "TRUE"  # makes the OpenMP library print its settings
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert found.stdout.strip() == str(policy)  # nothing is left for child processes
    assert f"OMP_WAIT_POLICY = '{policy or 'PASSIVE'}'" in found.stderr

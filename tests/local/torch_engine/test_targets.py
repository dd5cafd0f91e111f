"""An adapter changes each layer of the requested kinds that text passes through, and no other."""

from __future__ import annotations

import copy
import importlib
import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Set

import numpy as np
import peft
import pytest
import torch
import transformers
from local.torch_engine.reference import give_random_delta, make_data, relative_error
from local.torch_engine.test_architectures import COMMON, write_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tinkex.local.engines.torch_engine import TorchEngine, adapter_config, adapter_files
from tinkex.local.engines.torch_engine.targets import Chosen, kind_of, shorten
from tinkex.types import AdamParams, LoraConfig, ModelInput, SampleRequest, SamplingParams

RANK = 4
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **COMMON,
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# Chosen for their peculiarities: latent attention, dense and shared MLPs beside the experts; a
# shared expert with its own gate; an attention projection called gate_proj; experts of attention; a
# vision tower with layers of the same names; transposed weights; a fused projection; layers named
# as in BERT.
FAMILIES: Dict[str, Any] = {
    "deepseek-v3": lambda: transformers.DeepseekV3Config(**DEEPSEEK),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "afmoe": lambda: transformers.AfmoeConfig(
        **COMMON, **EXPERTS, num_experts=4, num_dense_layers=1, num_shared_experts=1, head_dim=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, kv_channels=8
    ),
    "gemma3-vision": lambda: transformers.Gemma3Config(
        text_config={**COMMON, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=257,
        eoi_token_index=258,
        image_token_index=259,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=256
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "bert-decoder": lambda: transformers.BertConfig(**COMMON, is_decoder=True),
}

# Layers that text passes through but that are neither attention nor MLP, and expert routers.
NOT_ADAPTED = {
    # Before transformers 5 the routers of these two were linear layers.
    "mixtral": {"model.layers.*.block_sparse_moe.gate.weight"},
    "qwen2-moe": {
        "model.layers.*.mlp.shared_expert_gate.weight",
        "model.layers.*.mlp.gate.weight",
    },
    "afmoe": {"model.layers.*.mlp.router.gate.weight"},
    "jetmoe": {
        "model.layers.*.mlp.router.layer.weight",
        "model.layers.*.self_attention.experts.router.layer.weight",
    },
    "bert-decoder": {"cls.predictions.transform.dense.weight"},
}


def starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def weights_that_text_trains(model: Any) -> Set[str]:
    """Return the weights of linear layers and the expert tensors with a gradient from text."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model = copy.deepcopy(model).requires_grad_(True)
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 256, (2, 60)))
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = set()
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, (torch.nn.Linear, Conv1D)) and part == "weight"
            if (linear or parameter.dim() == 3) and parameter.grad is not None:
                found.add(starred(f"{name}.{part}"))
    assert not tied or any("lm_head" in name or "decoder" in name for name in found)
    return {name for name in found if "conv" not in name}


@pytest.fixture
def adapts_tensors() -> bool:
    return adapter_config.adapts_tensors()


def write_family(name: str, folder: Path) -> Any:
    try:
        config = FAMILIES[name]()
    except AttributeError:
        pytest.skip(f"this transformers has no {name}")
    return write_model(config, folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_that_text_trains_are_adapted_and_plain_peft_agrees(
    name: str, tmp_path: Path, adapts_tensors: bool
) -> None:
    model = write_family(name, tmp_path / "model")
    engine = TorchEngine.from_pretrained(str(tmp_path / "model"), device="cpu")
    lora = LoraConfig(rank=RANK, seed=1)
    expected = weights_that_text_trains(model) - NOT_ADAPTED.get(name, set())
    linear = {starred(f"{n}.weight") for n in engine._pool.targets.layers}
    if not adapts_tensors:
        expected &= linear
    found = {n + ".weight" if n + ".weight" in linear else n for n in engine.adapted(lora)}
    assert found == expected

    engine.create("m", lora)
    give_random_delta(engine, "m", tmp_path / "delta")
    (datum,) = make_data([60])
    output = engine.forward_backward("m", [datum], "cross_entropy", {})
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    # An expert that is a separate module gets a gradient only if it was chosen.
    gradients = {
        name: parameter.grad
        for name, parameter in engine._runs["m"].adapter.parameters.items()
        if not re.search(r"experts\.\d+\.", name)
    }
    assert all(g is not None and bool(g.any()) for g in gradients.values())

    engine.save("m", tmp_path / "saved", with_optimizer=False)
    engine.create_sampler("s", tmp_path / "saved")
    tokens = [*datum.model_input.to_ints(), 5]
    params = SamplingParams(max_tokens=1, stop=[])
    request = SampleRequest(ModelInput.from_ints(tokens), 1, params, prompt_logprobs=True)
    answers = dict(pair for finished in engine.sample("s", [request]) for pair in finished)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(base.eval(), str(tmp_path / "saved")).eval()
        table = plain(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    assert relative_error(logprobs, table[range(60), targets]) < 1e-5
    following = table[range(60), tokens[1:]]
    assert relative_error(answers[0].prompt_logprobs_np[1:], following) < 1e-5
    assert adapter_files.read_lora(tmp_path / "saved", engine._pool.targets) == lora
    (tmp_path / "saved" / "tinkex_lora.json").unlink()  # as other tools write it
    mlp = adapts_tensors or "mlp" in engine._pool.targets.layers.values()
    assert engine.lora_config(tmp_path / "saved") == LoraConfig(rank=RANK, train_mlp=mlp)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["attn", "mlp"])
@pytest.mark.parametrize("name", ["deepseek-v3", "afmoe"])
def test_one_kind_alone_is_adapted_and_plain_peft_agrees(
    name: str, kind: str, tmp_path: Path
) -> None:
    write_family(name, tmp_path / "model")
    engine = TorchEngine.from_pretrained(str(tmp_path / "model"), device="cpu")
    only = LoraConfig(
        rank=RANK, train_attn=kind == "attn", train_mlp=kind == "mlp", train_unembed=False
    )
    part = {"attn": ".self_attn.", "mlp": ".mlp."}[kind]
    assert all(part in name for name in engine.adapted(only))
    engine.create("all", LoraConfig(rank=2))  # another adapter on some of the same layers
    engine.create("m", only)
    give_random_delta(engine, "m", tmp_path / "delta")
    engine.save("m", tmp_path / "saved", with_optimizer=False)
    (datum,) = make_data([40])
    output = engine.forward_backward("m", [datum], "cross_entropy", {}, forward_only=True)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(base.eval(), str(tmp_path / "saved")).eval()
        ids = torch.tensor([datum.model_input.to_ints()])
        table = plain(input_ids=ids).logits[0].log_softmax(-1)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert relative_error(logprobs, table[range(40), targets]) < 1e-5


def test_the_names_that_peft_rewrites_are_known() -> None:
    # Relies on peft's table of the names that it rewrites in target_modules (0.19 and later).
    try:
        conversion = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:
        pytest.skip("this peft or transformers rewrites nothing")
    tables = conversion._MOE_TARGET_MODULE_MAPPING.values()
    assert {name for table in tables for name in table} <= set(adapter_config._TAKEN_FOR_EXPERTS)


def test_the_run_reports_what_it_adapts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, adapts_tensors: bool
) -> None:
    write_family("deepseek-v3", tmp_path)
    engine = TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    lora = LoraConfig(rank=RANK, train_attn=False)
    caplog.set_level(logging.INFO)
    engine.create("run-1", lora)
    counts = engine.adapted(lora)
    assert counts["lm_head"] == 1
    assert counts["model.layers.*.mlp.gate_proj"] == 1
    assert counts["model.layers.*.mlp.shared_experts.down_proj"] == 1
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("run-1: ")]
    assert "an adapter of rank 4 on " in line
    assert "model.layers.*.mlp.shared_experts.down_proj (1)" in line
    in_tensors = any("expert" in name for name in engine._pool.targets.tensors)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == (in_tensors and not adapts_tensors), warned
    engine.close()
    assert engine.adapted(lora) == {}


def test_experts_that_peft_cannot_adapt_are_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tinkex.local.engines.torch_engine.adapters.adapts_tensors", lambda: False)
    write_family("deepseek-v3", tmp_path / "model")
    engine = TorchEngine.from_pretrained(str(tmp_path / "model"), device="cpu")
    if not engine._pool.targets.tensors:
        pytest.skip("this transformers holds experts as layers")
    engine.create("m", LoraConfig(rank=RANK, seed=1))
    (warned,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "2 tensors that hold the experts are not adapted" in warned
    assert "peft 0.20" in warned
    counts = engine.adapted(LoraConfig(rank=RANK))
    assert "model.layers.*.mlp.shared_experts.gate_proj" in counts
    assert not any(".experts." in name for name in counts)
    engine.save("m", tmp_path / "saved", with_optimizer=False)
    engine.create_sampler("s", tmp_path / "saved")


def test_a_checkpoint_in_an_earlier_layout_can_be_sampled_from_and_resumed(tmp_path: Path) -> None:
    write_family("gemma3-vision", tmp_path / "model")
    engine = TorchEngine.from_pretrained(str(tmp_path / "model"), device="cpu")
    lora = LoraConfig(rank=RANK, seed=1)
    config = engine._pool.make_config(lora)
    config.target_modules = {"q_proj", "k_proj", "fc1", "down_proj", "lm_head"}  # vision, too
    adapter = engine._pool.add(config, seed=3)
    assert any("vision" in name for name in adapter.parameters)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            if "lora_B" in name:
                parameter.fill_(0.01)
    (tmp_path / "old").mkdir()
    adapter_files.write_adapter(adapter, lora, tmp_path / "old")
    engine.create_sampler("s", tmp_path / "old")
    (datum,) = make_data([20])
    engine.create("fresh", lora)
    engine.create("m", lora)
    engine.load("m", tmp_path / "old", with_optimizer=False)
    assert engine._runs["m"].adapter.parameters.keys() == adapter.parameters.keys()
    losses = []
    for _ in range(2):
        output = engine.forward_backward("m", [datum], "cross_entropy", {})
        losses.append(output.metrics["loss:sum"])
        engine.optim_step("m", AdamParams(learning_rate=1e-2))
    fresh = engine.forward_backward("fresh", [datum], "cross_entropy", {}, forward_only=True)
    assert losses[0] != pytest.approx(fresh.metrics["loss:sum"], rel=1e-4)
    assert losses[1] < losses[0]
    engine.save("m", tmp_path / "again", with_optimizer=True)
    engine.load("m", tmp_path / "again", with_optimizer=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets", [r"model\.layers\.1\..*_proj", "all-linear", ["1.self_attn.q_proj"]]
)
def test_an_adapter_made_with_peft_can_be_sampled_from(
    targets: Any, engine: Any, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(engine.info.tokenizer_id, dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    config.init_lora_weights = False
    plain = peft.get_peft_model(base.eval(), config).eval()
    plain.save_pretrained(tmp_path)
    engine.create("other", LoraConfig(rank=RANK))
    engine.create_sampler("s", tmp_path)
    tokens = list(range(30, 60))
    params = SamplingParams(max_tokens=1, stop=[])
    request = SampleRequest(ModelInput.from_ints(tokens), 1, params, prompt_logprobs=True)
    answers = dict(pair for finished in engine.sample("s", [request]) for pair in finished)
    with torch.no_grad():
        table = plain(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert relative_error(answers[0].prompt_logprobs_np[1:], table[range(29), tokens[1:]]) < 1e-5
    kinds = engine.lora_config(tmp_path)
    assert kinds == LoraConfig(
        rank=2, train_attn=True, train_mlp=isinstance(targets, str), train_unembed=False
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attn"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "attn"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "attn"),
        ("model.layers.0.self_attn.gate_proj", "attn"),
        ("transformer.h.0.attn.c_attn", "attn"),
        ("bert.encoder.layer.0.attention.output.dense", "attn"),
        ("model.layers.0.self_attention.experts.input_linear", "attn"),
        ("model.layers.0.mixer.q_proj", "attn"),
        ("model.layers.0.mlp.experts.3.gate_proj", "mlp"),
        ("model.layers.0.mlp.shared_experts.up_proj", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.0.w1", "mlp"),
        ("model.layers.0.shared_mlp.input_linear", "mlp"),
        ("bert.encoder.layer.0.intermediate.dense", "mlp"),
        ("bert.encoder.layer.0.output.dense", "mlp"),
        ("model.decoder.layers.0.fc1", "mlp"),
        ("model.layers.0.mlp.gate", None),
        ("model.layers.0.mlp.gate.down_proj", None),
        ("model.layers.0.mlp.router.classifier", None),
        ("model.layers.0.mlp.shared_expert_gate", None),
        ("model.layers.0.self_attn.indexer.wq_b", None),
        ("model.layers.0.per_layer_input_gate", None),
        ("model.project_in", None),
    ],
)
def test_the_name_of_a_layer_decides_its_kind(name: str, kind: Any) -> None:
    assert kind_of(name) == kind


def test_names_are_shortened_only_where_that_is_unambiguous() -> None:
    linear = [f"h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp")]
    attention = [name for name in linear if "attn" in name]
    assert shorten(attention, linear) == ["attn.c_proj"]
    assert shorten(linear, linear) == ["c_proj"]
    assert shorten(["h.0.attn.c_proj"], linear) == ["0.attn.c_proj"]
    assert shorten(["lm_head"], ["lm_head", "tower.lm_head"]) == ["lm_head"]


def test_counts_replace_numbers_by_a_star() -> None:
    layers: List[str] = [f"model.layers.{i}.mlp.up_proj" for i in range(11)]
    chosen = Chosen([*layers, "lm_head"], ["model.layers.3.mlp.experts.down_proj"])
    assert chosen.counts() == {
        "model.layers.*.mlp.up_proj": 11,
        "lm_head": 1,
        "model.layers.*.mlp.experts.down_proj": 1,
    }

"""Several adapters over one base: seeds, targets, independence, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import peft
import pytest
import torch
from local.torch_engine.reference import Reference, give_random_delta, make_data, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.types import AdamParams, LoraConfig

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=5.0)


def weights_of(engine: Any, model_id: str, folder: Path) -> Dict[str, torch.Tensor]:
    engine.save(model_id, folder, with_optimizer=False)
    tensors: Dict[str, torch.Tensor] = load_file(str(folder / "adapter_model.safetensors"))
    return tensors


def train(engine: Any, model_id: str, steps: range) -> None:
    for step in steps:
        data = make_data([40, 25, 9], seed=step, weights=(0.0, 1.0))
        engine.forward_backward(model_id, data, "cross_entropy", {})
        engine.optim_step(model_id, ADAM)


def same(one: Dict[str, torch.Tensor], other: Dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides_it(
    engine: Any, tmp_path: Path
) -> None:
    for model_id, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None), ("e", None)):
        engine.create(model_id, LoraConfig(rank=4, seed=seed))
    found = {model_id: weights_of(engine, model_id, tmp_path / model_id) for model_id in "abcde"}
    assert same(found["a"], found["b"])
    for one, other in ("ac", "ad", "de"):
        assert not same(found[one], found[other])
    (datum,) = make_data([50])
    output = engine.forward_backward("a", [datum], "cross_entropy", {}, forward_only=True)
    base = Reference(engine.info.tokenizer_id).logprobs(datum, {}, 4).numpy()
    assert relative_error(output.loss_fn_outputs[0]["logprobs"].to_numpy(), base) < 1e-5


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False, "train_unembed": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
    ],
)
def test_the_configuration_chooses_the_trained_layers(
    flags: Dict[str, bool], modules: set, engine: Any, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=3, seed=0, **flags)
    engine.create("m", lora)
    train(engine, "m", range(1))
    weights = weights_of(engine, "m", tmp_path)
    assert {name.split(".")[-3] for name in weights} == modules
    assert all(3 in tensor.shape for tensor in weights.values())
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    assert engine.lora_config(tmp_path) == lora
    # As other tools write it: without our file, the flags follow from the modules.
    (tmp_path / "tinkex_lora.json").unlink()
    assert engine.lora_config(tmp_path) == LoraConfig(rank=3, **flags)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_leaves_the_base_model_unchanged(
    tied: bool, cache: Path, tied_folder: Path, tmp_path: Path
) -> None:
    model = str(tied_folder) if tied else "tiny-random"
    engine = TorchEngine.from_pretrained(model, device="cpu", cache_dir=cache)
    engine.create("fresh", LoraConfig(rank=4, seed=1))
    data = make_data([64])
    before = engine.forward_backward("fresh", data, "cross_entropy", {}, forward_only=True)
    engine.create("m", LoraConfig(rank=4, seed=1))
    train(engine, "m", range(3))
    after = engine.forward_backward("fresh", data, "cross_entropy", {}, forward_only=True)
    assert after == before
    trained = engine.forward_backward("m", data, "cross_entropy", {}, forward_only=True)
    assert trained.metrics["loss:sum"] != pytest.approx(before.metrics["loss:sum"], rel=1e-2)


def test_interleaved_runs_have_the_results_of_separate_ones(engine: Any, tmp_path: Path) -> None:
    configs = {
        "a": LoraConfig(rank=4, seed=1),
        "b": LoraConfig(rank=2, seed=2, train_unembed=False),
    }
    for model_id, lora in configs.items():
        engine.create(model_id, lora)
    for step in range(3):
        for model_id in configs:
            train(engine, model_id, range(step, step + 1))
    together = {model_id: weights_of(engine, model_id, tmp_path / model_id) for model_id in "ab"}
    for model_id, lora in configs.items():
        engine.unload(model_id)
        engine.create("alone", lora)
        train(engine, "alone", range(3))
        assert same(weights_of(engine, "alone", tmp_path / "alone"), together[model_id])
        engine.unload("alone")


def test_a_run_resumed_with_its_optimizer_continues_bit_for_bit(
    cache: Path, tmp_path: Path
) -> None:
    def fresh() -> Any:
        return TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)

    lora = LoraConfig(rank=4, seed=5)
    straight = fresh()
    straight.create("m", lora)
    train(straight, "m", range(3))
    straight.save("m", tmp_path / "half", with_optimizer=True)
    train(straight, "m", range(3, 7))

    resumed = fresh()
    resumed.create("elsewhere", LoraConfig(rank=4, seed=99))
    resumed.load("elsewhere", tmp_path / "half", with_optimizer=True)
    train(resumed, "elsewhere", range(3, 7))
    expected = weights_of(straight, "m", tmp_path / "a")
    assert same(weights_of(resumed, "elsewhere", tmp_path / "b"), expected)

    without = fresh()
    without.create("m", lora)
    without.load("m", tmp_path / "half", with_optimizer=False)
    train(without, "m", range(3, 7))
    assert not same(weights_of(without, "m", tmp_path / "c"), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
def test_peft_loads_a_checkpoint(run: Any, tmp_path: Path) -> None:
    give_random_delta(run, "m", tmp_path / "delta")
    run.save("m", tmp_path / "saved", with_optimizer=True)
    (datum,) = make_data([30])
    output = run.forward_backward("m", [datum], "cross_entropy", {}, forward_only=True)
    base = AutoModelForCausalLM.from_pretrained(run.info.tokenizer_id, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    ids = torch.tensor(datum.model_input.to_numpy().astype("int64"))[None]
    targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].to_numpy())
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)[range(30), targets]
    assert relative_error(output.loss_fn_outputs[0]["logprobs"].to_numpy(), logprobs) < 1e-5


def test_loading_drops_the_accumulated_gradient(run: Any, tmp_path: Path) -> None:
    run.save("m", tmp_path, with_optimizer=False)
    run.forward_backward("m", make_data([20]), "cross_entropy", {})
    run.load("m", tmp_path, with_optimizer=False)
    assert run.optim_step("m", AdamParams())["grad_norm"] == 0.0


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraConfig(rank=8, seed=1), "rank"),
        (LoraConfig(rank=4, seed=1, train_mlp=False), "train_mlp"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    lora: LoraConfig, words: str, run: Any, tmp_path: Path
) -> None:
    run.create("other", lora)
    run.save("other", tmp_path / "other", with_optimizer=True)
    before = weights_of(run, "m", tmp_path / "before")
    with pytest.raises(EngineError, match=words) as caught:
        run.load("m", tmp_path / "other", with_optimizer=True)
    assert caught.value.category == "user"
    assert same(weights_of(run, "m", tmp_path / "after"), before)


def test_a_damaged_checkpoint_or_one_without_optimizer_state_is_refused(
    run: Any, tmp_path: Path
) -> None:
    run.save("m", tmp_path, with_optimizer=False)
    with pytest.raises(EngineError, match="without optimizer state"):
        run.load("m", tmp_path, with_optimizer=True)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EngineError, match="cannot be read"):
        run.load("m", tmp_path, with_optimizer=False)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(EngineError, match="no adapter that can be read"):
        run.load("m", tmp_path, with_optimizer=False)
    with pytest.raises(EngineError, match=r"holds no adapter \(no adapter_config.json\)"):
        run.create_sampler("s", tmp_path / "nowhere")


def test_an_adapter_of_another_architecture_is_refused(run: Any, tmp_path: Path) -> None:
    run.save("m", tmp_path, with_optimizer=False)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = ["c_attn"]
    file.write_text(json.dumps(config))
    with pytest.raises(EngineError):
        run.create_sampler("s", tmp_path)
    run.create_sampler("s", None)
    train(run, "m", range(1))


def test_unloading_frees_the_parameters(engine: Any) -> None:
    def count() -> int:
        return sum(p.numel() for p in engine._network.model.parameters())

    bare = count()
    engine.create("a", LoraConfig(rank=4, seed=1))
    one = count()
    engine.create("b", LoraConfig(rank=4, seed=1))
    assert count() - one == one - bare > 0
    engine.unload("a")
    engine.unload("a")
    assert count() == one
    engine.unload("b")
    assert count() == bare
    engine.create("c", LoraConfig(rank=4, seed=1))
    train(engine, "c", range(1))
    with pytest.raises(EngineError, match="no model a"):
        train(engine, "a", range(1))


def test_the_global_random_state_is_not_changed(engine: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine.create("a", LoraConfig(rank=4))
    assert torch.equal(torch.rand(4), expected)


def test_a_checkpoint_with_unknown_weights_is_refused(run: Any, tmp_path: Path) -> None:
    weights = weights_of(run, "m", tmp_path)
    weights["base_model.model.extra.lora_A.weight"] = torch.zeros(4, 4)
    save_file(weights, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(EngineError, match="extra"):
        run.load("m", tmp_path, with_optimizer=False)

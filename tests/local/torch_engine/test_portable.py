"""Adapters merged into their base model compute what was trained, even on tied models."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
from local.torch_engine.reference import give_random_delta, logprobs_of, make_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tinkex.errors import InvalidInputError, LocalServerError
from tinkex.export import export_model
from tinkex.local import merge_adapter
from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.types import LoraConfig

(DATUM,) = make_data([40])


def trained(engine: Any, folder: Path, lora: LoraConfig) -> np.ndarray:
    """Train an adapter into *folder*; return its log-probabilities."""
    engine.create("m", lora)
    give_random_delta(engine, "m", folder)
    output = engine.forward_backward("m", [DATUM], "cross_entropy", {}, forward_only=True)
    found: np.ndarray = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    return found


def tokenizer_class(folder: Path) -> str:
    """Set the tokenizer class that both transformers 4 and 5 know, whichever wrote the folder."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return str(settings["tokenizer_class"])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, cache: Path, tied_folder: Path) -> str:
    """A model in a folder."""
    if request.param:
        return str(tied_folder)
    engine = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)
    assert tokenizer_class(Path(engine.info.tokenizer_id)) == "PreTrainedTokenizerFast"
    return str(engine.info.tokenizer_id)


@pytest.mark.parametrize("how", ["save", "export"])
def test_a_merged_model_computes_what_was_trained(base: str, tmp_path: Path, how: str) -> None:
    engine = TorchEngine.from_pretrained(base, device="cpu")
    expected = trained(engine, tmp_path / "adapter", LoraConfig(rank=4, seed=1))
    folder = tmp_path / "adapter"
    if how == "export":
        folder = tmp_path / "exported"
        engine.export("m", folder)
    merged = merge_adapter(folder, tmp_path / "new" / "merged")
    assert tokenizer_class(merged) == "PreTrainedTokenizerFast"
    model = AutoModelForCausalLM.from_pretrained(str(merged))
    assert np.abs(logprobs_of(DATUM, model) - expected).max() < 1e-4
    assert not json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    again = TorchEngine.from_pretrained(str(merged), device="cpu")
    again.create("fresh", LoraConfig(rank=4, seed=1))
    output = again.forward_backward("fresh", [DATUM], "cross_entropy", {}, forward_only=True)
    found = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_a_tied_model_stays_tied_if_its_output_layer_was_not_trained(
    tied_folder: Path, tmp_path: Path
) -> None:
    engine = TorchEngine.from_pretrained(str(tied_folder), device="cpu")
    lora = LoraConfig(rank=4, seed=1, train_unembed=False)
    expected = trained(engine, tmp_path / "adapter", lora)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(str(merged))
    assert np.abs(logprobs_of(DATUM, model) - expected).max() < 1e-4
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_note_with_an_adapter_on_a_tied_output_layer_explains_merging(
    tied_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tinkex")
    engine = TorchEngine.from_pretrained(str(tied_folder), device="cpu")
    expected = trained(engine, tmp_path / "adapter", LoraConfig(rank=4, seed=1))
    assert "tie_word_embeddings" in caplog.text
    note = (tmp_path / "adapter" / "MERGING.md").read_text()
    with_tinkex, by_hand = re.findall(r"```python\n(.*?)```", note, re.DOTALL)
    from peft import PeftModel

    names: Dict[str, Any] = {
        "torch": torch,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "PeftModel": PeftModel,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warnings about transformers and about tied weights
        exec(by_hand.replace("path/of/this/folder", str(tmp_path / "adapter")), names)
    assert np.abs(logprobs_of(DATUM, names["model"]) - expected).max() < 1e-4
    code = with_tinkex.replace("path/of/this/folder", str(tmp_path / "adapter"))
    exec(code.replace("path/of/the/merged/model", str(tmp_path / "merged")), names)
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("unembed", [False, True])
def test_an_adapter_that_merges_as_usual_has_no_note(
    cache: Path, tied_folder: Path, tmp_path: Path, unembed: bool
) -> None:
    model = "tiny-random" if unembed else str(tied_folder)
    engine = TorchEngine.from_pretrained(model, device="cpu", cache_dir=cache)
    engine.create("m", LoraConfig(rank=4, train_unembed=unembed))
    engine.save("m", tmp_path, with_optimizer=True)
    assert not (tmp_path / "MERGING.md").exists()


def test_peft_reads_an_export_that_does_not_train_the_output_layer(
    cache: Path, tmp_path: Path
) -> None:
    engine = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)
    engine.create("m", LoraConfig(rank=4, train_unembed=False))
    engine.export("m", tmp_path)
    names = set(load_file(str(tmp_path / "adapter_model.safetensors")))
    assert not any("unembed_tokens" in name or "lm_head" in name for name in names)
    assert not (tmp_path / "MERGING.md").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_names_the_output_layer_as_the_hosted_service_does(
    tied: bool, cache: Path, tied_folder: Path, tmp_path: Path
) -> None:
    model = str(tied_folder) if tied else "tiny-random"
    engine = TorchEngine.from_pretrained(model, device="cpu", cache_dir=cache)
    expected = trained(engine, tmp_path / "adapter", LoraConfig(rank=4, seed=1))
    engine.export("m", tmp_path / "out")
    names = set(load_file(str(tmp_path / "out" / "adapter_model.safetensors")))
    assert "base_model.model.model.unembed_tokens.lora_A.weight" in names
    assert not any("lm_head" in name for name in names)
    note = (tmp_path / "out" / "MERGING.md").read_text()
    assert "unembed_tokens" in note
    assert ("tie_word_embeddings" in note) is tied
    engine.create("again", LoraConfig(rank=4))
    engine.load("again", tmp_path / "out", with_optimizer=False)
    output = engine.forward_backward("again", [DATUM], "cross_entropy", {}, forward_only=True)
    assert np.array_equal(output.loss_fn_outputs[0]["logprobs"].to_numpy(), expected)


def test_an_adapter_that_cannot_be_merged_is_refused(
    cache: Path, tied_folder: Path, tmp_path: Path
) -> None:
    engine = TorchEngine.from_pretrained(str(tied_folder), device="cpu")
    engine.create("m", LoraConfig(rank=4))
    engine.save("m", tmp_path / "adapter", with_optimizer=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="exists already"):
        merge_adapter(tmp_path / "adapter", tmp_path / "mine")
    with pytest.raises(InvalidInputError, match="holds no adapter"):
        merge_adapter(tmp_path / "mine", tmp_path / "out")
    with pytest.raises(LocalServerError):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base_model=str(tmp_path / "mine"))
    with pytest.raises(InvalidInputError, match="dtype is 'float17'"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", dtype="float17")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    # Copies, because old releases map the file, which is rewritten below.
    tensors = {name: tensor.clone() for name, tensor in load_file(str(file)).items()}
    save_file({name: torch.zeros(3, 3) for name in tensors}, str(file))
    with pytest.raises(
        InvalidInputError, match=r"size mismatch .* \(\d\d more like this\)$"
    ) as misfit:
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert "\n" not in str(misfit.value)
    dropped = sorted(tensors)[0]
    tensors["base_model.model.other.lora_A.weight"] = tensors.pop(dropped)
    save_file(tensors, str(file))
    with pytest.raises(InvalidInputError, match=r"other.*lacks weights"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInputError, match=r"adapter_model\.safetensors cannot be read"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["half the weights", "code of its own"])
def test_a_base_model_that_cannot_be_loaded_is_refused_with_a_hint(
    damage: str, cache: Path, tied_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(prompt: str = "") -> str:
        pytest.fail(f"asked on the terminal: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    engine = TorchEngine.from_pretrained(str(tied_folder), device="cpu")
    engine.create("m", LoraConfig(rank=4))
    engine.save("m", tmp_path / "adapter", with_optimizer=False)
    base = shutil.copytree(tied_folder, tmp_path / "base")
    if damage == "half the weights":
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        hint = "complete weights"
    else:
        code = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
        (base / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
        hint = "no code of its own"
    with pytest.raises(LocalServerError, match="cannot load the model") as caught:
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base_model=str(base))
    assert hint in str(caught.value.hint)
    with pytest.raises(LocalServerError, match="cannot load the model") as caught:
        export_model(
            tmp_path / "adapter",
            tmp_path / "out",
            merge=damage == "half the weights",  # without merging, weights are not read
            base_model=str(base),
        )
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "out").exists()

"""Exports can be loaded with PEFT and transformers, and compute what was trained."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from local.torch_engine.reference import give_random_delta, logprobs_of, make_data
from support.programs import tinkex
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinkex import AdamParams, ServiceClient
from tinkex.errors import (
    InvalidInputError,
    LocalServerError,
    NotFoundError,
    RunFolderError,
    TinkexError,
)
from tinkex.export import export_model
from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.types import LoraConfig

(DATUM,) = make_data([40])


def load_adapter(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about tied weights
        return AutoPeftModelForCausalLM.from_pretrained(str(folder))


@pytest.fixture(params=["tiny-random", "tied"])
def base(request: pytest.FixtureRequest, cache: Path, tied_folder: Path) -> str:
    return "tiny-random" if request.param == "tiny-random" else str(tied_folder)


@pytest.fixture
def adapter(base: str, cache: Path, tmp_path: Path) -> Path:
    """A trained adapter in the form of a download; expected.npy holds its log-probabilities."""
    engine = TorchEngine.from_pretrained(base, device="cpu", cache_dir=cache)
    engine.create("m", LoraConfig(rank=4, seed=1))
    folder = tmp_path / "adapter"
    give_random_delta(engine, "m", folder)
    output = engine.forward_backward("m", [DATUM], "cross_entropy", {}, forward_only=True)
    np.save(folder / "expected.npy", output.loss_fn_outputs[0]["logprobs"].to_numpy())
    engine.export("m", tmp_path / "exported")
    return folder


def expected(adapter: Path) -> np.ndarray:
    found: np.ndarray = np.load(adapter / "expected.npy")
    return found


def test_a_download_names_a_base_model_that_transformers_can_load(
    adapter: Path, base: str, cache: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    folder = Path(config["base_model_name_or_path"])
    assert folder.is_absolute()
    assert (folder / "config.json").is_file()
    assert np.abs(logprobs_of(DATUM, load_adapter(adapter)) - expected(adapter)).max() < 1e-4


@pytest.mark.parametrize("made_by", ["adapter", "exported"])
def test_an_exported_adapter_loads_unchanged(adapter: Path, made_by: str, tmp_path: Path) -> None:
    dest = export_model(tmp_path / made_by, tmp_path / "new" / "out")
    assert dest == tmp_path / "new" / "out"
    assert [path.name for path in dest.parent.iterdir()] == ["out"]
    assert np.abs(logprobs_of(DATUM, load_adapter(dest)) - expected(adapter)).max() < 1e-4
    assert AutoTokenizer.from_pretrained(str(dest)).decode([5]) is not None
    tied = (
        "tied" in json.loads((dest / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert (dest / "MERGING.md").exists() is tied
    assert not (dest / "expected.npy").exists()


@pytest.mark.parametrize("made_by", ["adapter", "exported"])
def test_a_merged_model_loads_without_peft_and_computes_the_same(
    adapter: Path, made_by: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is no obstacle
    dest = export_model(tmp_path / made_by, tmp_path / "out", merge=True)
    assert not (dest / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(str(dest))
    assert np.abs(logprobs_of(DATUM, model) - expected(adapter)).max() < 1e-4
    assert AutoTokenizer.from_pretrained(str(dest)) is not None


def test_an_adapter_with_an_alias_as_base_model_gets_the_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKEX_CACHE", str(cache))
    engine = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)
    engine.create("m", LoraConfig(rank=4))
    engine.save("m", tmp_path / "adapter", with_optimizer=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    facts = json.loads(config.read_text())
    # Earlier versions wrote the alias, and another machine keeps its models elsewhere.
    for name in ["tiny-random", "/home/someone/.cache/tinkex/models/tiny-random-2"]:
        config.write_text(json.dumps({**facts, "base_model_name_or_path": name}))
        dest = export_model(tmp_path / "adapter", tmp_path / name.rpartition("/")[2])
        found = json.loads((dest / "adapter_config.json").read_text())
        assert found["base_model_name_or_path"] == str(cache / "tiny-random-2")


@pytest.fixture
def small(cache: Path, tmp_path: Path) -> Path:
    engine = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)
    engine.create("m", LoraConfig(rank=4))
    engine.save("m", tmp_path / "adapter", with_optimizer=True)
    return tmp_path / "adapter"


def test_an_existing_destination_is_not_touched(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for dest in [tmp_path / "mine", tmp_path / "mine" / "thesis.txt"]:
        with pytest.raises(InvalidInputError, match=r"\n  Choose another folder\.$"):
            export_model(small, dest)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_invalid_source_is_refused_with_the_valid_kinds(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"neither a run \(journal.jsonl\) nor an adapter"):
        export_model(tmp_path, tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"is neither a tinker:// path nor a folder"):
        export_model(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(LocalServerError):
        export_model(small, tmp_path / "out", base_model=str(tmp_path))
    (small / "adapter_model.safetensors").write_bytes(b"damaged")
    for merge in [False, True]:
        with pytest.raises(InvalidInputError, match=r"adapter_model\.safetensors cannot be read"):
            export_model(small, tmp_path / "out", merge=merge)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    small: Path, tmp_path: Path, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def full(*arguments: Any, **options: Any) -> None:
        Path(arguments[1]).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda *arguments, **options: full(None, tmp_path / "x")
    )
    with pytest.raises(TinkexError, match=r"cannot write .*out: No space left on device") as caught:
        export_model(small, tmp_path / "out", merge=merge)
    assert "Nothing was left behind." in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with its own embedded server, as `tinkex train` leaves it."""
    folder = tmp_path_factory.mktemp("run") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKEX_CACHE", str(cache))
        with ServiceClient.local("tiny-random", data_dir=str(folder / "server")) as service:
            config = {"server": "embedded"}
            with service.open_run(folder, "tiny-random", rank=4, config=config) as run:
                for step in run.steps([[DATUM]] * 2):
                    run.trainer.train_step(
                        step.batch, "cross_entropy", AdamParams(learning_rate=0.02)
                    )
        yield folder


def test_a_run_folder_is_exported_with_its_own_server(trained: Path, tmp_path: Path) -> None:
    merged = export_model(trained, tmp_path / "merged", merge=True)
    adapter = export_model(trained, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(str(merged))
    expected = logprobs_of(DATUM, load_adapter(adapter))
    assert np.allclose(logprobs_of(DATUM, model), expected, rtol=1e-5, atol=1e-4)


def test_the_command_exports_a_run_folder(trained: Path, tmp_path: Path) -> None:
    code, out, err = tinkex("export", str(trained), "--to", str(tmp_path / "out"), "-f", "json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["kind"] == "adapter"
    assert facts["destination"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_run_without_a_checkpoint_is_an_error(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    lines = (trained / "journal.jsonl").read_text().splitlines(keepends=True)
    (folder / "journal.jsonl").write_text("".join(line for line in lines if '"config"' in line))
    with pytest.raises(RunFolderError, match="the run has no checkpoint yet"):
        export_model(folder, tmp_path / "out")


def test_a_missing_checkpoint_is_an_error(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "server" / "checkpoints", ignore_errors=True)
    with pytest.raises(NotFoundError, match="It was deleted, or has expired"):
        export_model(folder, tmp_path / "out")

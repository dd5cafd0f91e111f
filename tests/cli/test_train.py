"""``tinkex train`` and ``tinkex chat FOLDER``, from a file to an answer, with the tiny model."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List
from unittest import mock

import pytest
from support.programs import Done, serving, tinkex

import tinkex as library
from tinkex import loggers, recipes
from tinkex.cli.output import count
from tinkex.cli.training_progress import TrainingProgress

pytest.importorskip("torch")
pytestmark = pytest.mark.engine

MODEL = "tiny-random"
SHORT = ["--batch-size", "8", "--rank", "4", "--learning-rate", "0.003"]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a cache with the tiny model, made once."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKEX_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


def conversation(index: int) -> Dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{index}+1?"},
            {"role": "assistant", "content": f"{index + 1}."},
        ]
    }


def write(path: Path, records: List[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file of 48 short conversations; 2 are held out, which leaves 6 steps of batch size 8."""
    return write(tmp_path / "chats.jsonl", [conversation(index) for index in range(48)])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on the same file."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    file = write(folder / "chats.jsonl", [conversation(index) for index in range(48)])
    trained(file, folder / "run")
    return folder / "run"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def train(file: Path, out: Path, *options: str, model: str = MODEL) -> Done:
    return tinkex("train", str(file), "--model", model, "--out", str(out), *SHORT, *options)


def trained(file: Path, out: Path, *options: str, model: str = MODEL) -> Dict[str, Any]:
    """Train to the end; return the printed JSON."""
    done = train(file, out, *options, "-f", "json", model=model)
    assert done.returncode == 0, done.stderr
    result: Dict[str, Any] = json.loads(done.stdout)
    return result


def check_silent(done: Done) -> None:
    """Check that *done* succeeded, and printed at most that this machine was busy."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("heartbeats ran ")]
    assert (done.returncode, lines) == (0, [])


def weights_of(out: Path) -> bytes:
    """Return the weights that the run saved for sampling at its end."""
    [folder] = (out / "server" / "checkpoints").glob("*/sampler_weights/*")
    return (folder / "adapter_model.safetensors").read_bytes()


# From a file to a model


def test_a_newcomer_gets_from_a_file_to_a_chat(chats: Path, out: Path) -> None:
    done = train(chats, out)
    check_silent(done)
    assert f"tinkex chat {out}" in done.stdout
    assert "held-out loss before" in done.stdout
    chat = tinkex("chat", str(out), "--temperature", "0", "--max-tokens", "8", stdin="3+1?\n")
    check_silent(chat)
    assert chat.stdout.endswith("\n")
    # The reply is limited by the context, which is shorter than the option's default.
    assert tinkex("chat", str(out), "--temperature", "0", stdin="3+1?\n").returncode == 0
    refused(
        tinkex("chat", str(out), "--system", "much " * 600, stdin="3+1?\n"),
        "fills the model's context of 512",
        '"/new"',
    )
    options = ["--run", str(out), "--temperature", "0", "--max-tokens", "8", "--chat"]
    assert tinkex("sample", "3+1?", *options).stdout == chat.stdout


def test_chat_uses_the_weights_that_were_trained(tmp_path: Path, out: Path) -> None:
    same = [{"messages": [*conversation(1)["messages"][:1], {"role": "assistant", "content": "A"}]}]
    file = write(tmp_path / "same.jsonl", same * 40)
    trained(file, out, "--learning-rate", "0.02", "--epochs", "4", "--heldout", "0")
    chat = tinkex("chat", str(out), "--temperature", "0", "--max-tokens", "8", stdin="1+1?\n")
    assert chat.stdout == "A\n"


def test_the_folder_has_metrics_with_a_heldout_loss_at_start_and_end(
    chats: Path, out: Path
) -> None:
    result = trained(chats, out, "--eval-every", "2", "--logger", "csv")
    lines = loggers.read_metrics(out)
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 2, 4, 6]
    assert result["steps"] == 6
    assert result["heldout_loss_before"] == lines[0]["heldout_loss"]
    assert result["heldout_loss_after"] == lines[-1]["heldout_loss"] < lines[0]["heldout_loss"]
    assert (out / "metrics.csv").exists()
    config = library.read_run(out).config
    assert (config["server"], config["batch_size"]) == ("embedded", 8)
    assert config["data"].startswith("48 examples, sha256 ")


def test_a_program_can_use_the_server_and_the_weights_of_the_folder(chats: Path, out: Path) -> None:
    path = trained(chats, out)["sampler_path"]
    service, record = recipes.open_service(out)
    with service:
        assert recipes.find_sampler(service, record) == path
        assert record.spec["base_model"] == MODEL


def test_a_run_that_is_finished_is_not_trained_again(chats: Path, out: Path) -> None:
    first = trained(chats, out)
    journal = (out / "journal.jsonl").read_bytes()
    with mock.patch.object(library.ServiceClient, "local", side_effect=AssertionError):
        done = train(chats, out, "-f", "json")
    assert (done.returncode, json.loads(done.stdout)) == (0, first)
    assert done.stderr == f"The run in {out} is finished already.\n"
    assert (out / "journal.jsonl").read_bytes() == journal


def test_a_finished_run_continues_with_more_epochs_if_the_user_accepts(
    chats: Path, out: Path
) -> None:
    trained(chats, out)
    refused = train(chats, out, "--epochs", "2")
    assert refused.returncode == 1
    assert "epochs was 1.0, now 2.0" in refused.stderr
    result = trained(chats, out, "--epochs", "2", "--accept-changes")
    assert result["steps"] == 12
    service, record = recipes.open_service(out)
    with service:
        assert recipes.find_sampler(service, record) == result["sampler_path"]


def test_a_server_may_be_given(chats: Path, out: Path, tmp_path: Path) -> None:
    from tinkex.local.server import load_engine

    with serving(load_engine(MODEL, "cpu"), tmp_path / "server") as server:
        result = trained(chats, out, "--base-url", server.url)
        assert library.read_run(out).config["server"] == server.url
        assert not (out / "server").exists()
        chat = tinkex("chat", str(out), "--max-tokens", "4", stdin="Hello\n")
        check_silent(chat)
        assert all("the client ended it: success" in end for end in server.ends())
    assert result["steps"] == 6


def test_texts_and_completions_are_learnt_too(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": f"Text {i}"} for i in range(16)])
    pairs = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(16)]
    assert trained(texts, tmp_path / "a")["steps"] == 2
    assert trained(write(tmp_path / "pairs.jsonl", pairs), tmp_path / "b")["steps"] == 2


# Interruptions


def interrupting(target: str, after: int = 0) -> Any:
    """Press Ctrl-C at the first call of *target* after *after* calls."""
    module, _, name = target.rpartition(".")
    owner: Any = __import__("pkgutil").resolve_name(module)
    original = getattr(owner, name)
    calls = iter(range(after))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, interrupted)


@pytest.mark.parametrize(
    ("target", "after"),
    [
        ("tinkex.local.load_engine", 0),  # loading the model
        ("tinkex.data.example_datum", 7),  # checking examples
        ("tinkex.clients.service.ServiceClient.open_run", 0),  # creating the run
        ("tinkex.cli.training_progress.TrainingProgress.log", 0),  # training
        ("tinkex.cli.training_progress.TrainingProgress.log", 3),
        ("tinkex.runs.saver.Saver.finish", 1),  # saving a checkpoint
        ("tinkex.runs.run.Run.save_for_sampler", 0),  # saving the result
    ],
)
def test_an_interrupted_run_arrives_at_the_same_weights(
    chats: Path, out: Path, uninterrupted: Path, target: str, after: int
) -> None:
    with interrupting(target, after):
        done = train(chats, out)
    assert done.returncode == 130
    assert done.stdout == ""
    # Two lines, because click ends the line in which a terminal shows ^C.
    assert done.stderr.endswith("run the command again to continue.\n\nInterrupted.\n")
    trained(chats, out)
    assert weights_of(out) == weights_of(uninterrupted)
    assert loggers.read_metrics(out) == loggers.read_metrics(uninterrupted)


def test_ctrl_c_while_the_file_is_read(chats: Path, out: Path) -> None:
    with interrupting("tinkex.data.open_examples"):
        done = train(chats, out)
    assert done == (130, "", "\nInterrupted.\n")
    assert not out.exists()


def test_ctrl_c_while_the_server_computes(chats: Path, out: Path, uninterrupted: Path) -> None:
    from tinkex.local.engines.torch_engine.engine import TorchEngine

    main, steps, original = threading.main_thread(), iter(range(3)), TorchEngine.optim_step

    def optim_step(*arguments: Any) -> Any:
        if next(steps, None) == 2:
            signal.pthread_kill(main.ident or 0, signal.SIGINT)
        return original(*arguments)

    with mock.patch.object(TorchEngine, "optim_step", optim_step):
        done = train(chats, out)
    assert (done.returncode, done.stdout) == (130, "")
    saved = library.read_run(out).checkpoints[-1].steps
    assert f"{count(saved, 'step')} saved in {out}; run the command again" in done.stderr
    assert "pipeline" not in done.stderr
    assert 2 <= saved <= 4
    chat = tinkex("chat", str(out), "--max-tokens", "4", stdin="Hello\n")
    check_silent(chat)
    trained(chats, out)
    assert loggers.read_metrics(out) == loggers.read_metrics(uninterrupted)


def test_a_full_disk_ends_the_run_which_continues_once_there_is_room(
    chats: Path, out: Path, uninterrupted: Path
) -> None:
    from tinkex.local.engines.torch_engine.engine import TorchEngine

    full = OSError(28, "No space left on device")
    with mock.patch.object(TorchEngine, "save", side_effect=full):
        done = train(chats, out)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert done.stderr.splitlines()[-2].startswith("Error: save_state failed on the server")
    assert done.stderr.endswith("\n  The run continues when the command is run again.\n")
    assert "Traceback" not in done.stderr
    trained(chats, out)
    assert weights_of(out) == weights_of(uninterrupted)


# Bad input


def refused(done: Done, *parts: str) -> None:
    """Check that *done* printed a single error message with these parts."""
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert done.stderr.count("\nError: ") + done.stderr.startswith("Error: ") == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_broken_line_is_named_and_can_be_left_out(chats: Path, out: Path) -> None:
    lines = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join([*lines[:4], "{broken\n", *lines[5:]]))
    refused(train(chats, out), str(chats), "line 5: it is not JSON", "leave them out: --skip-bad.")
    assert not out.exists()
    done = train(chats, out, "--skip-bad")
    assert done.returncode == 0
    assert done.stderr.startswith("Warning: left out: 1 of 48 line")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(out: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    refused(train(file, out), "has no examples")
    refused(train(tmp_path / "missing.jsonl", out), "cannot read", "No such file")
    assert not out.exists()


@pytest.fixture
def strict_model(tmp_path: Path) -> str:
    """A model whose chat template takes no role but user and assistant."""
    from tinkex.local.engines.torch_engine.builtin_models import write_tiny_random

    folder = tmp_path / "strict"
    write_tiny_random(folder)
    [template] = [*folder.glob("chat_template.jinja")] or [folder / "tokenizer_config.json"]
    check = "{% if message['role'] == 'pirate' %}{{ raise_exception('No pirates!') }}{% endif %}"
    text = template.read_text().replace(
        "{% for message in messages %}", "{% for message in messages %}" + check
    )
    template.write_text(text)
    return str(folder)


def test_roles_that_the_template_refuses(tmp_path: Path, out: Path, strict_model: str) -> None:
    records = [conversation(index) for index in range(10)]
    records[6]["messages"][0]["role"] = "pirate"
    file = write(tmp_path / "pirates.jsonl", records)
    refused(train(file, out, model=strict_model), "line 7 of", "No pirates!", "--skip-bad")
    assert not (out / "journal.jsonl").exists()
    result = trained(file, out, "--skip-bad", "--batch-size", "1", model=strict_model)
    assert result["steps"] == 9
    assert tinkex("chat", str(out), "--max-tokens", "4", stdin="Hello\n").returncode == 0


def test_an_example_without_tokens_to_learn(chats: Path, out: Path) -> None:
    refused(train(chats, out, "--max-tokens", "4"), "46 of 46 examples", "nothing to learn")
    done = train(chats, out, "--max-tokens", "25")
    assert done.returncode == 0
    assert "longer than 25 tokens were cut" in done.stderr


def test_a_heldout_file_that_overlaps_the_training_file(
    chats: Path, out: Path, tmp_path: Path
) -> None:
    refused(train(chats, out, "--heldout", str(chats)), "all 48 held-out examples are trained on")
    other = write(tmp_path / "other.jsonl", [conversation(index) for index in range(46, 52)])
    done = train(chats, out, "--heldout", str(other))
    assert done.returncode == 0
    assert done.stderr.startswith("2 of 6 held-out examples are trained on as well")


def test_examples_that_occur_twice_are_not_held_out(tmp_path: Path, out: Path) -> None:
    file = write(tmp_path / "twice.jsonl", [conversation(index % 20) for index in range(40)])
    done = train(file, out)
    assert done.returncode == 0
    assert done.stderr == (
        "2 of 2 held-out examples are trained on as well; they are not used for the held-out "
        "loss.\nNo examples are held out.\n"
    )


@pytest.fixture
def begun(chats: Path, out: Path) -> bytes:
    """The journal of a run that was interrupted."""
    with interrupting("tinkex.cli.training_progress.TrainingProgress.log", 3):
        train(chats, out)
    return (out / "journal.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "0.1"], "--learning-rate was 0.003, now 0.1"),
        (["--batch-size", "4"], "--batch-size was 8, now 4"),
        (["--rank", "8"], "rank was 4, now 8"),
        (["--seed", "1"], "seed was 0, now 1"),
        (["--model", "smollm2-135m"], "base_model was 'tiny-random', now 'smollm2-135m'"),
        (["--base-url", "http://localhost:1"], "server was 'embedded', now 'http://localhost:1'"),
        (["--heldout", "0.5"], "heldout was '2 examples of the file', now '24 examples"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_changed_settings_are_named_and_the_run_stays_as_it_is(
    chats: Path, out: Path, begun: bytes, options: List[str], message: str
) -> None:
    with mock.patch.object(library.ServiceClient, "local", side_effect=AssertionError):
        refused(train(chats, out, *options), message)
    assert (out / "journal.jsonl").read_bytes() == begun


def test_another_file_is_refused_unless_the_user_accepts_it(
    chats: Path, out: Path, begun: bytes, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [conversation(index) for index in range(40)])
    refused(train(other, out), "data was '48 examples, sha256", "--accept-changes")
    assert (out / "journal.jsonl").read_bytes() == begun
    assert trained(other, out, "--accept-changes")["steps"] == 5
    moved = chats.rename(tmp_path / "moved.jsonl")
    assert "data was" in train(moved, out).stderr


def test_a_file_may_be_moved(chats: Path, out: Path, begun: bytes, tmp_path: Path) -> None:
    assert trained(chats.rename(tmp_path / "moved.jsonl"), out)["steps"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup", "6"], "warmup is 6; it must be less than the 6 steps"),
        (["--heldout", "1.5"], "--heldout is 1.5"),
        (["--method", "dpo"], "has no preferences"),
        (["--epochs", "0"], "--epochs"),
        (["--model", "tiny-rndom"], "tiny-random"),
        (["--logger", "nothing"], "--logger"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_invalid_options(chats: Path, out: Path, options: List[str], message: str) -> None:
    refused(train(chats, out, *options), message)
    assert trained(chats, out)["steps"] == 6


def test_a_folder_that_is_a_file(chats: Path, out: Path) -> None:
    out.write_text("")
    refused(train(chats, out), f"{out} is not a folder", "Choose another folder for --out.")
    file = str(chats)
    for arguments in (["chat", file], ["status", file], ["sample", "a", "--run", file]):
        refused(tinkex(*arguments), f"{chats} is not a folder", "Give a run folder: ")


def test_a_missing_package_of_a_logger_is_reported_before_the_model_is_loaded(
    chats: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with mock.patch.object(library.ServiceClient, "local", side_effect=AssertionError):
        done = train(chats, out, "--logger", "wandb")
    refused(done, 'the logger "wandb" needs wandb', 'pip install "tinkex[wandb]"')
    assert not out.exists()


def test_a_model_that_the_server_does_not_have(chats: Path, out: Path, tmp_path: Path) -> None:
    from tinkex.local.engines.deterministic import DeterministicEngine

    with serving(DeterministicEngine(), tmp_path / "server") as server:
        arguments = ["--base-url", server.url]
        for done in (
            train(chats, out, *arguments, model="nosuch"),
            tinkex("sample", "a", "--base-model", "nosuch", *arguments),
        ):
            refused(done, "'nosuch' is not served here", "`tinkex model list` lists the models")


def test_a_folder_in_use(chats: Path, out: Path) -> None:
    trained(chats, out)
    service, _ = recipes.open_service(out)
    with service:
        in_use = f"the run folder {out} is in use"
        for done in (
            train(chats, out, "--epochs", "2", "--accept-changes"),
            tinkex("chat", str(out)),
            tinkex("export", str(out), "--to", str(out.with_name("exported"))),
        ):
            refused(done, in_use, "Wait until the `tinkex train`")
            assert "data-dir" not in done.stderr


def test_chat_opens_a_run_that_a_script_trained_on_a_local_server(
    tmp_path: Path, out: Path
) -> None:
    for data_dir in (tmp_path / "data", None):
        given = None if data_dir is None else str(data_dir)
        with library.ServiceClient.local(MODEL, data_dir=given) as service:
            with service.open_run(out, MODEL, rank=4) as run:
                run.save_for_sampler()
        chat = tinkex("chat", str(out), "--max-tokens", "4", stdin="Hello\n")
        if data_dir is not None:
            check_silent(chat)
        else:
            refused(chat, "was started without a data_dir", "Train it again")


def test_chat_needs_a_run_that_was_trained(tmp_path: Path, out: Path) -> None:
    refused(tinkex("chat", str(out)), str(out))
    refused(tinkex("chat", str(out), "--base-model", MODEL), "--base-model cannot be used")


# Progress


def test_progress_is_written_as_lines_if_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKEX_NO_STATUS", raising=False)
    with TrainingProgress(4, 0) as progress:
        progress.log(0, {"loss": 3.0, "tokens": 10.0, "heldout_loss": 3.25})
        progress.log(1, {"loss": 2.0, "tokens": 10.0})
        progress.log(3, {"loss": 1.0, "tokens": 10.0})
        progress.log(4, {"heldout_loss": 1.5})
    first, last, end = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/4: loss 3.000, held-out 3.250, ")
    assert last.startswith("step 4/4: loss 1.000, ")
    assert "held-out" not in last  # no held-out loss was measured then
    assert end == "after training: held-out 1.500"

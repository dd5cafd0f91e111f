"""In a normal run the user sees no warning, neither from tinkex nor from the libraries it uses.

Each command runs in its own process, with Python's default warnings, against a server with the real
engine; stderr must be empty.  ``tox -e latest`` runs this with the newest releases of all
dependencies.  `support.programs.run_example` requires the same of the examples.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import click
import pytest
from support.programs import interrupt, run, started

import tinkex
from tinkex.cli.main import cli
from tinkex.types import AdamParams, Datum, ModelInput

pytestmark = pytest.mark.engine

MODEL = "tiny-random"

#: Every command, with arguments for the embedded server, and its exit code there.
COMMANDS: Dict[str, Tuple[str, int]] = {
    "auth login": ("", 1),  # the key comes from stdin, which is empty
    "auth logout": ("", 0),
    "auth status": ("", 0),
    "auth whoami": ("", 1),  # a server without accounts
    "billing checkpoint-storage": ("", 1),  # a server without billing
    "billing usage": ("2026-01-01 2026-01-02", 1),
    "chat": ("--system Hello", 0),  # with nothing typed
    "checkpoint delete": ("{doomed} --yes", 0),
    "checkpoint download": ("{sampler} --output {folder}", 0),
    "checkpoint info": ("{state}", 0),
    "checkpoint list": ("", 0),
    "checkpoint publish": ("{state}", 0),
    "checkpoint push-hf": ("{sampler} --repo no/where", 1),  # no token, no hub
    "checkpoint set-ttl": ("{state} --ttl 3600", 0),
    "checkpoint unpublish": ("{state}", 0),
    "data show": ("{examples} --model tiny-random", 0),
    "doctor": ("", 0),
    "export": ("{sampler} --merge --to {folder}/merged", 0),
    "model list": ("", 0),
    "run info": ("{run}", 0),
    "run list": ("", 0),
    "sample": ("Hello --max-tokens 4", 0),
    "session export-trace": ("{session}", 1),  # the server has no traces
    "session info": ("{session}", 0),
    "session list": ("", 0),
    "status": ("", 0),
    "train": ("{chats} --model tiny-random --out {folder}-run", 0),
    "version": ("", 0),
}
#: It runs until it is stopped, so tests/cli/test_serve.py tests it.
ELSEWHERE = {"serve"}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An environment in which none of the user's own files are read or written."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "XDG_CONFIG_HOME", "HF_HOME"):
            patch.setenv(name, str(home))
        yield


@pytest.fixture(scope="module")
def url(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a `tinkex serve` in a process of its own."""
    folder = str(tmp_path_factory.mktemp("server"))
    serve = ["-m", "tinkex", "serve", "--model", MODEL, "--port", "0", "--data-dir", folder]
    with started(serve) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"TINKER_BASE_URL=(\S+?);", ready)
        assert found, ready
        yield found[1]
        done = interrupt(process)
    assert "Warning" not in done.stderr


@pytest.fixture(scope="module")
def names(url: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    """Names for the commands' arguments, from a run with checkpoints of each kind."""
    folder = tmp_path_factory.mktemp("names")
    chats = folder / "chats.jsonl"
    chats.write_text("".join(f'{{"prompt": "{i}=", "completion": "{i}"}}\n' for i in range(40)))
    examples = folder / "examples.jsonl"
    examples.write_text('{"prompt": "ONE, n.", "completion": " A number."}\n')
    with tinkex.ServiceClient(base_url=url) as service:
        trainer = service.create_lora_training_client(MODEL, rank=4)
        datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7]})
        trainer.train_step([datum], "cross_entropy", AdamParams())
        return {
            "state": trainer.save_state("state").result().path,
            "doomed": trainer.save_state("doomed").result().path,
            "sampler": trainer.save_weights_for_sampler("sampler").result().path,
            "run": trainer.get_info().model_id,
            "session": service.session_id,
            "folder": str(folder / "downloads"),
            "chats": str(chats),
            "examples": str(examples),
        }


def leaves(group: click.Group, prefix: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield prefix + name


def arguments_of(line: str, names: Dict[str, str]) -> List[str]:
    return [word.format(**names) for word in line.split()]


def test_no_command_is_left_out() -> None:
    assert set(leaves(cli)) == COMMANDS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, url: str, names: Dict[str, str], tmp_path: Path) -> None:
    line, code = COMMANDS[name]
    command = ["-m", "tinkex", *name.split(), *arguments_of(line, names)]
    done = run(command, base_url=url, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    if code == 0:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("Error: ")
        assert "Warning" not in done.stderr

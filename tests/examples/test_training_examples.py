"""The examples that train, as processes, with torch and a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List

import pytest
from support.programs import Server, run_example

from tinkex import read_run

pytestmark = pytest.mark.engine

MODEL = "tiny-random"


def numbers(name: str, stdout: str) -> List[float]:
    """Return the numbers that follow *name* in the output, in order."""
    return [float(found) for found in re.findall(rf"\b{name} (-?[\d.]+)", stdout)]


def test_a_training_loop_lowers_the_loss() -> None:
    stdout = run_example("training_loop.py", "--model", MODEL)
    losses = numbers("loss per token", stdout)
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1
    assert "710 tokens trained" in stdout


def training_options(out: Path, steps: int, learning_rate: float) -> List[str]:
    facts = {"model": MODEL, "steps": steps, "learning-rate": learning_rate, "out": out}
    return [word for name, value in facts.items() for word in (f"--{name}", str(value))]


def test_chats_are_learnt_and_the_model_replies_differently(
    torch_server: Server, tmp_path: Path
) -> None:
    options = training_options(tmp_path / "run", steps=12, learning_rate=0.01)
    stdout = run_example("supervised_chat.py", *options, server=torch_server)
    heldout = numbers("heldout_loss", stdout)
    assert len(heldout) == 3  # before, after ten steps, and at the end
    assert heldout[-1] < heldout[0] - 1
    before, after = re.search(r"Before: (.*)\n(?:.*\n)*After: (.*)\n", stdout).groups()  # type: ignore[union-attr]
    assert before != after
    record = read_run(tmp_path / "run")
    assert record.sampler is not None
    assert stdout.splitlines()[-1] == record.sampler.path


def test_reinforcement_learning_raises_the_reward(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = training_options(folder, steps=8, learning_rate=0.01)
    stdout = run_example("rl.py", *options)
    rewards = numbers("reward", stdout)
    assert len(rewards) == 8
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.3
    assert read_run(folder).sampler is not None


def test_dpo_makes_the_model_prefer_the_chosen_replies(
    torch_server: Server, tmp_path: Path
) -> None:
    options = training_options(tmp_path / "run", steps=5, learning_rate=0.003)
    stdout = run_example("dpo.py", *options, server=torch_server)
    assert numbers("heldout_accuracy", stdout)[-1] == 1.0
    first, last = numbers("heldout_loss", stdout)
    assert first == pytest.approx(0.693, abs=0.001)  # log 2: the model is its own reference
    assert last < 0.2
    margins = numbers("margin", stdout)
    assert margins[0] == pytest.approx(0.0, abs=0.001)
    assert margins[-1] > 1


def test_an_evaluation_through_the_openai_endpoint_finds_what_was_learnt(
    torch_server: Server,
) -> None:
    options = ["--model", MODEL, "--learning-rate", "0.01"]
    stdout = run_example("evaluate_openai.py", *options, server=torch_server)
    before, after = re.findall(r"(\d) of 4 right: (\S+)", stdout)
    assert before[1] == MODEL
    assert after[1].endswith("/sampler_weights/trained")
    assert int(after[0]) == 4 > int(before[0])


def test_a_run_that_was_moved_to_another_server_is_the_same_there(tmp_path: Path) -> None:
    stdout = run_example("move_run.py", "--model", MODEL, "--out", str(tmp_path / "moved"))
    urls = re.findall(r"^step \d: loss [\d.]+ on (\S+)$", stdout, re.M)
    assert len(urls) == 10
    assert len(set(urls[:5])) == len(set(urls[5:])) == 1
    assert urls[0] != urls[5]
    losses = numbers("loss", stdout)
    assert losses == sorted(losses, reverse=True)
    assert float(stdout.split()[-1]) < 1e-5
    here, there = (read_run(tmp_path / "moved" / name) for name in ("here", "there"))
    assert [len(here.steps), len(there.steps)] == [5, 10]
    assert there.steps[:5] == here.steps

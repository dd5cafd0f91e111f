"""Recipes of the published cookbook, with tinkex as ``tinker`` and with the official SDK.

They run as processes, against ``tinkex serve`` with a model of two layers.  Results that do not
depend on random samples are the same for both clients: the recipes start from one checkpoint, since
the weights of a new adapter are random.  Models and data sets are folders in the current folder,
where the cookbook's libraries look for their names before they contact a hub.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest
from field import small_world
from field.small_world import MODEL, NO_THINKING
from support.served import tinkex_serve

from tinkex import ServiceClient, types

pytest.importorskip("torch")
if importlib.util.find_spec("tinker_cookbook") is None:
    pytest.skip("the cookbook is not installed", allow_module_level=True)

#: The command that runs a program with each client.
CLIENTS = {"tinkex": ["-m", "tinkex.as_tinker"], "official": []}
TESTS = Path(__file__).resolve().parents[1]
#: On a busy machine with two cores, a recipe of seconds takes minutes.
PATIENCE_S = 600.0
KEY = "tml-local"
RECIPES = "tinker_cookbook.recipes"


def read_lines(path: Path) -> List[Any]:
    """Return the values of a file with one JSON value per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Run(NamedTuple):
    """A finished run of a recipe."""

    printed: str
    folder: Path

    def metrics(self, *names: str) -> List[Dict[str, float]]:
        """Return the metrics *names* of each step that has all of them."""
        rows = read_lines(self.folder / "metrics.jsonl")
        return [{name: row[name] for name in names} for row in rows if set(names) <= set(row)]

    def checkpoint(self) -> Dict[str, Any]:
        """Return what the recipe recorded about its last checkpoint."""
        last: Dict[str, Any] = read_lines(self.folder / "checkpoints.jsonl")[-1]
        assert last["name"] == "final"
        return last


def connected(url: str) -> ServiceClient:
    return ServiceClient(base_url=url, api_key=KEY)


class World(NamedTuple):
    """The folder that programs run in, the URL of the server, and a checkpoint to start from."""

    folder: Path
    url: str
    start: str
    sampler: str

    def environment(self) -> Dict[str, str]:
        return {
            **os.environ,
            "HF_DATASETS_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TESTS),
            "PYTHONWARNINGS": "ignore",
            "TINKER_API_KEY": KEY,
            "TINKER_BASE_URL": self.url,
            "TINKER_TELEMETRY": "0",
        }

    def run(self, client: str, *arguments: str, stdin: str = "") -> str:
        """Run ``python ARGUMENTS`` with *client* as ``tinker``; return what it printed."""
        command = [sys.executable, *CLIENTS[client], *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout

    def recipe(self, client: str, module: str, *options: str) -> Run:
        """Run a recipe; its log is in a folder named after it and *client*."""
        log = self.log(client, module)
        options = (f"model_name={MODEL}", f"log_path={log}", *options)
        return Run(self.run(client, "-m", f"{RECIPES}.{module}", *options), log)

    def log(self, client: str, module: str) -> Path:
        return self.folder / "logs" / f"{module}.{client}"

    def both(self, module: str, *options: str) -> List[Run]:
        return [self.recipe(client, module, *options) for client in CLIENTS]

    def logprobs(self, path: str) -> List[float]:
        """Return the logprobs of a few tokens with the sampler weights at *path*."""
        prompt = types.ModelInput.from_ints(list(range(60, 80)))
        with connected(self.url) as service:
            found = service.create_sampling_client(model_path=path).compute_logprobs(prompt)
            return [value for value in found.result() if value is not None]

    def assert_it_loads(self, run: Run) -> None:
        """Check that a run can continue from the last checkpoint, with its optimizer."""
        path = run.checkpoint()["state_path"]
        with connected(self.url) as service:
            training = service.create_training_client_from_state_with_optimizer(path)
            assert training.get_info().lora_rank == 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    small_world.write_data(folder)
    model = folder / MODEL
    model.mkdir(parents=True)
    learn = [*CLIENTS["tinkex"], str(Path(small_world.__file__)), str(model)]
    taught = subprocess.run([sys.executable, *learn], capture_output=True, text=True)
    assert taught.returncode == 0, taught.stderr
    data_dir = tmp_path_factory.mktemp("server")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with tinkex_serve(data_dir, model=MODEL, cwd=folder, **variables) as url:
        with connected(url) as service:
            training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1)
            start = training.save_state("start").result().path
            sampler = training.save_weights_for_sampler("start").result().path
        yield World(folder, url, start, sampler)


def same(first: Any, second: Any) -> bool:
    """Return whether two lists of metrics are equal up to the last digits of a float32."""
    return len(first) == len(second) > 0 and all(
        one == pytest.approx(other, rel=1e-4, abs=1e-6) for one, other in zip(first, second)
    )


def assert_same_training(world: World, runs: List[Run], *metrics: str) -> None:
    """Check the metrics of every step, and that the last checkpoints load and are the same."""
    tinkex, official = runs
    assert same(tinkex.metrics(*metrics), official.metrics(*metrics))
    saved = [world.logprobs(run.checkpoint()["sampler_path"]) for run in runs]
    assert saved[0] == pytest.approx(saved[1], rel=1e-4)
    assert saved[0] != pytest.approx(world.logprobs(world.sampler), rel=1e-4), "nothing was learnt"
    for run in runs:
        world.assert_it_loads(run)


def test_sl_loop_continues_from_a_checkpoint_and_learns_the_same(world: World) -> None:
    for client in CLIENTS:
        folder = world.log(client, "sl_loop")
        folder.mkdir(parents=True)
        noted = {"name": "start", "batch": 0, "state_path": world.start}
        (folder / "checkpoints.jsonl").write_text(json.dumps(noted) + "\n")
    runs = world.both("sl_loop", "batch_size=2", "learning_rate=0.003", "save_every=2")
    assert_same_training(world, runs, "train_mean_nll", "train_mean_bpb", "grad_norm", "num_tokens")
    losses = [row["train_mean_nll"] for row in runs[0].metrics("train_mean_nll")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_chat_sl_learns_and_evaluates_the_same(world: World) -> None:
    options = ["batch_size=4", "num_epochs=2", "learning_rate=0.003", "eval_every=1"]
    options += ["save_every=2", f"load_checkpoint_path={world.start}"]
    runs = world.both("chat_sl.train", *options, f"renderer_name={NO_THINKING}")
    assert_same_training(world, runs, "train_mean_nll", "test/nll", "grad_norm")
    losses = [row["test/nll"] for row in runs[0].metrics("test/nll")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_dpo_prefers_the_chosen_answers_the_same(world: World) -> None:
    options = ["batch_size=4", "learning_rate=0.003", f"load_checkpoint_path={world.start}"]
    runs = world.both("preference.dpo.train", *options, f"renderer_name={NO_THINKING}")
    metrics = ["dpo_loss", "margin", "chosen_reward", "rejected_reward", "test/nll"]
    assert_same_training(world, runs, *metrics)
    steps = runs[0].metrics("dpo_loss", "margin")
    assert steps[0]["dpo_loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert steps[-1]["margin"] > 0.01


def test_prompt_distillation_labels_the_same_and_learns_the_same(world: World) -> None:
    labelled = []
    for client in CLIENTS:
        output = world.folder / f"labels.{client}.jsonl"
        module = f"{RECIPES}.prompt_distillation.create_data"
        world.run(client, "-m", module, f"output_file={output}")
        chats = [row["messages"] for row in read_lines(output)]
        labelled.append({chat[0]["content"]: chat[1]["content"] for chat in chats})
    assert labelled == [small_world.SENTENCES, small_world.SENTENCES]
    # Both train on one file, because other files may have the sentences in another order.
    options = [f"file_path={world.folder / 'labels.tinkex.jsonl'}", "batch_size=2", "num_epochs=2"]
    options += ["learning_rate=0.003", f"load_checkpoint_path={world.start}"]
    runs = world.both("prompt_distillation.train", *options, f"renderer_name={NO_THINKING}")
    assert_same_training(world, runs, "train_mean_nll", "grad_norm")


def assert_learnt_from_rewards(world: World, run: Run, reward: str, steps: int) -> None:
    """Check that rewards of random samples have possible values, and that steps were made."""
    rewards = [row[reward] for row in run.metrics(reward)]
    assert len(rewards) == steps
    assert all(0.0 <= value <= 1.0 for value in rewards)
    assert 0.0 < sum(rewards) < steps
    norms = [row["grad_norm"] for row in run.metrics("grad_norm")]
    assert norms
    assert all(0.0 < norm < 1e4 for norm in norms)
    world.assert_it_loads(run)


@pytest.mark.parametrize("client", CLIENTS)
def test_rl_loop_learns_from_rewards(world: World, client: str) -> None:
    options = ["batch_size=2", "group_size=16", "max_tokens=32", "lora_rank=8"]
    run = world.recipe(client, "rl_loop", *options, "loss_fn=importance_sampling")
    assert_learnt_from_rewards(world, run, "reward/total", steps=2)


@pytest.mark.parametrize("client", CLIENTS)
def test_math_rl_learns_from_rewards(world: World, client: str) -> None:
    options = ["env=arithmetic", "groups_per_batch=4", "group_size=8", "max_steps=1"]
    options += [f"renderer_name={NO_THINKING}", f"load_checkpoint_path={world.start}"]
    run = world.recipe(client, "math_rl.train", *options, "loss_fn=gspo")
    assert_learnt_from_rewards(world, run, "env/all/reward/total", steps=1)
    # Sampling and training compute logprobs with the same weights.
    (difference,) = run.metrics("optim/kl_sample_train_v2")
    assert abs(difference["optim/kl_sample_train_v2"]) < 1e-6


@pytest.mark.parametrize("client", CLIENTS)
def test_on_policy_distillation_follows_the_teacher(world: World, client: str) -> None:
    options = ["dataset=tulu3", "groups_per_batch=2", "group_size=2", "max_steps=1"]
    options += ["max_tokens=8", f"teacher_model={MODEL}", f"load_checkpoint_path={world.start}"]
    run = world.recipe(client, "distillation.on_policy_distillation", *options)
    # The student starts as a copy of the teacher.
    (divergence,) = run.metrics("teacher_kl")
    assert divergence["teacher_kl"] == pytest.approx(0.0, abs=1e-4)
    assert run.checkpoint()["state_path"].startswith("tinker://")


def test_evaluators_give_the_same_scores(world: World) -> None:
    program = str(Path(__file__).with_name("evaluate.py"))
    scores = [json.loads(world.run(client, program).splitlines()[-1]) for client in CLIENTS]
    assert scores[0] == scores[1]
    assert scores[0]["accuracy"] == pytest.approx(2 / 3)  # of three capitals, one is wrong
    assert scores[0]["eval/gsm8k/score"] == 0.75
    assert scores[0]["eval/gsm8k/num_errors"] == 0.0


def test_the_chat_gives_the_same_replies(world: World) -> None:
    typed = "What is the capital of France?\nn\nWhat is the capital of Italy?\nquit\n"
    options = [f"base_model={MODEL}", f"model_path={world.sampler}", "temperature=0"]
    module = "tinker_cookbook.chat_app.tinker_chat_cli"
    printed = [world.run(client, "-m", module, *options, stdin=typed) for client in CLIENTS]
    assert printed[0] == printed[1]
    replies = [part.partition("User: ")[0] for part in printed[0].split("Assistant: ")[1:]]
    assert [reply.split()[-1] for reply in replies[:1]] == ["Paris"]
    assert "Milan" in replies[1]

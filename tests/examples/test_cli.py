"""The command line, against the real server, without any machine learning."""

from __future__ import annotations

import functools
import json
import re

import pytest
from examples.programs import Server, interrupt, run, started, tinkex

import tinkex as library
from tinkex import types


@pytest.fixture
def saved(server: Server) -> str:
    """A training run with one checkpoint of each kind; returns the training checkpoint's path."""
    with library.ServiceClient(base_url=server.url) as service:
        trainer = service.create_lora_training_client(server.model, rank=4)
        datum = types.Datum(
            types.ModelInput.from_ints([5, 6, 7]),
            {"target_tokens": [6, 7, 8], "weights": [1, 1, 1]},
        )
        trainer.train_step([datum], "cross_entropy", types.AdamParams())
        trainer.save_weights_for_sampler("first").result()
        return trainer.save_state("first").result().path


def test_version():
    assert tinkex("version") == (0, f"tinkex {library.__version__}\n", "")


def test_the_module_can_be_run():
    done = run(["-m", "tinkex", "version"])
    assert (done.returncode, done.stdout) == (0, f"tinkex {library.__version__}\n")


def test_help_names_every_command_and_imports_none():
    done = run(["-X", "importtime", "-m", "tinkex", "--help"])
    assert done.returncode == 0
    for module in ("tinkex.cli.sample", "tinkex.service_client", "rich", "requests", "flask"):
        assert f" {module}\n" not in done.stderr
    for command in ("checkpoint", "run", "sample", "serve", "version"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["run", "info"], ["sample"], ["-f", "yaml", "version"], ["run", "list", "x"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments):
    done = tinkex(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_server_it_says_how_to_name_one():
    done = tinkex("sample", "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: no server to talk to\n")
    for remedy in ("--base-url", "TINKER_BASE_URL", "TINKER_API_KEY", "--local", "tinkex serve"):
        assert remedy in done.stderr


def test_an_unreachable_server_is_one_clear_error(monkeypatch):
    impatient = functools.partial(library.ServiceClient, startup_timeout_s=0.5)
    monkeypatch.setattr(library, "ServiceClient", impatient)
    done = tinkex("run", "list", "--base-url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_runs_are_listed(server: Server, saved: str):
    run_id = types.ParsedCheckpointTinkerPath.from_tinker_path(saved).training_run_id
    done = tinkex("run", "list", base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 training runs")
    assert run_id in done.stdout
    assert "rank 4" in done.stdout
    assert server.model in done.stdout


@pytest.mark.parametrize(
    "arguments", [["-f", "json", "run", "list"], ["run", "list", "-f", "json"]], ids=" ".join
)
def test_json_may_be_asked_for_before_and_after_the_command(server, saved, arguments):
    done = tinkex(*arguments, base_url=server.url)
    (run,) = json.loads(done.stdout)["runs"]
    assert run["lora_rank"] == 4
    assert run["last_checkpoint"]["tinker_path"] == saved


def test_listing_runs_goes_on_over_pages(server: Server):
    with library.ServiceClient(base_url=server.url) as service:
        waiting = [
            service.create_lora_training_client_future(server.model, rank=1) for _ in range(103)
        ]
        made = {future.result().model_id for future in waiting}
    everything = tinkex("-f", "json", "run", "list", "--limit", "0", base_url=server.url)
    assert {run["training_run_id"] for run in json.loads(everything.stdout)["runs"]} == made
    some = tinkex("run", "list", "--limit", "2", base_url=server.url)
    assert some.stdout.startswith("2 of 103 training runs")


def test_one_run_is_shown(server: Server, saved: str):
    run_id = types.ParsedCheckpointTinkerPath.from_tinker_path(saved).training_run_id
    done = tinkex("run", "info", run_id, base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert saved in done.stdout


def test_an_unknown_run_is_an_error(server: Server):
    done = tinkex("run", "info", "no-such-run", base_url=server.url)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "no-such-run" in done.stderr


def test_checkpoints_are_listed_shown_and_deleted(server: Server, saved: str):
    listed = json.loads(tinkex("-f", "json", "checkpoint", "list", base_url=server.url).stdout)
    paths = [checkpoint["tinker_path"] for checkpoint in listed["checkpoints"]]
    assert len(paths) == 2
    assert saved in paths

    table = tinkex("checkpoint", "list", base_url=server.url)
    assert (table.returncode, table.stderr) == (0, "")
    for path in paths:
        assert path in table.stdout

    shown = tinkex("-f", "json", "checkpoint", "info", saved, base_url=server.url)
    facts = json.loads(shown.stdout)
    assert facts["tinker_path"] == saved
    assert facts["lora_rank"] == 4
    assert facts["base_model"] == server.model

    deleted = tinkex("checkpoint", "delete", "--yes", *paths, base_url=server.url)
    assert (deleted.returncode, deleted.stdout) == (0, "Deleted 2 checkpoints.\n")
    left = tinkex("-f", "json", "checkpoint", "list", base_url=server.url)
    assert json.loads(left.stdout) == {"checkpoints": []}
    assert server.ends() == [end for end in server.ends() if end.startswith("410")]


def test_checkpoints_of_one_run(server: Server, saved: str):
    run_id = types.ParsedCheckpointTinkerPath.from_tinker_path(saved).training_run_id
    done = tinkex("-f", "json", "checkpoint", "list", "--run-id", run_id, base_url=server.url)
    listed = json.loads(done.stdout)
    assert listed["run_id"] == run_id
    assert len(listed["checkpoints"]) == 2


def test_deleting_asks_first(server: Server, saved: str):
    refused = tinkex("checkpoint", "delete", saved, base_url=server.url, stdin="n\n")
    assert refused.returncode == 1
    assert saved in refused.stderr
    assert tinkex("checkpoint", "info", saved, base_url=server.url).returncode == 0
    agreed = tinkex("checkpoint", "delete", saved, base_url=server.url, stdin="y\n")
    assert agreed.returncode == 0
    assert tinkex("checkpoint", "info", saved, base_url=server.url).returncode == 1


def test_deleting_reports_what_failed_and_does_the_rest(server: Server, saved: str):
    missing = saved.replace("/first", "/other")
    done = tinkex("checkpoint", "delete", "-y", missing, saved, base_url=server.url)
    assert done.returncode == 1
    assert done.stdout == "Deleted 1 checkpoint.\n"
    assert missing in done.stderr


def test_a_wrong_path_is_told_before_the_network():
    done = tinkex("checkpoint", "info", "tinker://nonsense", base_url="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "tinker://nonsense" in done.stderr


def test_no_session_is_left_behind(server: Server, saved: str):
    assert run(["-m", "tinkex", "run", "list"], base_url=server.url).returncode == 0
    tinkex("run", "info", "no-such-run", base_url=server.url)
    ends = server.ends()
    assert len(ends) == 3
    assert "live" not in ends


def test_serve_is_ready_answers_and_stops_at_ctrl_c(tmp_path):
    command = ["-m", "tinkex", "serve", "--model", "deterministic", "--port", "0"]
    with started([*command, "--data-dir", str(tmp_path)]) as server:
        assert server.stdout is not None
        url = re.search(r"http://[\d.:]+", server.stdout.readline())
        assert url is not None
        assert tinkex("run", "list", base_url=url.group()).returncode == 0
        ended = interrupt(server)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert "Warning" not in ended.stderr


def test_sample_says_what_it_needs_where_there_is_no_tokenizer(server: Server):
    done = tinkex("sample", "hello", "--base-url", server.url)
    assert done.returncode == 1
    assert "tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert [end[:3] for end in server.ends()] == ["410"]

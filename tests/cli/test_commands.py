"""The command line, against the real server, without any machine learning."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import threading
from pathlib import Path
from unittest import mock

import pytest
from support.hub import FakeHub
from support.programs import Server, environment, interrupt, run, started, tinkex
from support.scripted_server import Answer, ScriptedServer
from support.threads import wait_until

import tinkex as library
from tinkex import types
from tinkex.cli.connect import explained, find_server
from tinkex.config import DEFAULT_BASE_URL
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.server import LocalServer

pytestmark = pytest.mark.usefixtures("short_backoff")

#: The environment of `tinkex`, with a key, which every server except the embedded one requires.
ENVIRONMENT = {**environment(None), "TINKER_API_KEY": "tml-1"}


def test_version():
    assert tinkex("version") == (0, f"tinkex {library.__version__}\n", "")


def test_the_module_can_be_run():
    done = run(["-m", "tinkex", "version"])
    assert (done.returncode, done.stdout) == (0, f"tinkex {library.__version__}\n")


def test_help_names_every_command_and_imports_none():
    done = run(["-X", "importtime", "-m", "tinkex", "--help"])
    assert done.returncode == 0
    for module in ("tinkex.cli.sample", "tinkex.clients.service", "rich", "requests", "flask"):
        assert f" {module}\n" not in done.stderr
    for command in ("auth", "billing", "checkpoint", "model", "run", "sample", "session", "serve"):
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


@pytest.mark.parametrize("arguments", [["--version"], ["version"]], ids=" ".join)
def test_the_version_is_also_an_option(arguments):
    assert tinkex(*arguments) == (0, f"tinkex {library.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["chekpoint", "list"], "`tinkex checkpoint`"),
        (["checkpoint", "lst"], "`tinkex checkpoint list`"),
        (["auth", "logni"], "`tinkex auth login`"),
        (["whoami"], "`tinkex auth whoami`"),
        (["checkpoint", "whoami"], "`tinkex auth whoami`"),
        (["push_hf"], "`tinkex checkpoint push-hf`"),
        (["checkpoint", "frobnicate"], "delete, download, info, list"),
        (["run", "list", "--limt", "3"], "--limit"),
        (["--formt", "json", "version"], "--format"),
    ],
    ids=" ".join,
)
def test_a_misspelt_command_gets_a_suggestion(arguments, meant):
    done = tinkex(*arguments)
    assert done.returncode == 2
    assert meant in done.stderr


@pytest.fixture
def no_server_here(monkeypatch):
    """No server listens at the default address of `tinkex serve`."""
    monkeypatch.setattr("tinkex.cli.serve.DEFAULT_PORT", 9)


def test_without_a_server_the_error_says_how_to_name_one(no_server_here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = tinkex("sample", "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: no server was given\n")
    for remedy in ("--base-url", "TINKER_BASE_URL", "TINKER_API_KEY", "--local", "tinkex serve"):
        assert remedy in done.stderr


def test_a_server_on_this_machine_is_found_without_being_named(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tinkex.cli.serve.DEFAULT_PORT", int(server.url.rpartition(":")[2]))
    done = tinkex("-f", "json", "model", "list")
    assert (done.returncode, done.stderr) == (0, f"Using the server at {server.url}.\n")
    assert [model["model_name"] for model in json.loads(done.stdout)["models"]] == [server.model]


def test_a_key_for_the_hosted_service_takes_precedence_over_a_server_on_this_machine(
    server, monkeypatch
):
    monkeypatch.setattr("tinkex.cli.serve.DEFAULT_PORT", int(server.url.rpartition(":")[2]))
    with mock.patch.dict(os.environ, {"TINKER_API_KEY": "tml-hosted"}):
        assert find_server(None).base_url == DEFAULT_BASE_URL


WRONG_SERVERS = {
    "another server": Answer(404, b"<html>Not Found</html>", content_type="text/html"),
    "a web page": Answer(200, b"<html>Welcome!</html>", content_type="text/html"),
    "another API": Answer(200, {"hello": "world"}),
    "a broken server": Answer(400, {"detail": "oops"}),
}


@pytest.mark.parametrize("command", ["auth whoami", "auth status", "model list"])
@pytest.mark.parametrize("kind", WRONG_SERVERS)
def test_the_error_about_a_wrong_server_names_it_and_the_fault(
    scripted, monkeypatch, command, kind
):
    for route in ("POST /api/v1/client/config", "GET /api/v1/get_server_capabilities"):
        scripted.on(route, WRONG_SERVERS[kind])
    arguments = [*command.split(), "--base-url", scripted.url]
    with mock.patch("support.programs.environment", return_value=ENVIRONMENT):
        done = tinkex(*arguments)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert scripted.url.partition("//")[2] in said
    assert "get_server_capabilities" in said or "is not JSON" in said or "client/config" in said
    assert kind == "a broken server" or "--base-url" in said
    assert "base_url" not in said


@pytest.mark.parametrize("command", ["auth whoami", "auth status", "model list"])
@pytest.mark.parametrize("named_by", ["--base-url", "TINKER_BASE_URL"])
def test_the_error_about_an_absent_server_names_it_and_the_remedy(monkeypatch, command, named_by):
    impatient = functools.partial(library.RestClient, startup_timeout_s=0.5)
    monkeypatch.setattr(library, "RestClient", impatient)
    url = "http://127.0.0.1:9"
    if named_by == "--base-url":
        done = tinkex(*command.split(), "--base-url", url)
    else:
        done = tinkex(*command.split(), base_url=url)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "cannot reach 127.0.0.1:9" in said
    assert "Connection refused" in said
    assert f"Is the server running at {url}, and {named_by} right?" in said


def test_a_wrong_key_is_one_error_with_one_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "TINKER_API_KEY", "tml-wrong")
    with (
        LocalServer(DeterministicEngine(), data_dir=tmp_path, api_key="tml-right") as server,
        mock.patch("support.programs.environment", return_value=ENVIRONMENT),
    ):
        done = tinkex("model", "list", "--base-url", server.url)
    assert done.returncode == 1
    assert done.stderr.count("TINKER_API_KEY") == 1
    assert "api_key" not in done.stderr
    assert "tml-" not in done.stderr


def test_an_unreachable_server_is_one_clear_error(monkeypatch):
    impatient = functools.partial(library.RestClient, startup_timeout_s=0.5)
    monkeypatch.setattr(library, "RestClient", impatient)
    done = tinkex("run", "list", "--base-url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_runs_are_listed(server: Server, saved: str):
    run_id = types.ParsedCheckpointTinkerPath.from_tinker_path(saved).training_run_id
    done = tinkex("run", "list", base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 training run\n")
    assert run_id in done.stdout
    assert "rank 4" in done.stdout
    assert server.model in done.stdout


@pytest.mark.parametrize(
    "arguments", [["-f", "json", "run", "list"], ["run", "list", "-f", "json"]], ids=" ".join
)
def test_json_may_be_requested_before_and_after_the_command(server, saved, arguments):
    done = tinkex(*arguments, base_url=server.url)
    (run,) = json.loads(done.stdout)["runs"]
    assert run["lora_rank"] == 4
    assert run["last_checkpoint"]["tinker_path"] == saved


def test_listing_runs_fetches_all_pages(server: Server):
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


def test_checkpoints_of_one_run(server: Server, saved: str):
    run_id = types.ParsedCheckpointTinkerPath.from_tinker_path(saved).training_run_id
    done = tinkex("-f", "json", "checkpoint", "list", "--run-id", run_id, base_url=server.url)
    listed = json.loads(done.stdout)
    assert listed["run_id"] == run_id
    assert len(listed["checkpoints"]) == 2


def test_deleting_asks_for_confirmation(server: Server, saved: str):
    refused = tinkex("checkpoint", "delete", saved, base_url=server.url, stdin="n\n")
    assert refused.returncode == 1
    assert saved in refused.stderr
    assert tinkex("checkpoint", "info", saved, base_url=server.url).returncode == 0
    agreed = tinkex("checkpoint", "delete", saved, base_url=server.url, stdin="y\n")
    assert agreed.returncode == 0
    assert tinkex("checkpoint", "info", saved, base_url=server.url).returncode == 1


def test_deleting_reports_failures_and_deletes_the_rest(server: Server, saved: str):
    missing = saved.replace("/first", "/other")
    done = tinkex("checkpoint", "delete", "-y", missing, saved, base_url=server.url)
    assert done.returncode == 1
    assert done.stdout == "Deleted 1 checkpoint.\n"
    assert missing in done.stderr


def test_a_wrong_path_is_reported_before_the_network():
    done = tinkex("checkpoint", "info", "tinker://nonsense", base_url="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "tinker://nonsense" in done.stderr


def test_commands_that_only_read_open_no_session(server: Server, saved: str):
    done = run(["-m", "tinkex", "run", "list"], base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    tinkex("run", "info", "no-such-run", base_url=server.url)
    tinkex("model", "list", base_url=server.url)
    assert len(server.ends()) == 1, "that of the run"


def test_serve_announces_that_it_is_ready_responds_and_stops_at_ctrl_c(tmp_path):
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


def test_sample_names_what_it_needs_if_there_is_no_tokenizer(server: Server):
    done = tinkex("sample", "hello", "--base-url", server.url)
    assert done.returncode == 1
    assert "Error: the model 'deterministic' has no tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert [end[:3] for end in server.ends()] == ["410"]


def test_the_error_about_a_lost_session_tells_the_user_to_repeat_the_command():
    config = library.Config.resolve(base_url="http://h")
    error = library.SessionLostError("session s was lost", hint="Create a new ServiceClient.")
    with pytest.raises(library.SessionLostError) as caught, explained(config):
        raise error
    assert caught.value.hint == "Run the command again."


def run_of(path: str) -> str:
    return types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id


# Models and sessions


def test_models_are_listed(server: Server):
    done = tinkex("model", "list", base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 model\n")
    assert server.model in done.stdout
    listed = json.loads(tinkex("-f", "json", "model", "list", "DETER", base_url=server.url).stdout)
    (model,) = listed["models"]
    assert set(model) == {"model_name", "max_context_length", "trainable", "sampleable"}
    assert model["model_name"] == server.model


def test_a_model_that_the_server_does_not_offer(server: Server):
    done = tinkex("model", "list", "llama", base_url=server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'llama'" in done.stderr
    assert server.model in done.stderr


def test_sessions_are_listed_and_shown(server: Server, saved: str):
    listed = json.loads(tinkex("-f", "json", "session", "list", base_url=server.url).stdout)
    (session_id,) = listed["sessions"]
    shown = tinkex("-f", "json", "session", "info", session_id, base_url=server.url)
    assert json.loads(shown.stdout)["training_run_ids"] == [run_of(saved)]
    for arguments in (["list"], ["info", session_id]):
        table = tinkex("session", *arguments, base_url=server.url)
        assert (table.returncode, table.stderr) == (0, "")
        assert session_id in table.stdout
    unknown = tinkex("session", "info", "nobody", base_url=server.url)
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr


@pytest.fixture
def scripted():
    with ScriptedServer() as running:
        yield running


def test_a_trace_is_exported(scripted: ScriptedServer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"{scripted.url}/trace?signature=1"
    route = "GET /api/v1/sessions/s-1/trace_export"
    scripted.on(route, Answer(body={"status": "ready", "url": url}))
    scripted.on("GET /trace", Answer(body=b"perfetto", content_type="application/octet-stream"))
    only = tinkex("session", "export-trace", "s-1", "--url-only", base_url=scripted.url)
    assert (only.returncode, only.stdout, only.stderr) == (0, f"{url}\n", "")
    done = tinkex("-f", "json", "session", "export-trace", "s-1", base_url=scripted.url)
    assert json.loads(done.stdout) == {
        "session_id": "s-1",
        "destination": str(tmp_path / "s-1.pftrace"),
        "file_size_bytes": 8,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["s-1.pftrace"]
    assert (tmp_path / "s-1.pftrace").read_bytes() == b"perfetto"
    again = tinkex("session", "export-trace", "s-1", base_url=scripted.url)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    forced = tinkex("session", "export-trace", "s-1", "--force", base_url=scripted.url)
    assert (forced.returncode, forced.stderr) == (0, "")


# Runs


def test_the_columns_of_runs_can_be_chosen(server: Server, saved: str):
    done = tinkex("run", "list", "-c", "checkpoint, owner,id", base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    titles = ["Last Checkpoint", "Owner", "Run ID"]
    assert [re.split("  +", line.strip()) for line in done.stdout.splitlines()].count(titles) == 1
    assert "weights/first" in done.stdout
    assert "Base Model" not in done.stdout
    wrong = tinkex("run", "list", "-c", "colour", base_url=server.url)
    assert wrong.returncode == 2
    assert "checkpoint_time" in wrong.stderr


# Changing checkpoints


def test_a_checkpoint_is_published_and_made_private(server: Server, saved: str):
    def public() -> bool:
        shown = tinkex("-f", "json", "checkpoint", "info", saved, base_url=server.url)
        return json.loads(shown.stdout)["public"]

    done = tinkex("checkpoint", "publish", saved, base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert public()
    twice = tinkex("checkpoint", "publish", saved, base_url=server.url)
    assert twice.returncode == 1
    assert "already" in twice.stderr
    quiet = tinkex("-f", "json", "checkpoint", "unpublish", saved, base_url=server.url)
    assert quiet == (0, "", "")
    assert not public()


def test_a_checkpoint_gets_a_time_to_live(server: Server, saved: str):
    def expires() -> object:
        shown = tinkex("-f", "json", "checkpoint", "info", saved, base_url=server.url)
        return json.loads(shown.stdout).get("expires_at")

    assert tinkex("checkpoint", "set-ttl", saved, "--ttl", "7200", base_url=server.url)[0] == 0
    assert expires() is not None
    assert tinkex("checkpoint", "set-ttl", saved, "--remove", base_url=server.url)[0] == 0
    assert expires() is None
    for wrong in ([], ["--ttl", "5", "--remove"], ["--ttl", "soon"]):
        assert tinkex("checkpoint", "set-ttl", saved, *wrong, base_url=server.url).returncode == 2


def paths_of(server: Server) -> list:
    listed = json.loads(tinkex("-f", "json", "checkpoint", "list", base_url=server.url).stdout)
    return [checkpoint["tinker_path"] for checkpoint in listed["checkpoints"]]


@pytest.mark.parametrize(
    ("filters", "kinds"),
    [
        ([], []),
        (["--type", "sampler"], ["weights"]),
        (["--type", "weights"], ["sampler_weights"]),
        (["--before", "2020-01-01"], ["sampler_weights", "weights"]),
        (["--after", "2020-01-01T00:00:00Z"], []),
        (["--type", "training", "--before", "2999-01-01T00:00:00+01:00"], ["sampler_weights"]),
    ],
    ids=str,
)
def test_checkpoints_of_a_run_are_deleted_by_filter(server, saved, filters, kinds):
    done = tinkex(
        "-f", "json", "checkpoint", "delete", "-y", "--run-id", run_of(saved), *filters,
        base_url=server.url,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"deleted_count": 2 - len(kinds), "failed": []}
    assert sorted(path.split("/")[3] for path in paths_of(server)) == kinds


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tinker://r/weights/a", "--run-id", "r"],
        ["tinker://r/weights/a", "--type", "weights"],
        ["--run-id", "r", "--before", "soon"],
        ["--run-id", "r", "--type", "other"],
    ],
    ids=" ".join,
)
def test_the_checkpoints_to_delete_must_be_unambiguous(arguments):
    done = tinkex("checkpoint", "delete", *arguments, base_url="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "Error: " in done.stderr


# Fetching checkpoints


def test_a_checkpoint_is_downloaded(server: Server, saved: str, tmp_path):
    out = tmp_path / "out"
    done = tinkex(
        "-f", "json", "checkpoint", "download", saved, "-o", str(out), base_url=server.url
    )
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    (folder,) = out.iterdir()
    assert folder.name == saved[len("tinker://") :].replace("/", "_")
    assert facts["checkpoint_path"] == saved
    assert facts["destination"] == str(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    assert facts["file_size_bytes"] == sum(file.stat().st_size for file in files) > 0

    again = tinkex("checkpoint", "download", saved, "-o", str(out), base_url=server.url)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert "--force" in again.stderr
    assert "overwrite" not in again.stderr
    forced = tinkex("checkpoint", "download", saved, "-o", str(out), "--force", base_url=server.url)
    assert (forced.returncode, forced.stderr) == (0, "")
    assert str(folder) in forced.stdout


def test_a_file_in_the_place_of_the_folder_is_named(server: Server, saved: str, tmp_path):
    (tmp_path / "file").write_text("mine")
    for option in ("--format=json", "--force"):
        done = tinkex(
            "checkpoint", "download", saved, option, "-o", str(tmp_path / "file"),
            base_url=server.url,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"Error: {tmp_path / 'file'} is a file, not a folder\n" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_that_does_not_exist_leaves_nothing(server: Server, saved: str, tmp_path):
    missing = saved.replace("/first", "/other")
    done = tinkex("checkpoint", "download", missing, "-o", str(tmp_path), base_url=server.url)
    assert done.returncode == 1
    assert "other" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["server"]


def test_a_checkpoint_is_pushed_to_the_hub(server: Server, saved: str, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("tinkex._downloads.hub._hub", lambda: hub)
    done = tinkex(
        "-f", "json", "checkpoint", "push-hf", saved, "-r", "me/model", "--public",
        "--revision", "v1", "--commit-message", "hello", "--allow-pattern", "*.json",
        "--allow-pattern", "README.md", "--ignore-pattern", "*.bin", base_url=server.url,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "checkpoint_path": saved,
        "repo_id": "me/model",
        "revision": "v1",
        "public": True,
        "url": "https://hub/commit/1",
    }
    assert hub.calls[:2] == [
        ("create_repo", {"repo_id": "me/model", "private": False, "exist_ok": True}),
        ("create_branch", {"repo_id": "me/model", "branch": "v1", "exist_ok": True}),
    ]
    name, upload = hub.calls[2]
    assert name == "upload_folder"
    assert upload["allow_patterns"] == ["*.json", "README.md"]
    assert upload["ignore_patterns"] == ["*.bin"]
    assert (upload["commit_message"], upload["create_pr"]) == ("hello", False)
    assert "README.md" in hub.files
    assert not Path(upload["folder_path"]).exists(), "the copy here is deleted"


def test_a_push_without_a_repository_creates_one_named_after_the_checkpoint(
    server, saved, monkeypatch
):
    hub = FakeHub()
    monkeypatch.setattr("tinkex._downloads.hub._hub", lambda: hub)
    done = tinkex("-f", "json", "checkpoint", "push-hf", saved, base_url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    repo_id = json.loads(done.stdout)["repo_id"]
    run_id = saved.partition("//")[2].partition("/")[0].replace(":", "-")
    assert repo_id == f"me/tinker-{run_id}-weights-first"
    assert hub.calls[0][1]["repo_id"] == repo_id


# Billing


USAGE = {
    "data": [
        {
            "bucket_start": "2026-01-01T00:00:00Z",
            "bucket_end": "2026-01-01T01:00:00Z",
            "event_info": {"type": "sampling_prefill", "cached": True, "token_count": 1234567},
            "session_id": "s-1",
            "estimated_cost_usd": 0.5,
        },
        {
            "bucket_start": "2026-01-01T01:00:00Z",
            "bucket_end": "2026-01-01T02:00:00Z",
            "event_info": {"type": "teleport", "meters": 5},
        },
    ],
    "sessions": {"s-1": {"user_metadata": {"team": "a"}}},
}


def test_usage_is_shown(scripted: ScriptedServer, tmp_path):
    scripted.on("GET /api/v1/billing/usage/events", Answer(body=USAGE))
    arguments = ["billing", "usage", "2026-01-01", "2026-01-02"]
    table = tinkex(*arguments, base_url=scripted.url)
    assert (table.returncode, table.stderr) == (0, "")
    for text in ("2 entries", "1234567 tokens, cached", "teleport", "0.5000", "s-1"):
        assert text in table.stdout
    shown = json.loads(tinkex("-f", "json", *arguments, base_url=scripted.url).stdout)
    assert [event["event_info"] for event in shown["data"]] == [
        event["event_info"] for event in USAGE["data"]
    ]
    assert shown["sessions"] == USAGE["sessions"]
    assert shown["cost_data_through"] is None


def test_usage_is_written_as_csv(scripted: ScriptedServer, tmp_path):
    scripted.on("GET /api/v1/billing/usage/events", Answer(body=USAGE))
    arguments = ["billing", "usage", "2026-01-01", "2026-01-02"]
    sessions = tmp_path / "sessions.csv"
    done = tinkex(*arguments, "--csv", "-", "--sessions-csv", str(sessions), base_url=scripted.url)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = csv.DictReader(io.StringIO(done.stdout))
    assert (first["type"], first["token_count"], first["session_id"]) == (
        "sampling_prefill",
        "1234567",
        "s-1",
    )
    assert (second["type"], second["meters"], second["session_id"]) == ("teleport", "5", "")
    (session,) = csv.DictReader(sessions.read_text().splitlines())
    assert session == {"session_id": "s-1", "user_metadata": '{"team": "a"}'}


def test_storage_is_shown(scripted: ScriptedServer, tmp_path):
    row = {"checkpoint_count": 3, "size_bytes": 2**31, "size_gigabytes": 2.0, "user_email": "a@b"}
    answer = {"data": [row], "effective_rate_usd_per_gigabyte_month": 0.31}
    scripted.on("GET /api/v1/billing/usage/checkpoints/current", Answer(body=answer))
    table = tinkex("billing", "checkpoint-storage", base_url=scripted.url)
    assert (table.returncode, table.stderr) == (0, "")
    for text in ("0.3100", "a@b", "2.0 GiB"):
        assert text in table.stdout
    shown = tinkex("-f", "json", "billing", "checkpoint-storage", base_url=scripted.url)
    assert json.loads(shown.stdout) == answer
    path = tmp_path / "x.csv"
    tinkex("billing", "checkpoint-storage", "--csv", str(path), base_url=scripted.url)
    (line,) = csv.DictReader(path.read_text().splitlines())
    assert (line["checkpoint_count"], line["user_email"], line["project_id"]) == ("3", "a@b", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["billing", "usage", "2026-01-01", "2026-01-02"],
        ["billing", "checkpoint-storage"],
        ["run", "list"],
        ["checkpoint", "list"],
        ["session", "list"],
    ],
    ids=" ".join,
)
def test_a_server_without_the_route_is_one_clear_error(scripted: ScriptedServer, arguments):
    done = tinkex(*arguments, base_url=scripted.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"Error: 127\.0\.0\.1:\d+ does not have GET ", done.stderr)
    assert "Traceback" not in done.stderr


def test_ctrl_c_during_a_download_keeps_the_part_that_was_received(
    scripted: ScriptedServer, tmp_path
):
    path = "tinker://run-1/weights/final"
    route = "GET /api/v1/training_runs/run-1/checkpoints/weights/final/archive"
    scripted.on(route, Answer(body={"url": f"{scripted.url}/a.tar"}))
    body, never = bytes(200_000), threading.Event()
    headers = {"ETag": '"v1"'}
    scripted.on("GET /a.tar", Answer(200, body, headers, cut_after=131_072, hold=never))
    command = ["-m", "tinkex", "checkpoint", "download", path, "-o", str(tmp_path)]
    kept = tmp_path / ".run-1_weights_final.part" / "archive"
    with started(command, base_url=scripted.url) as process:
        scripted.wait_for("GET /a.tar")
        wait_until(lambda: kept.exists() and kept.stat().st_size > 0, "a part is written")
        ended = interrupt(process)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "\nInterrupted.\n")
    assert os.listdir(tmp_path) == [".run-1_weights_final.part"]
    assert kept.stat().st_size > 0

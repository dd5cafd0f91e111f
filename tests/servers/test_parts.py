"""The parts of a profile on their own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from click.testing import CliRunner
from servers.profiles import NAMES, ProfiledServer, bodies, ids, profile_named, results
from servers.profiles.numbers import ArrivalLane, FirstBodyLane, StrictLane
from servers.profiles.routes import RouteTable
from servers.profiles.table import settings_of
from servers.profiles.vocabulary import lenient

from tinkex.cli.serve import serve
from tinkex.errors import LocalServerError
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.lanes import Job
from tinkex.local.settings import ServerSettings
from tinkex.types import Datum, LoraConfig, ModelInput

SESSION = "0b8e5ad2-2f5c-4d0e-9f0a-3f6d2f0a1b2c"


def job(name: str) -> Job:
    return Job(name, lambda: name)


def test_the_error_about_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(LocalServerError, match="nope") as raised:
        ProfiledServer(DeterministicEngine(), profile="nope")
    assert all(name in str(raised.value) for name in NAMES)


def test_the_command_has_no_option_to_imitate_a_server() -> None:
    refused = CliRunner().invoke(serve, ["--port", "0", "--profile", "hosted"])
    assert refused.exit_code == 2
    assert "No such option" in refused.output


def test_an_imitated_server_runs_on_its_own() -> None:
    command = [sys.executable, "-m", "servers.profiles", "skyrl-0.3"]
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with requests.Session() as http:
            lists = http.get(f"{url}/api/v1/sessions", timeout=20)
            config = http.get(f"{url}/api/v1/client/config", timeout=20)
        process.terminate()
        assert process.wait(20) == 0
    assert (lists.status_code, lists.json()) == (404, {"detail": "Not Found"})
    assert (config.status_code, config.json()) == (405, {"detail": "Method Not Allowed"})


def test_a_hold_time_that_was_set_wins_over_the_profile() -> None:
    skyrl = profile_named("skyrl-0.3")
    assert settings_of(skyrl, ServerSettings()).retrieve_hold_s == 300.0
    assert settings_of(skyrl, ServerSettings(retrieve_hold_s=1.5)).retrieve_hold_s == 1.5


def test_only_the_hosted_profile_exchanges_keys_for_tokens() -> None:
    settings = ServerSettings(api_key="tml-key", jwt=True)
    jwt = {name: settings_of(profile_named(name), settings).jwt for name in NAMES}
    assert [name for name, on in jwt.items() if on] == ["hosted"]
    assert not settings_of(profile_named("hosted"), ServerSettings()).jwt  # nothing to exchange


def test_another_method_of_a_known_path_is_405() -> None:
    table = RouteTable(("GET runs/{id}", "DELETE runs/{id}/checkpoints/{cp}"), ())
    assert table.refusal("GET", "runs/r1") is None
    assert table.refusal("HEAD", "runs/r1") is None
    assert table.refusal("POST", "runs/r1") == 405
    assert table.refusal("GET", "runs/r1/more") == 404
    assert table.refusal("DELETE", "runs/r1/checkpoints/weights/c1") is None
    assert table.refusal("PUT", "runs/r1/checkpoints/weights/c1/ttl") == 405


def test_a_server_with_every_route_lacks_only_the_named_ones() -> None:
    table = RouteTable(None, ("POST forward",))
    assert table.refusal("POST", "forward") == 404
    assert table.refusal("POST", "forward_backward") is None


def test_faults_are_reported_in_the_words_of_fastapi() -> None:
    body = {"session_id": 5, "model_seq_id": 0, "lora_config": {"rank": 4, "alpha": 1}}
    found = bodies.faults("create_model", body, refuse_extras=True, new_runs=False)
    assert [(fault["type"], fault["loc"]) for fault in found] == [
        ("string_type", ["body", "session_id"]),
        ("missing", ["body", "base_model"]),
    ]
    body.update(session_id="s", base_model="m")
    (fault,) = bodies.faults("create_model", body, refuse_extras=True, new_runs=False)
    assert fault == {
        "type": "extra_forbidden",
        "loc": ["body", "lora_config", "alpha"],
        "msg": "Extra inputs are not permitted",
        "input": 1,
    }
    assert bodies.faults("create_model", body, refuse_extras=False, new_runs=False) == []


def test_a_body_that_is_no_object_is_one_fault() -> None:
    (fault,) = bodies.faults("get_info", [1], refuse_extras=False, new_runs=False)
    assert fault["type"] == "model_attributes_type"
    assert fault["loc"] == ["body"]


@pytest.mark.parametrize("value", [True, "1", 1.5])
def test_an_integer_field_takes_integers_only(value: object) -> None:
    body = {"model_id": "m", "seq_id": value, "adam_params": {}}
    (fault,) = bodies.faults("optim_step", body, refuse_extras=False, new_runs=False)
    assert fault["type"] == "int_type"


def test_ids_lose_and_regain_their_colons() -> None:
    text = f'{{"path":"tinker://{SESSION}:train:12/weights/a:b","at":"1:2"}}'.encode()
    plain = ids.outward(text)
    assert f"{SESSION}_train_12/weights/a:b".encode() in plain
    assert len(plain) == len(text)
    assert ids.inward(plain) == text
    assert ids.inward(b"not_train_1") == b"not_train_1"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_an_outward_path_converts_back(name: str, kind: str) -> None:
    profile = profile_named(name)
    path = f"tinker://{SESSION}:train:1/{kind}/c1"
    kinds = ("weights", "sampler_weights")
    assert path in results.path_inward(profile, results.path_outward(profile, path), kinds)


def test_requests_run_in_order_of_arrival() -> None:
    lane = ArrivalLane("m", "s")
    lane.add(3, b"c", job("third"))
    lane.add(1, b"a", job("first"))
    assert [ready.request_id for ready in lane.ready] == ["third", "first"]
    assert lane.find(3, b"c") == "third"
    assert lane.find(2, b"b") is None
    with pytest.raises(HTTPError) as raised:
        lane.find(3, b"other")
    assert raised.value.status == 409


def test_the_first_body_of_a_number_wins() -> None:
    lane = FirstBodyLane("m", "s")
    lane.add(1, b"a", None)  # refused, so the number is still free
    assert lane.find(1, b"b") is None
    lane.add(1, b"b", job("first"))
    assert lane.find(1, b"c") == "first"


def test_a_number_is_used_up_by_success_only() -> None:
    lane = StrictLane("m", "s")
    outcomes = []

    def fail() -> object:
        raise RuntimeError("tripped")

    for seq_id, run in ((1, lambda: "one"), (2, fail), (3, lambda: "three"), (2, lambda: "two"),
                        (3, lambda: "three")):  # fmt: skip
        named = lane.named(Job(f"m:{seq_id}", run))
        lane.add(seq_id, b"", named)
    names = [ready.request_id for ready in lane.ready]
    assert len(set(names)) == 5
    for ready in lane.ready:
        try:
            outcomes.append(ready.run())
        except (RuntimeError, HTTPError) as error:
            outcomes.append(str(error))
    assert outcomes == [
        "one", "tripped", "Sequence conflict: expected 2, got 3.", "two", "three"
    ]  # fmt: skip


def test_unknown_tokens_do_not_change_the_logprobs_of_others() -> None:
    engine = DeterministicEngine(vocab_size=100)
    wrapped = lenient(engine, tell_nan=True)
    wrapped.create("m", LoraConfig())
    known = Datum(
        ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [1.0] * 3}
    )
    strange = Datum(
        ModelInput.from_ints([1, 500, 3]), {"target_tokens": [600, 3, 4], "weights": [1.0] * 3}
    )
    outputs = wrapped.forward_backward("m", [known, strange], "cross_entropy", {}).loss_fn_outputs
    plain = engine.forward_backward("m", [known], "cross_entropy", {}).loss_fn_outputs
    first, second = (output["logprobs"].to_numpy() for output in outputs)
    assert first.tolist() == plain[0]["logprobs"].to_numpy().tolist()
    assert np.isnan(second).tolist() == [True, True, False]
    assert second[2] == first[2]
    assert second.dtype == np.float32


def test_unknown_targets_among_several_per_token() -> None:
    wrapped = lenient(DeterministicEngine(vocab_size=100), tell_nan=True)
    wrapped.create("m", LoraConfig())
    datum = Datum(
        ModelInput.from_ints([1, 500]),
        {"target_tokens": [[2, 600], [3, 4]], "weights": [[1.0, 1.0], [1.0, 1.0]]},
    )
    (output,) = wrapped.forward_backward("m", [datum], "cross_entropy", {}).loss_fn_outputs
    assert np.isnan(output["logprobs"].to_numpy()).tolist() == [[False, True], [True, True]]


def test_every_choice_is_made_by_some_profile() -> None:
    """A choice that no profile makes has no place in Profile."""
    profiles = [profile_named(name) for name in NAMES]
    for field in dataclasses.fields(profiles[0]):
        assert len({getattr(profile, field.name) for profile in profiles}) > 1, field.name

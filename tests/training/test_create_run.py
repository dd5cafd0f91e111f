"""Creating runs from checkpoints, on servers that do it in one request and on others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, List

import pytest
from servers.profiles import NAMES, ProfiledServer
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import API, MODEL, TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex.errors import (
    APIStatusError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RequestFailedError,
    RouteMissingError,
    UnprocessableEntityError,
)
from tinkex.local.engines.deterministic import DeterministicEngine

PATH = "tinker://mdl/checkpoints/c1"
INFO = {
    "base_model": "base",
    "is_lora": True,
    "lora_rank": 8,
    "train_unembed": False,
    "train_mlp": True,
    "train_attn": True,
}


def missing(*loc: str) -> Answer:
    """FastAPI's answer about a missing field, which repeats the entire body."""
    echo = {"session_id": "session-1", "model_seq_id": 0, "path": PATH, "optimizer": True}
    fault = {"type": "missing", "loc": ["body", *loc], "msg": "Field required", "input": echo}
    return Answer(422, {"detail": [fault]})


REFUSALS = [
    missing("model_id"),  # SkyRL
    Answer(400, {"detail": "Missing model_id"}),  # TuFT
    Answer(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "session_id"]}]}),
    Answer(500, b"Internal Server Error", content_type="text/plain"),
]


def refuse_new_runs(routes: TinkerRoutes, refusal: Answer) -> None:
    """Have load_weights accept only requests that name a model."""

    def load(received: Received) -> Answer:
        return routes.accept(received) if "model_id" in received.json() else refusal

    routes.serve("load_weights", load)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinkex.retry.RetryPolicy.delay_s", lambda *args: 0.001)


def paths(server: ScriptedServer) -> List[str]:
    relevant = ("load_weights", "create_model", "weights_info", "unload_model")
    names = [r.path[len(API) :] for r in server.requests()]
    return [name for name in names if name in relevant]


def test_a_run_is_created_in_one_request_if_the_server_can(
    scripted: ServiceClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    trainer = scripted.create_training_client_from_state_with_optimizer(PATH)
    assert paths(server) == ["load_weights"]
    assert routes.submitted("load_weights") == [
        {
            "session_id": "session-1",
            "model_seq_id": 0,
            "path": PATH,
            "optimizer": True,
            "type": "load_weights",
        }
    ]
    trainer.optim_step(types.AdamParams()).result(PATIENCE_S)
    assert routes.submitted("optim_step")[0]["seq_id"] == 1
    assert scripted.server_dialect.creates_runs_by_loading is True


@pytest.mark.parametrize("refusal", REFUSALS, ids=["skyrl", "tuft", "strict", "crash"])
def test_on_other_servers_the_run_is_created_first_and_loads_as_its_first_request(
    scripted: ServiceClient, server: ScriptedServer, routes: TinkerRoutes, refusal: Answer
) -> None:
    refuse_new_runs(routes, refusal)
    routes.serve("weights_info", Answer(body=INFO))
    trainer = scripted.create_training_client_from_state(PATH, user_metadata={"k": "v"})
    refused = 4 if refusal.status == 500 else 1
    tail = ["weights_info", "create_model", "load_weights"]
    assert paths(server) == ["load_weights"] * refused + tail
    assert routes.submitted("weights_info") == [{"tinker_path": PATH}]
    (created,) = routes.submitted("create_model")
    assert created["base_model"] == "base"
    assert created["model_seq_id"] == 0  # the number of the refused request
    assert created["user_metadata"] == {"k": "v"}
    assert created["lora_config"]["rank"] == 8
    assert created["lora_config"]["train_unembed"] is False
    assert routes.submitted("load_weights")[-1] == {
        "model_id": MODEL,
        "seq_id": 1,
        "path": PATH,
        "optimizer": False,
        "type": "load_weights",
    }
    trainer.optim_step(types.AdamParams()).result(PATIENCE_S)
    assert routes.submitted("optim_step")[0]["seq_id"] == 2
    assert "runs are created before a checkpoint is loaded" in str(scripted.server_dialect)

    scripted.create_training_client_from_state_with_optimizer(PATH)  # remembered
    assert paths(server) == ["load_weights"] * refused + tail * 2
    assert routes.submitted("load_weights")[-1]["optimizer"] is True


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(404, {"detail": "no checkpoint at that path"}), NotFoundError),
        (Answer(400, {"detail": "the path has no such form"}), BadRequestError),
        (missing("path"), UnprocessableEntityError),  # although the echo names fields of form 1
        (
            Answer(422, {"detail": [{"loc": ["body", "optimizer_config"]}]}),
            UnprocessableEntityError,
        ),
    ],
)
def test_an_error_about_something_else_is_reported(
    scripted: ServiceClient,
    server: ScriptedServer,
    routes: TinkerRoutes,
    answer: Answer,
    error: Any,
) -> None:
    routes.serve("load_weights", answer)
    with pytest.raises(error):
        scripted.create_training_client_from_state(PATH)
    assert paths(server) == ["load_weights"]
    assert scripted.server_dialect.creates_runs_by_loading is None


def test_once_one_request_has_worked_a_crash_is_an_ordinary_error(
    scripted: ServiceClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    scripted.create_training_client_from_state(PATH)
    routes.serve("load_weights", Answer(500, {"detail": "out of memory"}))
    with pytest.raises(InternalServerError, match="out of memory"):
        scripted.create_training_client_from_state(PATH)
    assert set(paths(server)) == {"load_weights"}


def test_a_base_model_suffices_if_weights_info_is_missing(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    refuse_new_runs(routes, REFUSALS[0])
    scripted.create_training_client_from_state(PATH, base_model="mine")
    (created,) = routes.submitted("create_model")
    assert (created["base_model"], created["lora_config"]["rank"]) == ("mine", 32)


def test_without_weights_info_and_base_model_the_error_says_what_is_needed(
    scripted: ServiceClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    refuse_new_runs(routes, REFUSALS[0])
    with pytest.raises(RouteMissingError) as caught:
        scripted.create_training_client_from_state_with_optimizer(PATH)
    assert "give base_model=" in str(caught.value)
    assert f"rank=...), then load_state_with_optimizer({PATH!r})" in str(caught.value)
    assert "create_model" not in paths(server)


def test_a_missing_checkpoint_is_not_taken_for_a_missing_route(
    scripted: ServiceClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    refuse_new_runs(routes, REFUSALS[0])
    routes.serve("weights_info", Answer(404, {"detail": f"no checkpoint {PATH}"}))
    with pytest.raises(NotFoundError, match="no checkpoint"):
        scripted.create_training_client_from_state(PATH, base_model="mine")
    assert "create_model" not in paths(server)


def test_a_run_whose_checkpoint_cannot_be_loaded_is_released(
    scripted: ServiceClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    failed = Answer(400, {"detail": "the ranks differ"})

    def load(received: Received) -> Answer:
        named = "model_id" in received.json()
        return routes.accepted("load_weights", failed) if named else REFUSALS[0]

    routes.serve("load_weights", load)
    routes.serve("unload_model", lambda received: routes.accepted("unload_model", Answer()))
    with pytest.raises(RequestFailedError, match="the ranks differ") as caught:
        scripted.create_training_client_from_state(PATH, base_model="mine")
    assert "create_lora_training_client('mine', rank=...)" in str(caught.value)
    assert routes.submitted("unload_model") == [{"model_id": MODEL, "type": "unload_model"}]


def test_if_both_ways_fail_both_errors_are_reported(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    routes.serve("load_weights", REFUSALS[1])
    routes.serve("weights_info", Answer(body=INFO))
    routes.serve("create_model", Answer(400, {"detail": "no room for another model"}))
    with pytest.raises(APIStatusError, match="no room") as caught:
        scripted.create_training_client_from_state(PATH)
    assert "Missing model_id" in str(caught.value)


def test_a_continued_run_keeps_an_unusual_optimizer(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    dimuon = {"type": "dimuon", "version": 1}
    refuse_new_runs(routes, REFUSALS[0])
    routes.serve("weights_info", Answer(body={**INFO, "optimizer_config": dimuon}))
    scripted.create_training_client_from_state_with_optimizer(PATH)
    scripted.create_training_client_from_state(PATH)
    resumed, fresh = routes.submitted("create_model")
    assert resumed["optimizer_config"] == dimuon
    assert "optimizer_config" not in fresh


@pytest.mark.parametrize("profile", NAMES)
def test_runs_continue_on_every_kind_of_server(profile: str) -> None:
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    adam = types.AdamParams(learning_rate=0.01)
    one = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})

    def train(trainer: TrainingClient) -> float:
        return trainer.train_step([one], "cross_entropy", adam).forward_backward.metrics["loss:sum"]

    with ProfiledServer(engine, profile=profile) as local:
        with ServiceClient(base_url=local.url, api_key="tml-key") as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            train(trainer)
            path = trainer.save_state("a").result(PATIENCE_S).path
            expected = train(trainer)
            with ThreadPoolExecutor(4) as pool:  # concurrently, before the form is known
                made = [
                    pool.submit(service.create_training_client_from_state_with_optimizer, path)
                    for _ in range(4)
                ]
                runs = [future.result(PATIENCE_S) for future in made]
            assert len({run.model_id for run in runs}) == 4
            assert {run.get_info().lora_rank for run in runs} == {4}
            assert {train(run) for run in runs} == {expected}

"""ServiceClient with the embedded server in this process, end to end."""

from __future__ import annotations

import importlib
import logging
import pickle
import threading
from concurrent.futures import as_completed
from typing import Any, Callable, List

import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex.errors import (
    APIStatusError,
    BadRequestError,
    ClientClosedError,
    ConfigError,
    InvalidInputError,
    LocalServerError,
    NotFoundError,
    TinkexError,
)
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine

DATUM = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
ADAM = types.AdamParams(learning_rate=0.01)


def test_local_starts_a_server_and_stops_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with ServiceClient.local("deterministic") as service:
            name = service.get_server_capabilities().supported_models[0].model_name
            assert name == "deterministic"
            trainer = service.create_lora_training_client(name)
            trainer.train_step([DATUM], "cross_entropy", ADAM)
            url = service.config.base_url
            assert url.startswith("http://127.0.0.1:")
            assert url in repr(service)
            assert "open" in repr(service)
        assert "closed" in repr(service)
        service.close()
    assert caplog.text == ""
    with pytest.raises(TinkexError):
        ServiceClient(base_url=url, startup_timeout_s=0.2)


def test_local_reports_slow_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(model: str, device: str, *, progress: Callable[[str], None]) -> DeterministicEngine:
        progress(f"downloading {model}")
        return DeterministicEngine()

    monkeypatch.setattr("tinkex.local.server.load_engine", load)
    with ServiceClient.local("a-model"):
        assert capsys.readouterr() == ("", "downloading a-model\n")
    lines: List[str] = []
    with ServiceClient.local("a-model", progress=lines.append):
        assert lines == ["downloading a-model"]
        assert capsys.readouterr() == ("", "")


def test_local_keeps_its_data_in_the_given_folder(tmp_path: Any) -> None:
    with ServiceClient.local("deterministic", data_dir=str(tmp_path)) as service:
        trainer = service.create_lora_training_client("deterministic")
        trainer.train_step([DATUM], "cross_entropy", ADAM)
        path = trainer.save_state("kept").result(PATIENCE_S).path
    with ServiceClient.local("deterministic", data_dir=str(tmp_path)) as service:
        again = service.create_training_client_from_state_with_optimizer(path)
        metrics = again.train_step([DATUM], "cross_entropy", ADAM).optim.metrics
        assert metrics is not None
        assert metrics["optimizer_steps:max"] == 2.0


def test_local_with_a_wrong_setting_leaves_no_server() -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="unknown setting"):
        ServiceClient.local("deterministic", no_such_setting=1)
    assert [t for t in threading.enumerate() if t not in before and "server" in t.name] == []


def test_local_with_an_unusable_data_folder(tmp_path: Any) -> None:
    taken = tmp_path / "a-file"
    taken.write_text("not a folder")
    with pytest.raises(LocalServerError, match="a-file"):
        ServiceClient.local("deterministic", data_dir=str(taken))


def test_a_script_for_the_official_sdk_runs_with_the_import_changed(local: LocalServer) -> None:
    tinker = importlib.import_module("tinkex")
    service = tinker.ServiceClient(base_url=local.url)
    # The newer style: calling result() on what creators return.
    trainer = service.create_lora_training_client(base_model="deterministic", rank=8).result()
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens=[1, 2, 3]),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(data=[2, 3, 4], dtype="int64", shape=[3]),
                "weights": tinker.TensorData(data=[1.0, 1.0, 0.0], dtype="float32", shape=[3]),
            },
        )
    ]
    forward_backward = trainer.forward_backward(data, "cross_entropy")
    optim = trainer.optim_step(tinker.AdamParams(learning_rate=1e-3))
    assert forward_backward.result().loss_fn_outputs[0]["logprobs"].to_numpy().shape == (3,)
    assert optim.result().metrics
    # The older style: creators return the client itself.
    sampler = trainer.save_weights_and_get_sampling_client(name="final")
    params = tinker.types.SamplingParams(max_tokens=4, temperature=0.0)
    response = sampler.sample(
        prompt=tinker.types.ModelInput.from_ints([1, 2]), sampling_params=params, num_samples=2
    ).result()
    assert [len(s.tokens) for s in response.sequences] == [4, 4]
    rest = service.create_rest_client()
    assert rest.list_training_runs().result().training_runs[0].lora_rank == 8
    with pytest.raises(tinker.APIStatusError):
        service.create_lora_training_client(base_model="unknown/model")
    service.close().result()


BAD_CALLS = {
    "unknown model": (lambda s: s.create_lora_training_client("no/such"), BadRequestError),
    "no model": (lambda s: s.create_lora_training_client(""), InvalidInputError),
    "rank 0": (lambda s: s.create_lora_training_client("deterministic", 0), InvalidInputError),
    "half a rank": (
        lambda s: s.create_lora_training_client("deterministic", 2.5),
        InvalidInputError,
    ),
    "nothing to train": (
        lambda s: s.create_lora_training_client(
            "deterministic", train_mlp=False, train_attn=False, train_unembed=False
        ),
        InvalidInputError,
    ),
    "a huge seed": (
        lambda s: s.create_lora_training_client("deterministic", seed=2**80),
        InvalidInputError,
    ),
    "a strange path": (
        lambda s: s.create_training_client_from_state("/tmp/weights"),
        InvalidInputError,
    ),
    "an unknown path": (
        lambda s: s.create_training_client_from_state("tinker://nobody/weights/x"),
        NotFoundError,
    ),
    "an unknown path with optimizer": (
        lambda s: s.create_training_client_from_state_with_optimizer("tinker://x/weights/y"),
        NotFoundError,
    ),
    "metadata that cannot be sent": (
        lambda s: s.create_lora_training_client("deterministic", user_metadata={"a": object()}),
        InvalidInputError,
    ),
    "a strange status": (lambda s: s.close("happy"), InvalidInputError),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_input_is_a_typed_error_that_pickles_and_the_session_continues(
    service: ServiceClient, what: str
) -> None:
    call, error = BAD_CALLS[what]
    with pytest.raises(error) as caught:
        call(service)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)
    assert again.status == caught.value.status
    trainer = service.create_lora_training_client("deterministic", rank=2)
    assert trainer.get_info().lora_rank == 2


def test_all_creators_have_twins_that_return_futures(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    path = trainer.save_state("a").result(PATIENCE_S).path
    sampler_path = trainer.save_weights_for_sampler("a").result(PATIENCE_S).path
    futures: List[Any] = [
        service.create_lora_training_client_future("deterministic"),
        service.create_training_client_from_state_future(path),
        service.create_training_client_from_state_with_optimizer_future(path),
        service.create_sampling_client_future(sampler_path),
        service.create_sampling_client_future(base_model="deterministic"),
        trainer.create_sampling_client_future(str(sampler_path)),
        trainer.save_weights_and_get_sampling_client_future(),
    ]
    made = [future.result(0) for future in as_completed(futures, PATIENCE_S)]
    kinds = sorted(type(client).__name__ for client in made)
    assert kinds == ["SamplingClient"] * 4 + ["TrainingClient"] * 3


def test_inflight_lists_unfinished_requests(
    scripted: ServiceClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    trainer = scripted.create_lora_training_client("base")
    routes.serve("retrieve_future", Answer(hold=threading.Event()))
    assert scripted.inflight() == []
    future = trainer.optim_step(ADAM)
    polls = len(server.requests("POST /api/v1/retrieve_future"))
    server.wait_for("POST /api/v1/retrieve_future", polls + (future.attempts == 0))
    assert scripted.inflight() == [future]
    assert "optim_step: waiting" in str(scripted.inflight()[0].status())
    future.cancel()
    assert scripted.inflight() == []


def test_the_dialect_is_known_after_the_first_batch(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    assert service.server_dialect.encoding is None
    trainer.forward([DATUM], "cross_entropy").result(PATIENCE_S)
    assert service.server_dialect.encoding == "protobuf"


@pytest.mark.parametrize("wire", ["json", "protobuf"])
def test_both_dialects_train_alike(local: LocalServer, wire: str) -> None:
    with ServiceClient(base_url=local.url, wire=wire) as service:
        trainer = service.create_lora_training_client("deterministic")
        forward = trainer.forward([DATUM], "cross_entropy").result(PATIENCE_S)
        step = trainer.train_step([DATUM], "cross_entropy", ADAM)
        assert service.server_dialect.encoding == wire
        assert step.forward_backward.metrics == forward.metrics
        assert step.optim.metrics is not None
        assert step.optim.metrics["optimizer_steps:max"] == 1.0


def test_a_client_given_both_config_and_settings(service: ServiceClient) -> None:
    with pytest.raises(InvalidInputError, match="not both"):
        ServiceClient(config=service.config, api_key="k")


def test_a_session_that_the_server_ended_is_reported_with_the_remedy(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, heartbeat_interval_s=0.02) as service:
        trainer = service.create_lora_training_client("base")
        path = trainer.save_state("a").result(PATIENCE_S).path
        routes.serve("session_heartbeat", Answer(410))
        routes.serve("optim_step", Answer(404, {"detail": "unknown model"}))
        manager = service._runtime.session.manager
        wait_until(lambda: manager.lost_reason(service.session_id) is not None, "it is lost")
        with pytest.raises(TinkexError) as caught:
            trainer.optim_step(ADAM).result(PATIENCE_S)
    assert type(caught.value).__name__ == "SessionLostError"
    assert path in str(caught.value)
    assert isinstance(caught.value.__cause__, APIStatusError)


def test_a_closed_service_refuses_every_call_and_names_itself(service: ServiceClient) -> None:
    service.close()
    for call in (
        lambda: service.create_lora_training_client("deterministic"),
        lambda: service.create_sampling_client(base_model="deterministic"),
        lambda: service.create_training_client_from_state("tinker://x/weights/y"),
        service.create_rest_client,
        service.get_server_capabilities,
    ):
        with pytest.raises(ClientClosedError, match=service.session_id):
            call()

"""TrainingClient: the seq_ids of its requests, and training end to end."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, Iterator, List

import numpy as np
import pytest
from support.relay import Relay
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import MODEL, TinkerRoutes

from tinkex import RetryConfig, ServiceClient, TrainingClient, types
from tinkex.clients import training as training_client
from tinkex.errors import (
    APIConnectionError,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ConfigError,
    ConflictError,
    InvalidInputError,
    RequestFailedError,
    ResponseDecodeError,
    RouteMissingError,
)
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ClientFlags, ServerSettings
from tinkex.wire.proto_codec import PROTOBUF

ADAM = types.AdamParams(learning_rate=0.01)


def datum(seed: int = 0, length: int = 8) -> types.Datum:
    tokens = np.random.default_rng(seed).integers(1, 1000, length + 1)
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": [1.0] * length},
    )


@pytest.fixture
def scripted_trainer(scripted: ServiceClient) -> TrainingClient:
    return scripted.create_lora_training_client("base")


# Order and numbers


def test_calls_are_sent_in_order_with_seq_ids_from_one(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    trainer = scripted_trainer
    futures: List[Any] = []
    for _ in range(3):
        futures.append(trainer.forward_backward([datum()], "cross_entropy"))
        futures.append(trainer.optim_step(ADAM))
    futures.append(trainer.save_state("a"))
    futures.append(trainer.load_state("tinker://x/weights/a"))
    futures.append(trainer.load_state_with_optimizer("tinker://x/weights/a"))
    futures.append(trainer.save_weights_for_sampler("a"))
    futures.append(trainer.save_weights_and_get_sampling_client_future())
    futures.append(trainer.forward([datum()], "cross_entropy"))
    for future in futures:
        future.result(PATIENCE_S)
    assert routes.seq_ids() == list(range(1, 13))
    assert [b.seq_id for b in routes.submitted("forward_backward")] == [1, 3, 5, 12]
    assert routes.submitted("forward_backward")[-1].forward_only
    assert [b["optimizer"] for b in routes.submitted("load_weights")] == [False, True]


def test_submission_does_not_wait_for_results(
    scripted_trainer: TrainingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    release = threading.Event()
    routes.serve("retrieve_future", lambda r: Answer(body=routes.retrieve(r).body, hold=release))
    first = scripted_trainer.forward_backward([datum()], "cross_entropy")
    second = scripted_trainer.optim_step(ADAM)
    server.wait_for("POST /api/v1/optim_step")
    assert not first.done()
    release.set()
    assert second.result(PATIENCE_S).metrics == {"grad_norm:mean": 1.0}


BAD_CALLS = {
    "an empty batch": lambda t: t.forward_backward([], "cross_entropy"),
    "one datum for a batch": lambda t: t.forward_backward(datum(), "cross_entropy"),
    "a wrong length": lambda t: t.forward(
        [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [1]})], "cross_entropy"
    ),
    "NaN weights": lambda t: t.forward_backward(
        [
            types.Datum(
                types.ModelInput.from_ints([1, 2]),
                {"target_tokens": [1, 2], "weights": [1.0, float("nan")]},
            )
        ],
        "cross_entropy",
    ),
    "ragged loss inputs": lambda t: t.forward_backward(
        [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [[1], [2, 3]]})],
        "cross_entropy",
    ),
    "a negative token": lambda t: types.ModelInput.from_ints([-1]),
    "no loss": lambda t: t.forward_backward([datum()], ""),
    "a NaN setting": lambda t: t.forward_backward([datum()], "ppo", {"clip": float("nan")}),
    "metadata that is no map": lambda t: t.save_state("a", user_metadata=["x"]),
    "metadata that is no text": lambda t: t.save_weights_for_sampler("a", None, {"when": 5}),
    "one recipient for a list": lambda t: t.save_weights_external("a", None, "age1x"),
    "no recipient": lambda t: t.save_weights_external("a", age_encryption_recipients=[]),
    "an external checkpoint with slashes": lambda t: t.save_weights_external("a/b"),
    "no Adam": lambda t: t.optim_step(),
    "two Adams": lambda t: t.optim_step(ADAM, adam_params=ADAM),
    "a learning rate for Adam": lambda t: t.optim_step(0.1),
    "a learning rate for a step": lambda t: t.train_step([datum()], "cross_entropy", 0.1),
    "a NaN learning rate": lambda t: t.optim_step(types.AdamParams(learning_rate=float("nan"))),
    "an empty name": lambda t: t.save_state(""),
    "a path for a name": lambda t: t.save_state("tinker://x/weights/a"),
    "a name that climbs": lambda t: t.save_weights_for_sampler(".."),
    "no time to live": lambda t: t.save_state("a", ttl_seconds=0),
    "words to live": lambda t: t.save_weights_for_sampler("a", ttl_seconds="1h"),
    "a file for a path": lambda t: t.load_state("/tmp/weights"),
    "nothing for a path": lambda t: t.load_state_with_optimizer("tinker://"),
    "no path": lambda t: t.create_sampling_client(None),
    "no target": lambda t: t.forward_backward_custom(
        [types.Datum(types.ModelInput.from_ints([1]), {})], lambda d, p: (p[0].sum(), {})
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_refused_immediately_and_uses_no_seq_id(
    scripted_trainer: TrainingClient, routes: TinkerRoutes, call: str
) -> None:
    if call == "no target" and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    scripted_trainer.optim_step(ADAM).result(PATIENCE_S)
    before = routes.count()
    with pytest.raises(InvalidInputError) as caught:
        BAD_CALLS[call](scripted_trainer)
    assert isinstance(caught.value, ValueError)
    assert routes.count() == before
    scripted_trainer.optim_step(ADAM).result(PATIENCE_S)
    assert routes.seq_ids() == [1, 2]


def test_a_request_that_cannot_be_encoded_uses_no_seq_id(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    with pytest.raises(InvalidInputError, match="JSON"):
        scripted_trainer.save_state("a", user_metadata={"k": "\ud800"}).result(PATIENCE_S)
    scripted_trainer.optim_step(ADAM).result(PATIENCE_S)
    assert routes.seq_ids() == [1]


def test_a_call_cancelled_in_the_queue_is_not_sent(
    scripted_trainer: TrainingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    release = threading.Event()
    routes.serve("optim_step", lambda r: Answer(body=routes.accept(r).body, hold=release))
    first = scripted_trainer.optim_step(ADAM)
    server.wait_for("POST /api/v1/optim_step")
    second = scripted_trainer.forward_backward([datum()], "cross_entropy")
    third = scripted_trainer.optim_step(ADAM)
    assert second.cancel()
    release.set()
    first.result(PATIENCE_S)
    third.result(PATIENCE_S)
    assert routes.seq_ids() == [1, 2]
    with pytest.raises(CancelledError):
        second.result()


def test_a_response_without_a_request_id_is_a_decode_error(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("optim_step", Answer(body={"unexpected": 1}))
    with pytest.raises(ResponseDecodeError, match="POST /api/v1/optim_step"):
        scripted_trainer.optim_step(ADAM).result(PATIENCE_S)


def test_a_result_without_the_path_is_a_decode_error(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("retrieve_future", Answer(body={}))
    with pytest.raises(ResponseDecodeError, match="path"):
        scripted_trainer.save_weights_for_sampler("a").result(PATIENCE_S)
    with pytest.raises(ResponseDecodeError, match="sampling_session_id"):
        scripted_trainer.save_weights_and_get_sampling_client()


def test_a_sampler_of_another_runs_checkpoint_does_not_claim_our_base_model(
    scripted_trainer: TrainingClient, server: ScriptedServer
) -> None:
    server.on(
        "GET /api/v1/samplers/session-1:sample:0",
        Answer(body={"sampler_id": "session-1:sample:0", "base_model": "another"}),
    )
    own = scripted_trainer.create_sampling_client(
        f"tinker://{scripted_trainer.model_id}/sampler_weights/a"
    )
    assert own.get_base_model() == "base"
    strange = scripted_trainer.create_sampling_client("tinker://other/sampler_weights/a")
    assert strange.get_base_model() == "another"


def test_a_custom_loss_without_torch_names_what_to_install(
    scripted: ServiceClient,
    scripted_trainer: TrainingClient,
    routes: TinkerRoutes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="torch") as caught:
        scripted_trainer.forward_backward_custom([datum()], lambda d, p: (p[0].sum(), {}))
    assert "pip install" in str(caught.value)
    with pytest.raises(ConfigError, match="create_custom_loss needs torch"):
        scripted.create_custom_loss(lambda logprobs: (logprobs.sum(), {}), {"logprobs": 1})
    assert routes.seq_ids() == []


# Chunks


@pytest.fixture
def small_parts() -> Iterator[TrainingClient]:
    """A run on an embedded server that takes at most three datums per request."""
    settings = ServerSettings(flags=ClientFlags(fwdbwd_max_chunk_len=3))
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with LocalServer(engine, settings=settings) as server:
        with ServiceClient(base_url=server.url) as client:
            yield client.create_lora_training_client("deterministic", rank=4)


def test_a_large_batch_is_sent_in_parts_and_joined(
    trainer: TrainingClient, small_parts: TrainingClient
) -> None:
    data = [datum(seed) for seed in range(7)]
    unsplit = trainer.forward_backward(data, "cross_entropy").result(PATIENCE_S)
    parts = small_parts.forward_backward(data, "cross_entropy").result(PATIENCE_S)
    assert len(parts.loss_fn_outputs) == 7
    for mine, theirs in zip(parts.loss_fn_outputs, unsplit.loss_fn_outputs):
        np.testing.assert_array_equal(mine["logprobs"].to_numpy(), theirs["logprobs"].to_numpy())
    assert parts.metrics["loss:sum"] == pytest.approx(unsplit.metrics["loss:sum"])


@pytest.mark.parametrize(("datums", "size"), [(2, 10**6), (100, 1), (100, 2 * datum().nbytes)])
def test_parts_get_consecutive_seq_ids(
    server: ScriptedServer, routes: TinkerRoutes, datums: int, size: int
) -> None:
    flags = {"fwdbwd_max_chunk_len": datums, "fwdbwd_max_chunk_bytes_count": size}
    routes.serve("client/config", Answer(body=flags))
    data = [datum(seed) for seed in range(4)]
    with ServiceClient(base_url=server.url, wire="protobuf") as client:
        trainer = client.create_lora_training_client("base")
        future = trainer.forward_backward(data, "cross_entropy")
        step = trainer.optim_step(ADAM)
        assert future.result(PATIENCE_S).metrics == {"loss:sum": 4.0}
        step.result(PATIENCE_S)
    sent = routes.submitted("forward_backward")
    assert len(sent) == (4 if size == 1 else 2)
    assert [d for batch in sent for d in batch.data] == data
    assert routes.seq_ids() == list(range(1, len(sent) + 2))


# End to end


def test_training_lowers_the_loss_step_by_step(trainer: TrainingClient) -> None:
    data = [datum(seed) for seed in range(4)]
    losses = []
    for number in range(1, 6):
        step = trainer.train_step(data, "cross_entropy", ADAM)
        losses.append(step.forward_backward.metrics["loss:sum"])
        assert step.optim.metrics is not None
        assert step.optim.metrics["optimizer_steps:max"] == number
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


def test_outputs_come_in_input_order_as_float32(trainer: TrainingClient) -> None:
    data = [datum(1, 3), datum(2, 9), datum(3, 1)]
    output = trainer.forward(data, "cross_entropy").result(PATIENCE_S)
    logprobs = [fields["logprobs"].to_numpy() for fields in output.loss_fn_outputs]
    assert [p.shape for p in logprobs] == [(3,), (9,), (1,)]
    assert {p.dtype for p in logprobs} == {np.dtype(np.float32)}
    assert output.metrics["loss:sum"] == pytest.approx(-sum(p.sum() for p in logprobs), rel=1e-5)


def test_a_learning_rate_may_be_a_numpy_number(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    rate: Any = np.linspace(0, 1, 5, dtype=np.float32)[1]
    scripted_trainer.optim_step(types.AdamParams(learning_rate=rate)).result(PATIENCE_S)
    assert routes.submitted("optim_step")[0]["adam_params"]["learning_rate"] == 0.25


def test_a_forward_pass_leaves_no_gradient(trainer: TrainingClient) -> None:
    trainer.forward([datum()], "cross_entropy").result(PATIENCE_S)
    metrics = trainer.optim_step(adam_params=ADAM).result(PATIENCE_S).metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] == 0.0


def test_saved_state_is_restored_with_and_without_the_optimizer(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    data = [datum()]

    def loss(client: TrainingClient) -> float:
        return client.forward(data, "cross_entropy").result(PATIENCE_S).metrics["loss:sum"]

    def optimizer_steps(client: TrainingClient) -> float:
        metrics = client.train_step(data, "cross_entropy", ADAM).optim.metrics
        assert metrics is not None
        return metrics["optimizer_steps:max"]

    for _ in range(2):
        trainer.train_step(data, "cross_entropy", ADAM)
    saved_loss = loss(trainer)
    path = trainer.save_state("two-steps").result(PATIENCE_S).path
    trainer.train_step(data, "cross_entropy", ADAM)
    assert loss(trainer) < saved_loss
    trainer.load_state_with_optimizer(path).result(PATIENCE_S)
    assert loss(trainer) == saved_loss
    assert optimizer_steps(trainer) == 3.0
    trainer.load_state(path).result(PATIENCE_S)
    assert loss(trainer) == saved_loss
    assert optimizer_steps(trainer) == 1.0

    again = service.create_training_client_from_state_with_optimizer(path)
    assert loss(again) == saved_loss
    assert optimizer_steps(again) == 3.0
    fresh = service.create_training_client_from_state(path)
    assert loss(fresh) == saved_loss
    assert optimizer_steps(fresh) == 1.0
    assert len({trainer.model_id, again.model_id, fresh.model_id}) == 3


def test_a_checkpoint_name_is_refused_a_second_time_unless_overwritten(
    trainer: TrainingClient,
) -> None:
    first = trainer.save_state("name", user_metadata={"k": "v"}).result(PATIENCE_S)
    with pytest.raises(ConflictError, match="name"):
        trainer.save_state("name").result(PATIENCE_S)
    again = trainer.save_state("name", ttl_seconds=3600, overwrite=True).result(PATIENCE_S)
    assert again.path == first.path


def test_named_and_ephemeral_weights_for_sampling(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    prompt = types.ModelInput.from_ints([1, 2, 3])
    before = service.create_sampling_client(base_model="deterministic")
    base = before.compute_logprobs(prompt).result(PATIENCE_S)
    trainer.train_step([datum()], "cross_entropy", ADAM)
    path = trainer.save_weights_for_sampler("s1").result(PATIENCE_S).path
    assert path is not None
    named = trainer.create_sampling_client(path)
    ephemeral = trainer.save_weights_and_get_sampling_client("ignored")
    assert named.sampling_session_id != ephemeral.sampling_session_id
    assert named.get_base_model() == ephemeral.get_base_model() == "deterministic"
    trained = named.compute_logprobs(prompt).result(PATIENCE_S)
    assert trained == ephemeral.compute_logprobs(prompt).result(PATIENCE_S)
    assert trained != base


def test_get_info_is_requested_once(
    scripted_trainer: TrainingClient, server: ScriptedServer
) -> None:
    info = scripted_trainer.get_info()
    assert info.model_data.model_name == "base"
    assert scripted_trainer.get_info() is info
    assert len(server.requests("POST /api/v1/get_info")) == 1
    assert "session-1:train:0" in repr(scripted_trainer)


def test_the_tokenizer_comes_from_the_server(
    scripted: ServiceClient, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(training_client, "load_tokenizer", lambda *a: asked.append(a))
    info = {"model_id": "m", "model_data": {"model_name": "base", "tokenizer_id": "org/tok"}}
    routes.serve("get_info", Answer(body=info))
    scripted.create_lora_training_client("base").get_tokenizer()
    assert asked == [("base", "org/tok")]


def test_server_side_failures_are_typed_and_the_run_continues(trainer: TrainingClient) -> None:
    no_targets = types.Datum(types.ModelInput.from_ints([1, 2]), {"weights": [1.0, 1.0]})
    with pytest.raises(RequestFailedError) as caught:
        trainer.forward_backward([no_targets], "cross_entropy").result(PATIENCE_S)
    assert caught.value.category == "user"
    assert caught.value.request_id is not None
    with pytest.raises(BadRequestError, match=r"'nonsense' is unknown; there are cross_entropy"):
        trainer.forward_backward([datum()], "nonsense").result(PATIENCE_S)
    too_long = types.Datum(types.ModelInput.from_ints([1] * 65), {"target_tokens": [1] * 65})
    with pytest.raises(BadRequestError, match="at most 64"):
        trainer.forward_backward([too_long], "cross_entropy").result(PATIENCE_S)
    bad = types.Datum(types.ModelInput.from_ints([1000]), {"target_tokens": [1]})
    with pytest.raises(BadRequestError, match="token 1000"):
        trainer.forward_backward([bad], "cross_entropy").result(PATIENCE_S)
    step = trainer.train_step([datum()], "cross_entropy", ADAM)
    assert step.optim.metrics is not None
    assert step.optim.metrics["optimizer_steps:max"] == 1.0


def test_many_threads_may_share_a_client(trainer: TrainingClient) -> None:
    data = [datum(seed) for seed in range(40)]
    alone = [trainer.forward([d], "cross_entropy").result(PATIENCE_S) for d in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda d: trainer.forward([d], "cross_entropy").result(PATIENCE_S), data)
        )
    assert [t.metrics for t in together] == [a.metrics for a in alone]


def test_threads_that_share_a_client_share_its_seq_ids(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = pool.map(lambda _: scripted_trainer.optim_step(ADAM), range(80))
        for future in futures:
            future.result(PATIENCE_S)
    assert routes.seq_ids() == list(range(1, 81))


def test_a_dropped_client_still_sends_its_queued_requests(service: ServiceClient) -> None:
    futures = [
        service.create_lora_training_client("deterministic").forward([datum(s)], "cross_entropy")
        for s in range(3)
    ]
    gc.collect()
    for future in futures:
        assert future.result(PATIENCE_S).metrics["loss:sum"] > 0


def test_the_thread_of_a_dropped_client_ends(service: ServiceClient) -> None:
    trainer = service.create_lora_training_client("deterministic")
    trainer.optim_step(ADAM).result(PATIENCE_S)
    name = f"tinkex-submit-{trainer.model_id}"
    alive = weakref.ref(trainer)
    assert name in {t.name for t in threading.enumerate()}
    del trainer
    gc.collect()
    assert alive() is None
    wait_until(lambda: name not in {t.name for t in threading.enumerate()}, "its thread ended")


# Optimizers


@pytest.mark.parametrize(
    ("optimizer", "sent"),
    [
        (None, None),
        (types.AdamOptimizerConfig(), None),
        (types.DimuonOptimizerConfig(), {"type": "dimuon", "version": 1}),
        ({"type": "lion", "beta": 0.5}, {"type": "lion", "beta": 0.5}),
    ],
)
def test_the_optimizer_of_a_run_is_sent_unless_it_is_the_default(
    scripted: ServiceClient, routes: TinkerRoutes, optimizer: Any, sent: Any
) -> None:
    scripted.create_lora_training_client("base", optimizer=optimizer)
    scripted.create_training_client_from_state("tinker://x/weights/a", optimizer=optimizer)
    for route in ("create_model", "load_weights"):
        (body,) = routes.submitted(route)
        assert body.get("optimizer_config") == sent
        assert ("optimizer_config" in body) == (sent is not None)


def test_an_optimizer_without_a_type_is_refused(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    before = routes.count()
    with pytest.raises(InvalidInputError, match="no type"):
        scripted.create_lora_training_client("base", optimizer={"version": 1})
    with pytest.raises(InvalidInputError, match="optimizer is 5; it must be an object"):
        scripted.create_training_client_from_state("tinker://x/weights/a", optimizer=5)
    assert routes.count() == before


def test_steps_of_other_optimizers_are_sent_in_another_field(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    scripted_trainer.optim_step(types.DimuonParams(learning_rate=0.02)).result(PATIENCE_S)
    scripted_trainer.train_step([datum()], "cross_entropy", {"type": "lion", "rate": 1})
    dimuon, lion = routes.submitted("optim_step")
    assert dimuon["optimizer_params"]["type"] == "dimuon"
    assert dimuon["optimizer_params"]["learning_rate"] == 0.02
    assert lion["optimizer_params"] == {"type": "lion", "rate": 1}
    assert "adam_params" not in dimuon


def test_an_optimizer_that_the_embedded_server_lacks_is_named(service: ServiceClient) -> None:
    with pytest.raises((BadRequestError, RequestFailedError), match="dimuon"):
        service.create_lora_training_client(
            "deterministic", optimizer=types.DimuonOptimizerConfig()
        )


# Less common requests


def test_external_weights_are_encrypted_for_the_given_recipients(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("save_weights_external", Answer(body={"request_id": "external"}))
    saved = {"path": "tinker://x/external_weights/a", "size_bytes": 7}
    routes.results["external"] = Answer(body=saved)
    recipients = ["age1x", "age1y"]
    future = scripted_trainer.save_weights_external("a", 3600, recipients)
    recipients.clear()
    assert future.result(PATIENCE_S) == types.SaveWeightsExternalResponse(**saved)
    scripted_trainer.save_weights_external("b").result(PATIENCE_S)
    first, second = routes.submitted("save_weights_external")
    assert first == {
        "model_id": scripted_trainer.model_id,
        "seq_id": 1,
        "path": "a",
        "ttl_seconds": 3600,
        "age_encryption_recipients": ["age1x", "age1y"],
        "type": "save_weights_external",
    }
    assert set(second) == {"model_id", "seq_id", "path", "type"}


def test_a_route_that_the_server_lacks_uses_no_seq_id(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("save_weights_external", Answer(404, {"detail": "Not Found"}))
    with pytest.raises(RouteMissingError, match="save_weights_external"):
        scripted_trainer.save_weights_external("a").result(PATIENCE_S)
    scripted_trainer.optim_step(ADAM).result(PATIENCE_S)
    assert [body["seq_id"] for body in routes.submitted("optim_step")] == [1]


def test_samplers_may_follow_the_weights_and_have_their_own_settings(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    retries = RetryConfig(max_connections=3)
    fixed = scripted_trainer.save_weights_and_get_sampling_client()
    moving = scripted_trainer.save_weights_and_get_sampling_client(
        retry_config=retries, record_stability_info=True, kind="inflight"
    )
    first, second = routes.submitted("save_weights_for_sampler")
    assert "kind" not in first
    assert second["kind"] == "inflight"
    assert "path" not in second
    prompt = types.ModelInput.from_ints([1, 2])
    for client in (fixed, moving):
        client.sample(prompt).result(PATIENCE_S)
    asked = routes.submitted("asample")
    assert ["record_stability_info" in body for body in asked] == [False, True]
    bad: Any = {"max_connections": 3}
    with pytest.raises(InvalidInputError, match="RetryConfig"):
        scripted_trainer.save_weights_and_get_sampling_client(retry_config=bad)
    with pytest.raises(InvalidInputError, match="'snapshot' or 'inflight'"):
        scripted_trainer.save_weights_and_get_sampling_client(kind="live")


def test_unloading_waits_for_all_other_requests(
    scripted_trainer: TrainingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    release = threading.Event()
    routes.serve("retrieve_future", lambda r: dataclasses.replace(routes.retrieve(r), hold=release))
    routes.serve("unload_model", Answer(body={"request_id": "unload"}))
    routes.results["unload"] = Answer(body={"model_id": scripted_trainer.model_id})
    polls = len(server.requests("POST /api/v1/retrieve_future"))
    step = scripted_trainer.optim_step(ADAM)
    unloaded = scripted_trainer.unload()
    with pytest.raises(ClientClosedError):
        scripted_trainer.optim_step(ADAM)
    server.wait_for("POST /api/v1/retrieve_future", polls + 1)
    assert routes.submitted("unload_model") == []
    release.set()
    assert unloaded.result(PATIENCE_S).model_id == scripted_trainer.model_id
    assert step.done()
    body = {"model_id": scripted_trainer.model_id, "type": "unload_model"}
    assert routes.submitted("unload_model") == [body]


def test_a_server_that_cannot_unload_is_reported(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("unload_model", Answer(405, {"detail": "Method Not Allowed"}))
    with pytest.raises(RouteMissingError, match="unload_model"):
        scripted_trainer.unload().result(PATIENCE_S)


def test_weights_are_copied_into_the_clients_project(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve("copy_weights", Answer(body={"tinker_path": "tinker://y/weights/a"}))
    with ServiceClient(base_url=server.url, project_id="p-1") as client:
        copied = client.copy_weights(
            "tinker://x/weights/a", ttl_seconds=3600, weights_access_token="secret-token"
        )
        assert copied.result(PATIENCE_S) == "tinker://y/weights/a"
        with pytest.raises(InvalidInputError, match="checkpoint path"):
            client.copy_weights("weights/a")
    (received,) = server.requests("POST /api/v1/copy_weights")
    assert received.json() == {
        "source_path": "tinker://x/weights/a",
        "destination_project_id": "p-1",
        "ttl_seconds": 3600,
    }
    assert received.headers["x-tinker-weights-access-token"] == "secret-token"


def test_urls_of_the_console(scripted: ServiceClient, scripted_trainer: TrainingClient) -> None:
    base = "https://tinker.thinkingmachines.ai"
    run = "session-1%3Atrain%3A0"
    assert scripted.get_console_url() == f"{base}/sessions/session-1"
    assert scripted_trainer.get_console_url() == f"{base}/training_runs/{MODEL}"
    saved = scripted_trainer.save_state("a").result(PATIENCE_S)
    assert saved.get_console_url() == f"{base}/checkpoints/{run}/weights%2Fa"
    named = scripted_trainer.save_weights_for_sampler("a").result(PATIENCE_S)
    assert named.get_console_url() == f"{base}/checkpoints/{run}/sampler_weights%2Fa"
    opaque = types.SaveWeightsResponse("tinker://m/checkpoints/c 1")
    assert opaque.get_console_url() == f"{base}/checkpoints/m/checkpoints%2Fc%201"
    path = f"tinker%3A%2F%2F{run}%2Fsampler_weights%2Fa"
    assert named.get_playground_url() == f"{base}/playground?mode=checkpoint&checkpoint={path}"


def test_telemetry_is_off_by_default(
    scripted: ServiceClient, scripted_trainer: TrainingClient
) -> None:
    assert scripted.get_telemetry() is None
    assert scripted_trainer.get_telemetry() is None


# Closed


def test_a_closed_client_raises_and_leaves_the_session_open(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    queued = trainer.forward([datum()], "cross_entropy")
    trainer.close()
    trainer.close()
    for call in (
        lambda: trainer.forward_backward([datum()], "cross_entropy"),
        lambda: trainer.optim_step(ADAM),
        lambda: trainer.save_state("a"),
        lambda: trainer.get_info(),
        lambda: trainer.save_weights_and_get_sampling_client(),
        lambda: trainer.create_sampling_client("tinker://x/weights/a"),
    ):
        with pytest.raises(ClientClosedError, match="TrainingClient"):
            call()
    assert queued.result(PATIENCE_S).metrics["loss:sum"] > 0
    assert service.create_lora_training_client("deterministic").get_info().lora_rank == 32


def test_closing_the_service_ends_its_runs(service: ServiceClient, trainer: TrainingClient) -> None:
    service.close()
    with pytest.raises(ClientClosedError, match=f"optim_step.*{service.session_id}"):
        trainer.optim_step(ADAM)
    with pytest.raises(ClientClosedError, match="get_info"):
        trainer.get_info()


def test_closing_the_service_wakes_waiting_threads(
    scripted: ServiceClient,
    scripted_trainer: TrainingClient,
    routes: TinkerRoutes,
    server: ScriptedServer,
) -> None:
    routes.serve("retrieve_future", Answer(hold=threading.Event()))
    polls = len(server.requests("POST /api/v1/retrieve_future"))
    with ThreadPoolExecutor(3) as pool:
        futures = [scripted_trainer.forward_backward([datum()], "cross_entropy") for _ in range(3)]
        waiters = [pool.submit(f.exception, PATIENCE_S) for f in futures]
        server.wait_for("POST /api/v1/retrieve_future", polls + 1)
        scripted.close()
        for waiter in waiters:
            assert isinstance(waiter.result(PATIENCE_S), ClientClosedError)


# Numbers after trouble


def test_the_seq_id_of_a_request_without_a_response_is_reused(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_outage_s=0.1) as service:
        trainer = service.create_lora_training_client("base")
        trainer.optim_step(ADAM).result(PATIENCE_S)
        routes.serve("optim_step", Answer(drop=True))
        with pytest.raises(APIConnectionError):
            trainer.optim_step(ADAM).result(PATIENCE_S)
        lost = len(routes.seq_ids())
        routes.serve("optim_step", routes.accept)
        trainer.optim_step(ADAM).result(PATIENCE_S)
        trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids()[:1] + routes.seq_ids()[lost:] == [1, 2, 3]


def test_a_lost_batch_is_resent_unchanged_although_its_arrays_were_reused(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_outage_s=0.1) as service:
        trainer = service.create_lora_training_client("base")
        trainer.forward_backward([datum()], "cross_entropy").result(PATIENCE_S)
        batch = datum(1)
        targets = batch.loss_fn_inputs["target_tokens"].values
        routes.serve("forward_backward", Answer(drop=True))
        with pytest.raises(APIConnectionError):
            trainer.forward_backward([batch], "cross_entropy").result(PATIENCE_S)
        targets[:] = 7  # the batch has failed, so its owner may
        routes.serve("forward_backward", routes.accept_pass)
        trainer.forward_backward([batch], "cross_entropy").result(PATIENCE_S)
    _first, *lost, again, new = server.requests("POST /api/v1/forward_backward")
    assert {received.body for received in lost} == {again.body}
    seven = PROTOBUF.decode_forward_backward(new.body)
    assert seven.data == [batch]
    assert seven.seq_id == 3


def test_a_seq_id_that_the_server_has_used_after_all_is_skipped(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_outage_s=0.1) as service:
        trainer = service.create_lora_training_client("base")
        routes.serve("optim_step", Answer(401, {"detail": "who are you"}))
        with pytest.raises(AuthenticationError):
            trainer.optim_step(ADAM).result(PATIENCE_S)
        lost = len(routes.seq_ids())
        routes.serve("save_weights", Answer(409, {"detail": "seq_id 1 is taken"}), routes.accept)
        trainer.save_state("a").result(PATIENCE_S)
        assert routes.seq_ids()[lost:] == [1, 2]
        # Without such a doubt a 409 is final.
        routes.serve("save_weights", Answer(409, {"detail": "the name is taken"}))
        with pytest.raises(ConflictError, match="name is taken"):
            trainer.save_state("a").result(PATIENCE_S)
        trainer.load_state("tinker://x/weights/a").result(PATIENCE_S)
    assert routes.seq_ids()[lost:] == [1, 2, 3, 4]


def test_a_run_survives_an_outage_that_was_too_long(local: LocalServer) -> None:
    # The embedded server would wait for a missing number.
    with Relay(local.url) as relay:
        with ServiceClient(base_url=relay.url, max_outage_s=0.1) as service:
            trainer = service.create_lora_training_client("deterministic")
            trainer.train_step([datum()], "cross_entropy", ADAM)
            relay.cut()
            with pytest.raises(APIConnectionError):
                trainer.forward_backward([datum()], "cross_entropy").result(PATIENCE_S)
            relay.restore()
            step = trainer.train_step([datum()], "cross_entropy", ADAM)
            assert step.optim.metrics is not None
            assert step.optim.metrics["optimizer_steps:max"] == 2.0


def test_a_submission_without_a_server_fails_after_the_outage_limit(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_outage_s=0.2) as service:
        trainer = service.create_lora_training_client("base")
        server.close()
        with pytest.raises(APIConnectionError, match=f"127.0.0.1:{server.port}"):
            trainer.optim_step(ADAM).result(PATIENCE_S)

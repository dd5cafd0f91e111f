"""Losses computed by the client: their gradient equals that of cross_entropy with other weights."""

from __future__ import annotations

import threading
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import pytest
import torch
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.local import LocalServer
from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.local.settings import ClientFlags, ServerSettings

ADAM = types.AdamParams(learning_rate=0.02, eps=1e-8)
Loss = Tuple[torch.Tensor, Dict[str, float]]


def batch(*lengths: int) -> List[types.Datum]:
    rng = np.random.default_rng(5)
    data = []
    for length in lengths:
        tokens = rng.integers(0, 256, length + 1)
        data.append(
            types.Datum(
                types.ModelInput.from_ints(tokens[:-1]),
                {"target_tokens": tokens[1:], "weights": rng.random(length).astype(np.float32)},
            )
        )
    return data


@pytest.fixture
def service(engine: Any) -> Iterator[ServiceClient]:
    with LocalServer(engine) as server, ServiceClient(base_url=server.url) as client:
        yield client


@pytest.fixture
def small_parts(cache: Any) -> Iterator[ServiceClient]:
    """A client of a server that takes three datums per request."""
    settings = ServerSettings(flags=ClientFlags(fwdbwd_max_chunk_len=3))
    engine = TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)
    with LocalServer(engine, settings=settings) as server:
        with ServiceClient(base_url=server.url) as client:
            yield client


def new_run(service: ServiceClient) -> TrainingClient:
    return service.create_lora_training_client("tiny-random", rank=4, seed=11)


def logprobs_of(client: TrainingClient, data: Sequence[types.Datum]) -> List[np.ndarray]:
    output = client.forward(data, "cross_entropy").result(60)
    return [fields["logprobs"].to_numpy() for fields in output.loss_fn_outputs]


def weighted(data: Sequence[types.Datum], weights: Sequence[Any]) -> List[types.Datum]:
    return [
        types.Datum(
            d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"], "weights": w}
        )
        for d, w in zip(data, weights)
    ]


def cross_entropy(data: Sequence[types.Datum], logprobs: List[torch.Tensor]) -> Loss:
    total = torch.zeros(())
    for datum, row in zip(data, logprobs):
        total = total - (datum.loss_fn_inputs["weights"].to_torch() * row).sum()
    return total, {"tokens:sum": float(sum(len(row) for row in logprobs))}


def test_cross_entropy_as_a_custom_loss_trains_like_the_servers_own(service: ServiceClient) -> None:
    data = batch(7, 3, 12)
    ours, theirs = new_run(service), new_run(service)
    before = logprobs_of(theirs, data)
    for _ in range(2):
        custom = ours.forward_backward_custom(data, cross_entropy)
        own = theirs.forward_backward(data, "cross_entropy")
        ours.optim_step(ADAM).result(60)
        theirs.optim_step(ADAM).result(60)
        assert custom.result(0).metrics["loss:sum"] == pytest.approx(
            own.result(0).metrics["loss:sum"], rel=1e-5
        )
        assert custom.result(0).metrics["tokens:sum"] == 22.0
        assert "surrogate_loss:sum" in custom.result(0).metrics
    for mine, expected, old in zip(logprobs_of(ours, data), logprobs_of(theirs, data), before):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected - old).max() > 1e-3  # there was something to learn


def test_a_loss_across_the_batch_has_the_gradient_of_its_derivative(
    service: ServiceClient, small_parts: ServiceClient
) -> None:
    data = batch(6, 4, 9, 2)

    def spread(batch_: Sequence[types.Datum], logprobs: List[torch.Tensor]) -> Loss:
        means = torch.stack([row.mean() for row in logprobs])
        return ((means - means.mean()) ** 2).sum(), {}

    ours, theirs = new_run(small_parts), new_run(service)
    rows = logprobs_of(theirs, data)
    # d/dp of sum((m_i - mean(m))^2) with m_i = mean(p_i), written out.
    means = np.array([row.mean() for row in rows])
    weights = [
        np.full(row.shape, -2 * (m - means.mean()) / row.size, np.float32)
        for m, row in zip(means, rows)
    ]
    theirs.forward_backward(weighted(data, weights), "cross_entropy").result(60)
    theirs.optim_step(ADAM).result(60)
    result = ours.forward_backward_custom(data, spread).result(60)
    ours.optim_step(ADAM).result(60)
    assert result.metrics["loss:sum"] == pytest.approx(
        ((means - means.mean()) ** 2).sum(), rel=1e-4
    )
    assert len(result.loss_fn_outputs) == 4
    for mine, expected in zip(logprobs_of(ours, data), logprobs_of(theirs, data)):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_traced_loss_trains_like_the_servers_own(
    service: ServiceClient, small_parts: ServiceClient
) -> None:
    data = batch(6, 4, 9, 2)

    def traced(logprobs: Any, weights: Any) -> Any:
        return -(logprobs * weights).sum(), {"custom/weight:mean": weights.sum()}

    ours, theirs = new_run(small_parts), new_run(service)
    handle = small_parts.create_custom_loss(traced, {"logprobs": 1, "weights": 1})
    custom = ours.forward_backward_custom(data, handle).result(60)
    own = theirs.forward_backward(data, "cross_entropy").result(60)
    assert custom.metrics["loss:sum"] == pytest.approx(own.metrics["loss:sum"], rel=1e-5)
    given = [datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in data]
    assert custom.metrics["custom/weight:mean"] == pytest.approx(np.mean(given))
    for client in (ours, theirs):
        client.optim_step(ADAM).result(60)
    for mine, expected in zip(logprobs_of(ours, data), logprobs_of(theirs, data)):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_datum_that_the_loss_ignores_gets_no_gradient(service: ServiceClient) -> None:
    data = batch(5, 5)
    ours, theirs = new_run(service), new_run(service)
    ours.forward_backward_custom(data, lambda d, p: (-p[0].sum(), {})).result(60)
    theirs.forward_backward(weighted(data[:1], [np.ones(5)]), "cross_entropy").result(60)
    for client in (ours, theirs):
        client.optim_step(ADAM).result(60)
    for mine, expected in zip(logprobs_of(ours, data), logprobs_of(theirs, data)):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


# Over a scripted server: the requests and their order


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def routes(server: ScriptedServer) -> TinkerRoutes:
    return TinkerRoutes(server)


@pytest.fixture
def trainer(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[TrainingClient]:
    with ServiceClient(base_url=server.url) as client:
        yield client.create_lora_training_client("base")


def passes(routes: TinkerRoutes) -> List[Tuple[int, bool]]:
    return [(b.seq_id, b.forward_only) for b in routes.submitted("forward_backward")]


def test_two_passes_are_sent_with_targets_and_weights_only(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    (datum,) = batch(4)
    extra = types.Datum(datum.model_input, {**datum.loss_fn_inputs, "mine": [1.0, 2.0]})
    seen: List[Any] = []

    def loss(data: Sequence[types.Datum], logprobs: List[torch.Tensor]) -> Loss:
        seen.append((data, threading.current_thread().name))
        return (logprobs[0] * torch.arange(4.0)).sum(), {"mine": 3}

    result = trainer.forward_backward_custom([extra], loss).result(PATIENCE_S)
    step = trainer.optim_step(ADAM)
    step.result(PATIENCE_S)
    assert seen == [([extra], f"tinkex-submit-{trainer.model_id}")]
    assert passes(routes) == [(1, True), (2, False)]
    assert routes.seq_ids() == [1, 2, 3]
    first, second = routes.submitted("forward_backward")
    assert [b.loss_fn for b in (first, second)] == ["cross_entropy"] * 2
    assert sorted(first.data[0].loss_fn_inputs) == ["target_tokens", "weights"]
    assert first.data[0].loss_fn_inputs["weights"] == datum.loss_fn_inputs["weights"]
    assert sorted(second.data[0].loss_fn_inputs) == ["target_tokens", "weights"]
    assert second.data[0].loss_fn_inputs["weights"].tolist() == [0.0, -1.0, -2.0, -3.0]
    # The scripted server's logprobs are all -1, and its loss is the size of the batch.
    assert result.metrics == {"loss:sum": -6.0, "surrogate_loss:sum": 1.0, "mine": 3.0}


class LossError(Exception):
    pass


def failing(data: Any, logprobs: Any) -> Any:
    raise LossError("in the user's own code")


def leaving(data: Any, logprobs: Any) -> Any:
    raise SystemExit("the lane must not end with it")


BAD_LOSSES: Dict[str, Tuple[Any, Any]] = {
    "raises": (failing, LossError),
    "a float": (lambda d, p: (1.0, {}), InvalidInputError),
    "no metrics": (lambda d, p: p[0].sum(), InvalidInputError),
    "nothing": (lambda d, p: None, InvalidInputError),
    "detached": (lambda d, p: (p[0].detach().sum(), {}), InvalidInputError),
    "no scalar": (lambda d, p: (p[0], {}), InvalidInputError),
    "metrics that are no dict": (lambda d, p: (p[0].sum(), [1.0]), InvalidInputError),
    "leaves": (leaving, InvalidInputError),
    "a NaN gradient": (lambda d, p: ((p[0] * float("nan")).sum(), {}), InvalidInputError),
}


@pytest.mark.parametrize("what", BAD_LOSSES)
def test_a_failing_loss_adds_no_gradient_and_the_run_continues(
    trainer: TrainingClient, routes: TinkerRoutes, what: str
) -> None:
    loss, error = BAD_LOSSES[what]
    with pytest.raises(error):
        trainer.forward_backward_custom(batch(4), loss).result(PATIENCE_S)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    assert passes(routes) == [(1, True)]
    assert routes.seq_ids() == [1, 2]


def test_metrics_may_be_none(trainer: TrainingClient) -> None:
    result = trainer.forward_backward_custom(batch(4), lambda d, p: (p[0].sum(), None))
    assert result.result(PATIENCE_S).metrics["loss:sum"] == -4.0


def test_a_cancel_between_the_passes_prevents_adding_the_gradient(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    def loss(data: Any, logprobs: List[torch.Tensor]) -> Loss:
        entered.set()
        assert cancelled.wait(PATIENCE_S)
        return logprobs[0].sum(), {}

    future = trainer.forward_backward_custom(batch(4), loss)
    assert entered.wait(PATIENCE_S)
    assert future.cancel()
    cancelled.set()
    trainer.optim_step(ADAM).result(PATIENCE_S)
    assert passes(routes) == [(1, True)]


def test_a_server_that_sends_too_few_outputs_is_reported(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    empty = {"loss_fn_output_type": "T", "loss_fn_outputs": [{}], "metrics": {}}
    routes.serve("retrieve_future", Answer(body=empty))
    with pytest.raises(ResponseDecodeError, match="0 of 1"):
        trainer.forward_backward_custom(batch(4), cross_entropy).result(PATIENCE_S)


def test_calls_after_a_custom_loss_keep_their_order(
    trainer: TrainingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    release = threading.Event()

    def loss(data: Any, logprobs: List[torch.Tensor]) -> Loss:
        assert release.wait(PATIENCE_S)
        return logprobs[0].sum(), {}

    custom = trainer.forward_backward_custom(batch(4), loss)
    step = trainer.optim_step(ADAM)
    server.wait_for("POST /api/v1/retrieve_future", 2)
    assert step.status().state == "queued"
    release.set()
    custom.result(PATIENCE_S)
    step.result(PATIENCE_S)
    sent = [r.path.rpartition("/")[2] for r in server.requests()]
    assert [p for p in sent if p in ("forward_backward", "optim_step")] == [
        "forward_backward",
        "forward_backward",
        "optim_step",
    ]

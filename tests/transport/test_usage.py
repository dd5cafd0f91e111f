"""The token meter: counts, costs, and a budget that is never exceeded."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import Budget, Price, ServiceClient, types
from tinkex.errors import BudgetExceededError, ConfigError, InvalidInputError, RequestFailedError
from tinkex.local import LocalServer
from tinkex.usage import Account, Ledger, Tokens

PROMPT = types.ModelInput.from_ints([1, 2, 3])
FAILED = Answer(body={"error": "no such luck", "category": "user"})


def params(max_tokens: Any) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=max_tokens, seed=1)


def batch(length: int = 4) -> List[types.Datum]:
    tokens = np.arange(length, dtype=np.int64)
    inputs = {"target_tokens": types.TensorData.from_numpy(tokens)}
    return [types.Datum(types.ModelInput.from_ints(tokens.tolist()), inputs)] * 2


# What is counted


def test_all_kinds_of_tokens_are_counted(service: ServiceClient) -> None:
    run = service.create_lora_training_client("deterministic", rank=4)
    run.forward(batch(), "cross_entropy").result(PATIENCE_S)
    run.train_step(batch(), "cross_entropy", types.AdamParams())
    sampler = run.save_weights_and_get_sampling_client()
    response = sampler.sample(PROMPT, 2, params(5)).result(PATIENCE_S)
    sampled = sum(len(sequence.tokens) for sequence in response.sequences)
    sampler.compute_logprobs(PROMPT).result(PATIENCE_S)
    usage = service.usage()
    assert [(row.client, row.model, row.tokens) for row in usage.rows] == [
        (f"run {run.model_id}", "deterministic", Tokens(trained=8, prefilled=8)),
        (
            f"sampler {sampler.sampling_session_id}",
            "deterministic",
            Tokens(prefilled=6, sampled=sampled + 1),
        ),
    ]
    assert usage.tokens == Tokens(8, 14, sampled + 1)
    assert usage.reserved == Tokens()
    assert usage.usd is None
    seen = service.metrics()
    assert (seen.tokens_trained, seen.tokens_prefilled, seen.tokens_sampled) == usage.tokens


def test_a_loss_computed_by_the_client_takes_two_passes(service: ServiceClient) -> None:
    pytest.importorskip("torch")
    run = service.create_lora_training_client("deterministic", rank=4)

    def loss(data: Any, logprobs: Any) -> Any:
        return -sum(each.sum() for each in logprobs), {}

    run.forward_backward_custom(batch(), loss).result(PATIENCE_S)
    assert service.usage().tokens == Tokens(trained=8, prefilled=8)


def test_tags(scripted: ServiceClient) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    sampler.sample(PROMPT).result(PATIENCE_S)
    sampler.usage_tag = "eval"
    sampler.sample(PROMPT).result(PATIENCE_S)
    sampler.sample(PROMPT).result(PATIENCE_S)
    usage = scripted.usage()
    assert [row.tag for row in usage.rows] == [None, "eval"]
    assert usage.of_tag("eval").tokens == Tokens(prefilled=6, sampled=2)
    assert usage.of_tag("train").tokens == Tokens()


def test_prices(server: ScriptedServer, routes: TinkerRoutes) -> None:
    prices = {"base": Price(train=3.0, prefill=1.0, sample=2.0)}
    with ServiceClient(base_url=server.url, prices=prices) as client:
        sampler = client.create_sampling_client(base_model="base")
        assert client.usage().usd == 0
        sampler.sample(PROMPT).result(PATIENCE_S)
        client.create_lora_training_client("base").train_step(
            batch(), "cross_entropy", types.AdamParams()
        )
        assert client.usage().usd == pytest.approx((3 * 1 + 1 * 2 + 8 * 3) / 1e6)
        client.create_sampling_client(base_model="other").sample(PROMPT).result(PATIENCE_S)
        usage = client.usage()
        assert usage.rows[-1].usd is None
        assert usage.usd is None


def test_a_failure_costs_nothing(scripted: ServiceClient, routes: TinkerRoutes) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    routes.serve("retrieve_future", FAILED)
    with pytest.raises(RequestFailedError):
        sampler.sample(PROMPT).result(PATIENCE_S)
    routes.serve("asample", Answer(422, {"detail": "no"}))
    assert sampler.sample(PROMPT).exception(PATIENCE_S) is not None
    usage = scripted.usage()
    assert usage.rows == ()
    assert usage.reserved == Tokens()


# Budgets


def test_a_budget_of_tokens(server: ScriptedServer, routes: TinkerRoutes) -> None:
    with ServiceClient(base_url=server.url, budget=Budget(tokens=20)) as client:
        sampler = client.create_sampling_client(base_model="base")
        sampler.sample(PROMPT, 1, params(16)).result(PATIENCE_S)  # at most 19, actually 4
        assert client.usage().tokens == Tokens(prefilled=3, sampled=1)
        before = routes.count()
        with pytest.raises(BudgetExceededError) as caught:
            sampler.sample(PROMPT, 1, params(14))
        error = caught.value
        assert (error.unit, error.used, error.reserved, error.adds, error.limit) == (
            "tokens", 4, 0, 17, 20,
        )  # fmt: skip
        assert routes.count() == before
        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
        assert sampler.sample(PROMPT, 1, params(13)).result(PATIENCE_S)
        run = client.create_lora_training_client("base")
        with pytest.raises(BudgetExceededError, match="forward_backward may use 14 tokens"):
            run.forward_backward(batch(7), "cross_entropy")
        assert routes.submitted("forward_backward") == []
        assert client.inflight() == []


def test_a_budget_in_usd(server: ScriptedServer, routes: TinkerRoutes) -> None:
    prices = {"base": Price(3.0, 1.0, 2.0), "*": Price(0.0, 0.0, 0.0)}
    with ServiceClient(base_url=server.url, budget=Budget(usd=25e-6), prices=prices) as client:
        free = client.create_sampling_client(base_model="other")
        free.sample(PROMPT, 1, params(1000)).result(PATIENCE_S)
        run = client.create_lora_training_client("base")
        run.forward_backward(batch(), "cross_entropy").result(PATIENCE_S)  # 24 of 25
        with pytest.raises(BudgetExceededError, match="USD") as caught:
            run.forward(batch(), "cross_entropy")
        assert caught.value.used == pytest.approx(24e-6)
        assert caught.value.adds == pytest.approx(8e-6)


def test_a_model_without_a_price_is_refused(server: ScriptedServer, routes: TinkerRoutes) -> None:
    with ServiceClient(base_url=server.url, budget=Budget(usd=1.0)) as client:
        sampler = client.create_sampling_client(base_model="base")
        with pytest.raises(InvalidInputError, match="no price for model 'base'"):
            sampler.sample(PROMPT, 1, params(1))
        assert routes.submitted("asample") == []


def test_a_checkpoint_is_priced_by_its_base_model(local: LocalServer) -> None:
    prices = {"deterministic": Price(3.0, 1.0, 2.0)}
    with ServiceClient(base_url=local.url, budget=Budget(usd=1.0), prices=prices) as client:
        run = client.create_lora_training_client("deterministic", rank=4)
        path = run.save_weights_for_sampler("a").result(PATIENCE_S).path
        sampler = client.create_sampling_client(path)
        sampler.sample(PROMPT, 1, params(2)).result(PATIENCE_S)
        (row,) = client.usage().rows
        assert row.model == "deterministic"
        assert row.usd == pytest.approx((3 + 2 * row.tokens.sampled) / 1e6)


def test_a_budget_needs_max_tokens(server: ScriptedServer, routes: TinkerRoutes) -> None:
    with ServiceClient(base_url=server.url, budget=Budget(tokens=20)) as client:
        sampler = client.create_sampling_client(base_model="base")
        with pytest.raises(InvalidInputError, match="max_tokens"):
            sampler.sample(PROMPT)
        sampler.compute_logprobs(PROMPT).exception(PATIENCE_S)


def test_concurrent_samples_do_not_exceed_the_budget(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    hold = threading.Event()
    routes.serve("retrieve_future", lambda received: _held(routes, received, hold))
    with ServiceClient(base_url=server.url, budget=Budget(tokens=100)) as client:
        sampler = client.create_sampling_client(base_model="base")

        def attempt(_: int) -> Any:
            try:
                return sampler.sample(PROMPT, 1, params(7))
            except BudgetExceededError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(attempt, range(50)))
        refused = [one for one in made if isinstance(one, BudgetExceededError)]
        assert len(refused) == 40
        assert client.usage().reserved == Tokens(prefilled=30, sampled=70)
        hold.set()
        for one in made:
            if not isinstance(one, BudgetExceededError):
                one.result(PATIENCE_S)
        assert client.usage().reserved == Tokens()
        assert client.usage().tokens == Tokens(prefilled=30, sampled=10)
        # Unused reservations are available again.
        assert sampler.sample(PROMPT, 1, params(57)).result(PATIENCE_S)


def test_cancelled_work_counts_once_it_was_sent(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    hold = threading.Event()
    routes.serve("retrieve_future", lambda received: _held(routes, received, hold))
    with ServiceClient(
        base_url=server.url, budget=Budget(tokens=20), max_concurrent_samples=1
    ) as client:
        sampler = client.create_sampling_client(base_model="base")
        sent = sampler.sample(PROMPT, 1, params(7))
        wait_until(lambda: sent.request_id is not None, "it is accepted")
        waits = sampler.sample(PROMPT, 1, params(7))
        assert not waits.was_sent
        assert waits.cancel()
        assert sent.cancel()
        assert client.usage().tokens == Tokens(prefilled=3, sampled=7)
        assert client.usage().reserved == Tokens()
        hold.set()


def _held(routes: TinkerRoutes, received: Received, hold: threading.Event) -> Answer:
    answer = routes.results[received.json()["request_id"]]
    return Answer(body=answer.body, hold=hold)


def test_a_reservation_is_settled_once() -> None:
    ledger = Ledger(Budget(tokens=10))
    account = Account("run a", None, "base")
    reservation = ledger.reserve("work", account, Tokens(10))
    with pytest.raises(BudgetExceededError):
        ledger.reserve("work", account, Tokens(1))
    reservation.release()
    reservation.release()
    assert ledger.snapshot().reserved == Tokens()
    ledger.reserve("work", account, Tokens(10))
    with pytest.raises(BudgetExceededError):
        ledger.reserve("work", account, Tokens(1))


def test_work_refused_by_a_closed_client_is_not_reserved(scripted: ServiceClient) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    scripted._runtime.poller.close(ConfigError("closed under our feet"))
    with pytest.raises(ConfigError):
        sampler.sample(PROMPT)
    assert scripted.usage().reserved == Tokens()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(),
        lambda: Budget(tokens=0),
        lambda: Budget(usd=float("nan")),
        lambda: Budget(usd="5"),  # type: ignore[arg-type]
        lambda: Price(-1.0, 0.0, 0.0),
        lambda: Price(True, 0.0, 0.0),
        lambda: ServiceClient(base_url="http://127.0.0.1:9", budget=5),
        lambda: ServiceClient(base_url="http://127.0.0.1:9", prices=[1]),
        lambda: ServiceClient(base_url="http://127.0.0.1:9", prices={"base": 3.0}),
    ],
)
def test_bad_budgets_and_prices(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()

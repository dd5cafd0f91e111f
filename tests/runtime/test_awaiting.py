"""Awaiting futures, creators and the official SDK's ``*_async`` names in an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import CancelledError as FutureCancelledError
from typing import Any, Awaitable, Callable, Iterator, List

import pytest
from support import programs
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import APIFuture, RestClient, SamplingClient, ServiceClient, TrainingClient, types
from tinkex.errors import BadRequestError, NotFoundError
from tinkex.local import LocalServer

ADAM = types.AdamParams(learning_rate=0.01)
DATUM = types.Datum(
    types.ModelInput.from_ints([1, 2, 3]),
    {"target_tokens": [2, 3, 4], "weights": [1.0] * 3},
)
PROMPT = types.ModelInput.from_ints([1, 2, 3])
TWO = types.SamplingParams(max_tokens=2)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run the coroutine function *main* in its own event loop, with a time limit."""

    async def bounded() -> Any:
        return await asyncio.wait_for(main(), PATIENCE_S)

    return asyncio.run(bounded())


@pytest.fixture
def released(routes: TinkerRoutes) -> Iterator[threading.Event]:
    """Hold the results of optimizer steps until the event is set."""
    event = threading.Event()
    result = Answer(body={"metrics": {}}, hold=event)
    routes.serve("optim_step", lambda received: routes.accepted("optim_step", result))
    yield event
    event.set()


def test_a_future_is_awaited_for_its_result(trainer: TrainingClient) -> None:
    async def main() -> List[Any]:
        passed = trainer.forward_backward([DATUM], "cross_entropy")
        stepped = trainer.optim_step(ADAM)
        return [await passed, await stepped, await passed.result_async(), await passed]

    first, step, again, third = run(main)
    assert first.metrics["loss:sum"] > 0
    assert isinstance(step, types.OptimStepResponse)
    assert again is first
    assert third is first


def test_the_error_of_failed_work_is_raised_by_await(service: ServiceClient) -> None:
    async def main() -> None:
        with pytest.raises(NotFoundError):
            await service.create_rest_client().get_training_run("no-such-run")

    run(main)


def test_coroutines_are_gathered_in_order(service: ServiceClient) -> None:
    async def main() -> List[List[Any]]:
        sampler = service.create_sampling_client(base_model="deterministic")
        prompts = [types.ModelInput.from_ints(range(1, n)) for n in (3, 4, 5)]
        return await asyncio.gather(*[sampler.compute_logprobs(p).coroutine() for p in prompts])

    assert [len(logprobs) for logprobs in run(main)] == [2, 3, 4]


def test_creators_and_their_clients_are_awaited(service: ServiceClient) -> None:
    async def main() -> None:
        trainer = await service.create_lora_training_client("deterministic", rank=4)
        assert isinstance(trainer, TrainingClient)
        assert await trainer is trainer
        assert await trainer.result_async() is trainer
        assert await trainer.coroutine() is trainer
        sampler = await trainer.save_weights_and_get_sampling_client()
        assert isinstance(sampler, SamplingClient)
        assert len((await sampler.sample(PROMPT, 1, TWO)).sequences) == 1

    run(main)


def test_async_names_train_save_and_sample(service: ServiceClient) -> None:
    async def main() -> None:
        capabilities = await service.get_server_capabilities_async()
        assert capabilities.supported_models[0].model_name == "deterministic"
        trainer = await service.create_lora_training_client_async("deterministic", rank=4)
        passed = await trainer.forward_backward_async([DATUM], "cross_entropy")
        assert isinstance(passed, APIFuture)
        stepped = await trainer.optim_step_async(ADAM)
        assert (await passed).metrics["loss:sum"] > 0
        assert isinstance(await stepped.result_async(), types.OptimStepResponse)
        assert (await trainer.get_info_async()).model_id == trainer.model_id
        saved = await (await trainer.save_state_async("a")).result_async()
        await (await trainer.load_state_with_optimizer_async(saved.path))
        resumed = await service.create_training_client_from_state_async(saved.path)
        assert resumed.model_id != trainer.model_id
        sampler = await trainer.save_weights_and_get_sampling_client_async()
        assert await sampler.get_base_model_async() == "deterministic"
        assert len(await sampler.compute_logprobs_async(PROMPT)) == 3
        sampled = await sampler.sample_async(PROMPT, num_samples=2, sampling_params=TWO)
        assert len(sampled.sequences) == 2
        rest: RestClient = service.create_rest_client()
        runs = await rest.list_training_runs_async(limit=5)
        assert {one.training_run_id for one in runs.training_runs} == {
            trainer.model_id,
            resumed.model_id,
        }
        assert await rest.delete_checkpoint_from_tinker_path_async(saved.path) is None

    run(main)


def test_gathered_submissions_are_sent_in_call_order(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    trainer = scripted.create_lora_training_client("base")

    async def main() -> None:
        calls: List[Any] = []
        for _ in range(10):
            calls.append(trainer.forward_backward_async([DATUM], "cross_entropy"))
            calls.append(trainer.optim_step_async(ADAM))
        await asyncio.gather(*await asyncio.gather(*calls))

    run(main)
    assert [body.seq_id for body in routes.submitted("forward_backward")] == list(range(1, 21, 2))
    assert [body["seq_id"] for body in routes.submitted("optim_step")] == list(range(2, 21, 2))


def test_the_event_loop_keeps_running_while_a_client_is_created(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    turned = threading.Event()

    def accept_when_the_loop_has_turned(received: Received) -> Answer:
        assert turned.wait(PATIENCE_S)
        return routes.accept(received)

    routes.serve("create_model", accept_when_the_loop_has_turned)

    async def main() -> TrainingClient:
        creating = asyncio.ensure_future(scripted.create_lora_training_client_async("base"))
        await asyncio.sleep(0)
        turned.set()
        return await creating

    assert isinstance(run(main), TrainingClient)


def test_cancelling_the_task_that_awaits_cancels_the_future(
    scripted: ServiceClient, released: threading.Event
) -> None:
    trainer = scripted.create_lora_training_client("base")

    async def main() -> None:
        future = trainer.optim_step(ADAM)
        task = asyncio.ensure_future(future.coroutine())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert future.cancelled()
        with pytest.raises(FutureCancelledError):
            future.result(0)

    run(main)


def test_a_timeout_of_an_await_cancels_the_future(
    scripted: ServiceClient, released: threading.Event
) -> None:
    trainer = scripted.create_lora_training_client("base")

    async def main() -> None:
        future = trainer.optim_step(ADAM)
        with pytest.raises(asyncio.TimeoutError):
            await future.result_async(timeout=0.01)
        assert future.cancelled()

    run(main)


def test_a_long_await_is_explained_in_the_log(
    server: ScriptedServer,
    routes: TinkerRoutes,
    released: threading.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    explained: List[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("still waiting: optim_step: "):
                explained.append(record.getMessage())
                released.set()

    handler = Handler()
    logging.getLogger("tinkex").addHandler(handler)
    caplog.set_level(logging.INFO, "tinkex")
    try:
        with ServiceClient(base_url=server.url, api_key="tml-key", notice_after_s=0.01) as service:

            async def main() -> None:
                await service.create_lora_training_client("base").optim_step(ADAM)

            run(main)
    finally:
        logging.getLogger("tinkex").removeHandler(handler)
    assert explained


def test_awaiting_a_finished_result_is_not_reported_as_a_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tinkex")
    future: APIFuture[int] = APIFuture("sample", notice_after_s=0.0)
    future.try_set_result(1)

    async def main() -> int:
        return await future

    assert run(main) == 1
    assert not caplog.records


def test_a_cancelled_future_cancels_what_awaits_it(
    scripted: ServiceClient, released: threading.Event
) -> None:
    trainer = scripted.create_lora_training_client("base")

    async def main() -> None:
        future = trainer.optim_step(ADAM)
        task = asyncio.ensure_future(future.coroutine())
        await asyncio.sleep(0)
        assert future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)


def test_bad_input_is_refused_when_an_async_name_is_awaited(trainer: TrainingClient) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="the batch is empty"):
            await trainer.forward_backward_async([], "cross_entropy")

    run(main)


def test_a_refused_creation_is_raised(scripted: ServiceClient, server: ScriptedServer) -> None:
    server.on("POST /api/v1/create_model", Answer(400, {"detail": "no such model"}))

    async def main() -> None:
        with pytest.raises(BadRequestError, match="no such model"):
            await scripted.create_lora_training_client_async("base")

    run(main)


SYNCHRONOUS = """
import sys
from tinkex import ServiceClient, types

with ServiceClient() as service:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    datum = types.Datum(prompt, {"target_tokens": [2, 3, 4], "weights": [1.0] * 3})
    trainer.train_step([datum], "cross_entropy", types.AdamParams())
    sampler = trainer.save_weights_and_get_sampling_client()
    sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2)).result()
print("asyncio" in sys.modules)
"""


def test_a_synchronous_program_never_imports_asyncio(local: LocalServer) -> None:
    done = programs.run(["-c", SYNCHRONOUS], local.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")

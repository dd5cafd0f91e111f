"""The traces of a failure: a log line if it is not read, and a short traceback."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Iterator

import pytest
from support.scripted_server import PATIENCE_S

from tinkex import ServiceClient, TrainingClient, types
from tinkex.errors import BadRequestError, RequestFailedError

BAD = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"weights": [1.0, 1.0, 1.0]})
ADAM = types.AdamParams(learning_rate=0.01)
ONE = types.SamplingParams(max_tokens=1)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the garbage collector, which might run at any time, or never."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_an_unread_failure_of_a_pass_is_reported_by_the_next_call(
    trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.forward_backward([BAD], "cross_entropy")
    trainer.optim_step(ADAM).result(PATIENCE_S)
    with caplog.at_level(logging.ERROR, "tinkex"):
        trainer.optim_step(ADAM).result(PATIENCE_S)
    assert "unretrieved failure in forward_backward" in caplog.text
    assert "target_tokens" in caplog.text


@pytest.mark.usefixtures("no_collector")
def test_a_failed_future_is_freed_at_once(trainer: TrainingClient) -> None:
    future = trainer.forward_backward([BAD], "cross_entropy")
    assert isinstance(future.exception(PATIENCE_S), RequestFailedError)
    trainer.optim_step(ADAM).result(PATIENCE_S)  # the polling thread has moved on
    left = weakref.ref(future)
    del future
    assert left() is None


@pytest.mark.usefixtures("no_collector")
def test_a_refused_sample_is_freed_with_its_future(service: ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="deterministic")
    future = sampler.sample(types.ModelInput.from_ints([1] * 500), sampling_params=ONE)
    error = future.exception(PATIENCE_S)
    assert isinstance(error, BadRequestError)
    assert error.__traceback__ is None

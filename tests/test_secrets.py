"""No key appears in any output: no log, error, repr, pickle, journal, file or telemetry."""

from __future__ import annotations

import logging
import pickle
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

from tinkex import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from tinkex.errors import TinkexError
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ServerSettings
from tinkex.testing import FakeServer, faults

KEY = "tml-canary-2f6b81d7e04c"
OTHER_KEY = "tml-stranger-93ac55d1"
#: Every token of the server begins with this.
TOKEN = "eyJhbGciOiJIUzI1NiIs"

DATA = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})]
ADAM = AdamParams(learning_rate=0.1)
PROMPT = ModelInput.from_ints([1, 2])
PARAMS = SamplingParams(max_tokens=2, seed=1, stop=[])


def shown(value: object) -> str:
    try:
        return repr(value)
    except AttributeError:  # an object whose __init__ failed
        return repr(vars(value))


def all_of(error: BaseException) -> Iterator[str]:
    """Yield everything that an error shows."""
    yield "".join(traceback.format_exception(type(error), error, error.__traceback__))
    while error is not None:
        yield f"{error!r} {vars(error)!r} {error.args!r}"
        yield repr(pickle.dumps(error))
        frame = error.__traceback__
        while frame is not None:
            # As shown by tools that print tracebacks with the values of locals.
            if "tinkex/" in frame.tb_frame.f_code.co_filename.replace("\\", "/"):
                yield from map(shown, frame.tb_frame.f_locals.values())
            frame = frame.tb_next
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def train_and_sample(service: ServiceClient, folder: Path) -> List[Any]:
    """Use every kind of request once; return the resulting objects."""
    rest = service.create_rest_client()
    trainer = service.create_lora_training_client("deterministic", rank=4)
    futures = [trainer.forward_backward(DATA, "cross_entropy"), trainer.optim_step(ADAM)]
    done = [future.result() for future in futures]
    saved = trainer.save_state("a").result().path
    drawn = trainer.save_weights_for_sampler("a").result().path
    exported = trainer.save_weights_external("a").result().path
    trainer.load_state_with_optimizer(saved).result()
    sampler = service.create_sampling_client(model_path=drawn)
    done += [
        sampler.sample(PROMPT, 1, PARAMS).result(),
        sampler.compute_logprobs(PROMPT).result(),
        trainer.forward(DATA, "cross_entropy").result(),
        trainer.get_info(),
        rest.list_training_runs().result(),
        rest.list_user_checkpoints().result(),
        rest.get_weights_info_by_tinker_path(saved).result(),
        rest.list_sessions().result(),
        rest.get_session(service.session_id).result(),
        service.get_server_capabilities(),
        rest.download_checkpoint(saved, folder / "saved"),
        rest.download_checkpoint(exported, folder / "exported"),
        service.metrics,
        service.usage,
        service.server_dialect,
    ]
    with service.open_run(folder / "run", "deterministic", rank=4, save_every=1) as run:
        for step in run.steps([DATA, DATA]):
            result = run.trainer.train_step(step.batch, "cross_entropy", ADAM)
            step.log(result.forward_backward.metrics)
    rest.delete_checkpoint_from_tinker_path(exported).result()
    return [service, service.config, rest, trainer, sampler, run, *futures, *done]


def mistakes(service: ServiceClient) -> Iterator[Callable[[], object]]:
    """Yield calls that fail in the client, and calls that fail at the server."""
    rest = service.create_rest_client()
    trainer = service.create_lora_training_client("deterministic", rank=4)
    unknown = "tinker://nothing/weights/nothing"
    yield lambda: trainer.forward_backward(DATA, "nonsense").result()
    yield lambda: trainer.forward_backward([], "cross_entropy").result()
    yield lambda: trainer.load_state(unknown).result()
    yield lambda: service.create_lora_training_client("nothing", rank=4)
    yield lambda: service.create_sampling_client(model_path=unknown)
    yield lambda: rest.download_checkpoint(unknown, "nowhere")
    yield lambda: rest.delete_checkpoint_from_tinker_path(unknown).result()
    yield lambda: trainer.save_state("../a").result()


def written_in(folder: Path) -> Iterator[bytes]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes()


@pytest.mark.parametrize("jwt", [False, True], ids=["key", "tokens"])
def test_no_key_appears_in_any_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], jwt: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    access: List[str] = []
    settings = ServerSettings(api_key=KEY, jwt=jwt)
    texts: List[str] = []
    with LocalServer(
        DeterministicEngine(),
        data_dir=tmp_path / "data",
        settings=settings,
        access_log=access.append,
    ) as server:
        with ServiceClient(base_url=server.url, api_key=KEY) as service:
            made = [server, server.settings, *train_and_sample(service, tmp_path)]
            if jwt:
                made.append(service.create_rest_client().whoami().result())
            texts += [repr(one) for one in made]
            texts.append(repr(pickle.dumps(service.config)))
            for call in mistakes(service):
                with pytest.raises(TinkexError) as caught:
                    call()
                texts += all_of(caught.value)
            with pytest.raises(TinkexError) as caught:
                ServiceClient(base_url=server.url, api_key=OTHER_KEY)
            texts += all_of(caught.value)
        texts += [repr(event) for event in server._backend.telemetry.events()]
        texts += [repr(row) for row in server._backend.store.all_sessions()]
    assert len(access) > 30
    assert any("/signed/" in line for line in access)
    assert not any("signature" in line for line in access)
    assert len(caplog.records) > 30
    printed = capfd.readouterr()
    texts += [*access, caplog.text, printed.out, printed.err]
    texts += [raw.decode("latin-1") for raw in written_in(tmp_path)]
    found = [
        (secret, text) for secret in (KEY, OTHER_KEY, TOKEN) for text in texts if secret in text
    ]
    assert found == []


@pytest.mark.parametrize("fault", [
    faults.Status(500, {"detail": "boom"}), faults.Status(403, b"<html>"), faults.Drop(),
    faults.Truncate(), faults.Garble(),
], ids=["500", "403", "drop", "truncate", "garble"])  # fmt: skip
def test_no_key_appears_in_the_errors_of_a_failing_server(
    caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    texts: List[str] = []
    with FakeServer(api_key=KEY) as server:
        with ServiceClient(base_url=server.url, api_key=KEY) as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            server.inject("forward_backward", fault, times=1)
            try:
                trainer.forward_backward(DATA, "cross_entropy").result()
            except TinkexError as error:
                texts += all_of(error)
        texts += [repr(server.journal.requests), repr(server.journal), caplog.text]
    assert KEY not in "".join(texts)

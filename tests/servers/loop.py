"""What a program does with a client, as steps that are the same on every server.

Each step takes a Loop and checks its results.  If a server cannot do something, the step knows
which typed error to expect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List, Optional

import numpy as np
import pytest

import tinkex
from tinkex.errors import (
    APIStatusError,
    ConflictError,
    InvalidInputError,
    RequestFailedError,
    RouteMissingError,
    TinkexError,
)
from tinkex.types import AdamParams, Datum, ModelInput, SamplingParams

ADAM = AdamParams(learning_rate=1e-3)
WAIT_S = 60.0
PROMPT = [5, 6, 7, 8, 9]
#: Stands for the server without a profile.
EVERYTHING = "everything"


def datum(*tokens: int) -> Datum:
    ids = list(tokens or (1, 2, 3))
    return Datum(
        ModelInput.from_ints(ids[:-1]),
        {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)},
    )


class Loop:
    """One client of one server, and the run that its steps share."""

    def __init__(self, service: tinkex.ServiceClient, profile: str, folder: Path) -> None:
        self.service, self.profile, self.folder = service, profile, folder
        self._trainer: Optional[tinkex.TrainingClient] = None
        self._saved: Optional[str] = None
        self._names = 0

    @property
    def trainer(self) -> tinkex.TrainingClient:
        if self._trainer is None:
            self._trainer = self.service.create_lora_training_client("deterministic", rank=4)
        return self._trainer

    def name(self) -> str:
        self._names += 1
        return f"c{self._names}"

    @property
    def saved(self) -> str:
        """A checkpoint with one optimizer step in it."""
        if self._saved is None:
            self.trainer.train_step([datum()], "cross_entropy", ADAM)
            self._saved = self.trainer.save_state(self.name()).result(WAIT_S).path
        return self._saved

    def logprobs(self, trainer: tinkex.TrainingClient) -> np.ndarray:
        """Return the logprobs that *trainer* gives a datum: they identify its weights."""
        output = trainer.forward([datum(1, 2, 3, 4)], "cross_entropy").result(WAIT_S)
        values: np.ndarray = output.loss_fn_outputs[0]["logprobs"].to_numpy()
        return values


Step = Callable[[Loop], None]
STEPS: List[Step] = []


def step(function: Step) -> Step:
    STEPS.append(function)
    return function


@step
def create_run(loop: Loop) -> None:
    info = loop.trainer.get_info()
    assert info.model_id == loop.trainer.model_id
    assert info.model_data.model_name == "deterministic"


@step
def pipelined_steps(loop: Loop) -> None:
    trainer = loop.trainer
    passes, steps = [], []
    for _ in range(5):
        passes.append(trainer.forward_backward([datum(), datum(4, 5, 6, 7)], "cross_entropy"))
        steps.append(trainer.optim_step(ADAM))
    losses = []
    for future in passes:
        output = future.result(WAIT_S)
        shapes = [outputs["logprobs"].shape for outputs in output.loss_fn_outputs]
        assert shapes == [(2,), (3,)]
        losses.append(-sum(o["logprobs"].to_numpy().sum() for o in output.loss_fn_outputs))
        assert output.metrics["loss:sum"] == pytest.approx(losses[-1], rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    for future in steps:
        metrics = future.result(WAIT_S).metrics
        assert all(isinstance(value, float) for value in (metrics or {}).values())


@step
def forward(loop: Loop) -> None:
    before = loop.logprobs(loop.trainer)
    loop.trainer.optim_step(ADAM).result(WAIT_S)  # without a gradient: nothing changes
    assert loop.logprobs(loop.trainer).tolist() == before.tolist()


@step
def many_datums_in_chunks(loop: Loop) -> None:
    batch = [datum(n % 900 + 1, 2, 3) for n in range(1030)]
    output = loop.trainer.forward_backward(batch, "cross_entropy").result(WAIT_S)
    assert len(output.loss_fn_outputs) == 1030
    loop.trainer.optim_step(ADAM).result(WAIT_S)


@step
def custom_loss(loop: Loop) -> None:
    pytest.importorskip("torch")

    def loss(data: Any, logprobs: Any) -> Any:
        total = sum((p * p).sum() for p in logprobs)
        return total, {"mine": 3.0}

    future = loop.trainer.forward_backward_custom([datum()], loss)
    step_after = loop.trainer.optim_step(ADAM)
    output = future.result(WAIT_S)
    values = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert output.metrics["loss:sum"] == pytest.approx(float((values**2).sum()), rel=1e-5)
    assert output.metrics["mine"] == 3.0
    step_after.result(WAIT_S)


@step
def save_and_save_again(loop: Loop) -> None:
    name = loop.name()
    first = loop.trainer.save_state(name).result(WAIT_S).path
    assert first.startswith("tinker://")
    again = loop.trainer.save_state(name)
    if loop.profile in ("tuft-0.2", "hatchery-0.3"):
        assert again.result(WAIT_S).path == first
    else:
        with pytest.raises(ConflictError, match=name):
            again.result(WAIT_S)
    loop.logprobs(loop.trainer)  # the run goes on


@step
def load_into_a_new_run(loop: Loop) -> None:
    loaded = loop.service.create_training_client_from_state(loop.saved)
    resumed = loop.service.create_training_client_from_state_with_optimizer(loop.saved)
    assert loaded.model_id != resumed.model_id
    assert loop.logprobs(loaded).tolist() == loop.logprobs(resumed).tolist()
    counts = []
    for trainer in (loaded, resumed):
        trained = trainer.train_step([datum()], "cross_entropy", ADAM)
        counts.append((trained.optim.metrics or {}).get("optimizer_steps:max"))
    if loop.profile != "tuft-0.2":  # which reports no metrics
        assert counts[0] == 1.0
        assert counts[1] > 1.0


@step
def load_into_this_run(loop: Loop) -> None:
    path = loop.saved
    before = loop.logprobs(loop.service.create_training_client_from_state(path))
    future = loop.trainer.load_state_with_optimizer(path)
    if loop.profile.startswith("skyrl"):  # accepts it only as a run's first request
        with pytest.raises(TinkexError, match="first request"):
            future.result(WAIT_S)
        loop.logprobs(loop.trainer)
        return
    future.result(WAIT_S)
    assert loop.logprobs(loop.trainer).tolist() == before.tolist()


@step
def sampler_by_path(loop: Loop) -> None:
    path = loop.trainer.save_weights_for_sampler(loop.name()).result(WAIT_S).path
    assert path.startswith("tinker://")
    if loop.profile == "hatchery-0.3":  # whose route for it is broken
        with pytest.raises(APIStatusError, match="create_sampling_session") as raised:
            loop.service.create_sampling_client(model_path=path)
        assert raised.value.status == 500
        return
    _check_sampler(loop.service.create_sampling_client(model_path=path))
    _check_sampler(loop.trainer.create_sampling_client(path))


@step
def ephemeral_sampler(loop: Loop) -> None:
    _check_sampler(loop.trainer.save_weights_and_get_sampling_client())


@step
def base_model_sampler(loop: Loop) -> None:
    sampler = loop.service.create_sampling_client(base_model="deterministic")
    assert sampler.get_base_model() == "deterministic"
    _check_sampler(sampler)


def _check_sampler(sampler: tinkex.SamplingClient) -> None:
    params = SamplingParams(max_tokens=4, stop=[])
    response = sampler.sample(ModelInput.from_ints(PROMPT), 2, params).result(WAIT_S)
    assert [len(sequence.tokens) for sequence in response.sequences] == [4, 4]
    assert all(len(sequence.logprobs or ()) == 4 for sequence in response.sequences)


@step
def compute_logprobs(loop: Loop) -> None:
    sampler = loop.service.create_sampling_client(base_model="deterministic")
    logprobs = sampler.compute_logprobs(ModelInput.from_ints(PROMPT)).result(WAIT_S)
    assert len(logprobs) == len(PROMPT)
    assert logprobs[0] is None
    assert all(value is not None and value < 0 for value in logprobs[1:])
    asked = sampler.sample(
        ModelInput.from_ints(PROMPT), 1, SamplingParams(max_tokens=1), include_prompt_logprobs=True
    ).result(WAIT_S)
    assert asked.prompt_logprobs == logprobs


@step
def sixty_four_samples_at_once(loop: Loop) -> None:
    sampler = loop.trainer.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=2, stop=[])
    futures = [sampler.sample(ModelInput.from_ints([1, 2, n + 1]), 1, params) for n in range(64)]
    found = [future.result(WAIT_S).sequences[0].tokens for future in futures]
    assert len({tuple(tokens) for tokens in found}) > 32
    group = sampler.sample(ModelInput.from_ints(PROMPT), 64, params).result(WAIT_S)
    assert len(group.sequences) == 64


@step
def lists(loop: Loop) -> None:
    rest = loop.service.create_rest_client()
    assert loop.saved
    of_runs: List[Callable[[], Any]] = [
        lambda: rest.list_training_runs().result(WAIT_S).training_runs,
        lambda: rest.list_checkpoints(loop.trainer.model_id).result(WAIT_S).checkpoints,
    ]
    of_all: List[Callable[[], Any]] = [
        lambda: rest.list_sessions().result(WAIT_S).sessions,
        lambda: rest.list_user_checkpoints().result(WAIT_S).checkpoints,
    ]
    has_all = loop.profile in ("tuft-0.2", "hosted", EVERYTHING)
    has_runs = has_all or loop.profile.startswith("skyrl")
    for calls, there in ((of_runs, has_runs), (of_all, has_all)):
        for call in calls:
            if there:
                assert call()
            else:
                with pytest.raises(APIStatusError) as raised:
                    call()
                assert raised.value.status == 404


@step
def publish_and_delete(loop: Loop) -> None:
    rest = loop.service.create_rest_client()
    path = loop.trainer.save_state(loop.name()).result(WAIT_S).path
    if loop.profile not in ("tuft-0.2", "hosted", EVERYTHING):
        with pytest.raises(RouteMissingError):
            rest.publish_checkpoint_from_tinker_path(path).result(WAIT_S)
        return
    rest.publish_checkpoint_from_tinker_path(path).result(WAIT_S)
    found = rest.list_checkpoints(loop.trainer.model_id).result(WAIT_S).checkpoints
    assert [checkpoint.public for checkpoint in found if checkpoint.tinker_path == path] == [True]
    rest.delete_checkpoint_from_tinker_path(path).result(WAIT_S)
    found = rest.list_checkpoints(loop.trainer.model_id).result(WAIT_S).checkpoints
    assert path not in [checkpoint.tinker_path for checkpoint in found]


@step
def download(loop: Loop) -> None:
    rest = loop.service.create_rest_client()
    sampler = loop.trainer.save_weights_for_sampler(loop.name()).result(WAIT_S).path
    for number, path in enumerate((loop.saved, sampler)):
        folder = loop.folder / str(number)
        lacking = {
            "hatchery-0.3": (loop.saved, sampler),
            "hosted": (sampler,),  # the training checkpoint is exported to download it
            "skyrl-0.3": (loop.saved,),
            "skyrl-0.4": (loop.saved,),
        }
        if path in lacking.get(loop.profile, ()):
            with pytest.raises(RouteMissingError):
                rest.download_checkpoint(path, folder)
        else:
            rest.download_checkpoint(path, folder)
            assert "deterministic.json" in [file.name for file in folder.rglob("*")]


@step
def capabilities(loop: Loop) -> None:
    found = loop.service.get_server_capabilities()
    assert [model.model_name for model in found.supported_models] == ["deterministic"]


@step
def unknown_loss(loop: Loop) -> None:
    with pytest.raises((RequestFailedError, APIStatusError), match="no_such_loss"):
        loop.trainer.forward_backward([datum()], "no_such_loss").result(WAIT_S)
    loop.logprobs(loop.trainer)  # the run goes on
    loop.trainer.train_step([datum()], "cross_entropy", ADAM)


@step
def failure_in_a_full_pipeline(loop: Loop) -> None:
    trainer = loop.trainer
    futures: List[Any] = [trainer.forward_backward([datum()], "cross_entropy")]
    futures += [trainer.forward_backward([datum()], "no_such_loss") for _ in range(2)]
    for _ in range(3):
        futures += [trainer.forward_backward([datum()], "cross_entropy"), trainer.optim_step(ADAM)]
    for bad in futures[1:3]:
        with pytest.raises((RequestFailedError, APIStatusError), match="no_such_loss"):
            bad.result(WAIT_S)
    done = [future.result(WAIT_S) for future in futures if future not in futures[1:3]]
    losses = [output.metrics["loss:sum"] for output in done if hasattr(output, "loss_fn_outputs")]
    assert losses[0] == losses[1]  # no step was taken between these
    assert losses[1] > losses[2] > losses[3]  # and one between these, no more and no less


@step
def bad_input_in_the_middle(loop: Loop) -> None:
    trainer = loop.trainer
    with pytest.raises(InvalidInputError):
        trainer.forward_backward([], "cross_entropy")
    with pytest.raises(InvalidInputError, match="weights"):
        trainer.forward_backward(
            [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0]})],
            "cross_entropy",
        )
    lonely = Datum(ModelInput.from_ints([1, 2]), {"weights": [1.0, 1.0]})
    with pytest.raises((RequestFailedError, APIStatusError), match="target_tokens"):
        trainer.forward_backward([lonely], "cross_entropy").result(WAIT_S)
    trainer.train_step([datum()], "cross_entropy", ADAM)


@step
def strange_token(loop: Loop) -> None:
    sampler = loop.service.create_sampling_client(base_model="deterministic")
    future = sampler.compute_logprobs(ModelInput.from_ints([1, 1_000_000, 3]))
    if loop.profile in ("hosted", "hatchery-0.3", EVERYTHING):
        with pytest.raises((RequestFailedError, APIStatusError), match="token"):
            future.result(WAIT_S)
        return
    logprobs = future.result(WAIT_S)
    assert len(logprobs) == 3
    assert (logprobs[1] is None) is loop.profile.startswith("skyrl")

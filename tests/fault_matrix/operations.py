"""The operations of the clients, each as a value that a cell can run and compare."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence
from unittest import mock

from fault_matrix.fault_cases import FaultCase
from tinkex import ServiceClient, TrainingClient, types
from tinkex._api import archives
from tinkex._transport.server_flags import ABSENT
from tinkex.local.settings import ClientFlags, ServerSettings
from tinkex.testing import FakeServer

ADAM = types.AdamParams(1e-3)
MODEL = "deterministic"
PROMPT = types.ModelInput.from_ints([5, 6, 7])
PARAMS = types.SamplingParams(max_tokens=3, stop=[], seed=1)
#: Of the servers that ask for one.
KEY = "tml-of-the-fault-matrix"
#: Datums in a batch, and per request if the batch takes several.
MANY = 6
FEW = {"fwdbwd_max_chunk_len": 2}

#: Settings of every client in the matrix: it gives up before its operation counts as hanging.
SETTINGS = {
    "read_timeout_s": 20.0,
    "poll_timeout_s": 20.0,
    "startup_timeout_s": 20.0,
    "max_outage_s": 20.0,
}


def datum(index: int = 1) -> types.Datum:
    return types.Datum(types.ModelInput.from_ints([index % 900 + 1, 2]), {"target_tokens": [2, 3]})


@dataclasses.dataclass
class World:
    """The objects that an operation works with, all created without a fault."""

    server: FakeServer
    folder: Path
    settings: Mapping[str, Any]
    service: ServiceClient
    trainer: Optional[TrainingClient] = None
    sampler: Any = None
    path: str = ""
    sampler_path: str = ""

    @property
    def run(self) -> TrainingClient:
        assert self.trainer is not None
        return self.trainer


def with_run(world: World) -> None:
    """Create a run that has taken a step, after all that a run negotiates with the server."""
    world.trainer = world.service.create_lora_training_client(MODEL, rank=4, seed=0)
    world.run.train_step([datum()], "cross_entropy", ADAM)


def with_torch(world: World) -> None:
    importlib.import_module("torch")  # on a busy machine this takes longer than an operation may
    with_run(world)


def with_checkpoint(world: World) -> None:
    with_run(world)
    world.path = world.run.save_state("saved").result().path
    world.sampler_path = world.run.save_weights_for_sampler("saved").result().path


def with_sampler(world: World) -> None:
    world.sampler = world.service.create_sampling_client(base_model=MODEL)
    world.sampler.sample(PROMPT, 1, PARAMS).result()


def with_gradient(world: World) -> None:
    with_run(world)
    world.run.forward_backward([datum()], "cross_entropy").result()


def nothing(world: World) -> None:
    """Need nothing but the session."""


def passed(output: types.ForwardBackwardOutput) -> Any:
    return len(output.loss_fn_outputs), round(output.metrics["loss:sum"], 3)


def loss_of(trainer: TrainingClient) -> Any:
    return passed(trainer.forward([datum()], "cross_entropy").result())


def stepped(step: Any) -> Any:
    return passed(step.forward_backward), step.optim.metrics["optimizer_steps:max"]


def sampled(response: types.SampleResponse) -> Any:
    return [list(sequence.tokens) for sequence in response.sequences]


def construct(world: World) -> Any:
    with ServiceClient(base_url=world.server.url, **world.settings) as service:
        return service.session_id in world.server.live_sessions()


def create(world: World) -> Any:
    world.trainer = world.service.create_lora_training_client(MODEL, rank=4, seed=0)
    return loss_of(world.run)


def custom_loss(world: World) -> Any:
    def loss(data: Any, logprobs: Any) -> Any:
        return sum((values * values).sum() for values in logprobs), {"mine": 3.0}

    return passed(world.run.forward_backward_custom([datum()], loss).result())


def pipeline(world: World) -> Any:
    batches = [[datum(index)] for index in range(4)]
    steps = world.run.pipeline(batches, "cross_entropy", ADAM, depth=2)
    return [stepped(step) for step in steps]


def save(world: World) -> Any:
    return world.run.save_state("mine").result().path


def save_for_sampler(world: World) -> Any:
    return world.run.save_weights_for_sampler("mine").result().path


def load(world: World) -> Any:
    world.run.load_state(world.path).result()
    return loss_of(world.run)


def load_with_optimizer(world: World) -> Any:
    world.run.load_state_with_optimizer(world.path).result()
    return stepped(world.run.train_step([datum()], "cross_entropy", ADAM))


def create_from_state(world: World) -> Any:
    return loss_of(world.service.create_training_client_from_state(world.path))


def create_from_state_with_optimizer(world: World) -> Any:
    create = world.service.create_training_client_from_state_with_optimizer
    return stepped(create(world.path).train_step([datum()], "cross_entropy", ADAM))


def base_sampler(world: World) -> Any:
    sampler = world.service.create_sampling_client(base_model=MODEL)
    return sampled(sampler.sample(PROMPT, 1, PARAMS).result())


def sampler_of_path(world: World) -> Any:
    sampler = world.service.create_sampling_client(model_path=world.sampler_path)
    return sampled(sampler.sample(PROMPT, 1, PARAMS).result())


def sampler_of_run(world: World) -> Any:
    sampler = world.run.save_weights_and_get_sampling_client()
    return sampled(sampler.sample(PROMPT, 1, PARAMS).result())


def sample_many(world: World) -> Any:
    prompts = [types.ModelInput.from_ints([index, 6]) for index in range(1, 9)]
    stream = world.sampler.sample_many(prompts, PARAMS, max_in_flight=3, order="input")
    return [sampled(one.response) for one in stream]


def lists(world: World) -> Any:
    rest = world.service.create_rest_client()
    return [
        len(rest.list_training_runs().result().training_runs),
        [c.checkpoint_id for c in rest.list_checkpoints(world.run.model_id).result().checkpoints],
        len(rest.list_user_checkpoints().result().checkpoints),
        rest.list_sessions().result().sessions == [world.service.session_id],
        len(rest.get_server_capabilities().result().supported_models),
    ]


def download(world: World) -> Any:
    rest = world.service.create_rest_client()
    # A 503 may also mean that the server is building the archive, which can take minutes.
    with mock.patch.object(archives, "BUILDING_PAUSE_S", 0.05):
        folder = rest.download_checkpoint(world.path, world.folder / "downloaded")
    files = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    state = json.loads(files["deterministic.json"])
    # The files come from an export if the server lacks archives: then they lack optimizer state.
    return sorted(files), state["lora"], state["steps"]


def download_files(world: World) -> Any:
    rest = world.service.create_rest_client()
    path = world.run.save_weights_external("files").result().path
    folder = rest.download_checkpoint(path, world.folder / "downloaded")
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def delete(world: World) -> Any:
    rest = world.service.create_rest_client()
    rest.delete_checkpoint_from_tinker_path(world.path).result()
    return [c.checkpoint_id for c in rest.list_checkpoints(world.run.model_id).result().checkpoints]


def close(world: World) -> Any:
    world.service.close()
    return None


class Operation:
    """One operation: prepared without a fault, then run with one.

    Args:
        fallback: additional work that it does if the server lacks a route.
        settings, flags: of the server; with a key in *settings*, clients exchange it for tokens.
    """

    def __init__(
        self,
        prepare: Callable[[World], None],
        run: Callable[[World], Any],
        name: str = "",
        *,
        fallback: Sequence[str] = (),
        flags: Optional[Mapping[str, Any]] = None,
        **settings: Any,
    ) -> None:
        self.prepare = prepare
        self.run = run
        self.name = name or run.__name__
        self._fallback = fallback
        self._server_settings = ServerSettings(
            retrieve_hold_s=0.5,
            missing_seq_id_s=0.2,
            flags=ClientFlags(**(flags or {})),
            **settings,
        )

    def server(self) -> FakeServer:
        """Create the server that it needs."""
        return FakeServer(settings=self._server_settings)

    def fallback_to(self, case: FaultCase) -> Sequence[str]:
        """Return the additional work that it may do if *case* strikes it."""
        return self._fallback if case.status in ABSENT else ()


def _all() -> List[Operation]:
    def one_pass(world: World) -> Any:
        return passed(world.run.forward_backward([datum()], "cross_entropy").result())

    def large_pass(world: World) -> Any:
        batch = [datum(index) for index in range(MANY)]
        return passed(world.run.forward_backward(batch, "cross_entropy").result())

    def optim_step(world: World) -> Any:
        return world.run.optim_step(ADAM).result().metrics

    def train_step(world: World) -> Any:
        return stepped(world.run.train_step([datum()], "cross_entropy", ADAM))

    def forward(world: World) -> Any:
        return loss_of(world.run)

    def large_forward(world: World) -> Any:
        batch = [datum(index) for index in range(MANY)]
        return passed(world.run.forward(batch, "cross_entropy").result())

    def unload(world: World) -> Any:
        trainer, world.trainer = world.run, None
        return type(trainer.unload().result()).__name__

    def sample(world: World) -> Any:
        return sampled(world.sampler.sample(PROMPT, 2, PARAMS).result())

    def logprobs(world: World) -> Any:
        return world.sampler.compute_logprobs(PROMPT).result()

    batch_polling = {"sample_use_retrieve_futures": True}
    operations = [
        Operation(nothing, construct),
        Operation(nothing, create),
        Operation(with_run, forward),
        Operation(with_run, large_forward, "forward, several requests", flags=FEW),
        Operation(with_run, one_pass, "forward_backward"),
        Operation(with_run, large_pass, "forward_backward, several requests", flags=FEW),
        Operation(with_gradient, optim_step),
        Operation(with_run, train_step),
        Operation(with_run, pipeline),
        Operation(with_torch, custom_loss),
        Operation(
            with_torch,
            custom_loss,
            "custom_loss, on server",
            flags={"custom_loss_server_side": True},
        ),
        Operation(with_run, save),
        Operation(with_run, save_for_sampler),
        Operation(with_checkpoint, load),
        Operation(with_checkpoint, load_with_optimizer),
        Operation(with_checkpoint, create_from_state),
        Operation(with_checkpoint, create_from_state_with_optimizer),
        Operation(nothing, base_sampler),
        Operation(with_checkpoint, sampler_of_path),
        Operation(with_run, sampler_of_run),
        Operation(with_sampler, sample),
        Operation(with_sampler, sample_many),
        Operation(with_sampler, sample, "sample, batch polling", flags=batch_polling),
        Operation(with_sampler, sample_many, "sample_many, batch polling", flags=batch_polling),
        Operation(with_sampler, sample, "sample, size first", metadata_threshold_bytes=1),
        Operation(with_sampler, logprobs),
        Operation(with_checkpoint, lists),
        Operation(with_checkpoint, download, fallback=("create", "load", "export")),
        Operation(with_run, download_files),
        Operation(with_checkpoint, delete),
        Operation(with_run, unload),
        Operation(nothing, construct, "construct, with tokens", api_key=KEY, jwt=True),
        Operation(with_run, train_step, "train_step, with tokens", api_key=KEY, jwt=True),
        Operation(with_run, close),
    ]
    if importlib.util.find_spec("torch") is None:
        operations = [one for one in operations if "custom_loss" not in one.name]
    return operations


OPERATIONS: Dict[str, Operation] = {one.name: one for one in _all()}

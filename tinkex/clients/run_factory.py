"""RunFactory: makes the training runs of one session, and the clients that train them."""

from __future__ import annotations

from typing import Mapping, Optional

from tinkex._api import training as api
from tinkex._sessions.runtime import Runtime
from tinkex._training.checks import check_metadata, check_token
from tinkex._training.create_run import Checkpoint, make_run, wait_for_result
from tinkex.clients.training import TrainingClient
from tinkex.futures import APIFuture
from tinkex.types import CreateModelResponse, LoraConfig, OptimizerConfig
from tinkex.types.checkpoint_path import check_model_name, check_tinker_path
from tinkex.types.optimizer import optimizer_config_to_wire


class RunFactory:
    """Makes runs in the background.  Thread-safe.  Arguments are checked before anything is sent.

    A run's number is reserved by the call, so that runs are numbered in the order of the calls.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def fresh(
        self,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Optional[Mapping[str, str]],
        optimizer: Optional[OptimizerConfig],
    ) -> APIFuture[TrainingClient]:
        """Make a run with a new adapter; see `ServiceClient.create_lora_training_client`."""
        base_model = check_model_name(base_model)
        lora.check()
        metadata = check_metadata(user_metadata)
        optimizer_config = optimizer_config_to_wire(optimizer)
        runtime = self._runtime
        runtime.ensure_open("create_lora_training_client")
        number = runtime.session.next_model_seq_id()

        def create() -> TrainingClient:
            accepted = api.create_model(
                runtime.transport,
                session_id=runtime.session.session_id,
                model_seq_id=number,
                base_model=base_model,
                lora_config=lora,
                user_metadata=metadata,
                optimizer_config=optimizer_config,
            )
            created = wait_for_result(runtime, "create_model", accepted, CreateModelResponse)
            return _ready(TrainingClient(runtime, created.model_id, base_model))

        return runtime.run("create_lora_training_client", create)

    def from_checkpoint(
        self,
        path: str,
        base_model: Optional[str],
        user_metadata: Optional[Mapping[str, str]],
        weights_access_token: Optional[str],
        *,
        with_optimizer: bool,
        optimizer: Optional[OptimizerConfig] = None,
    ) -> APIFuture[TrainingClient]:
        """Make a run from a checkpoint; see `ServiceClient.create_training_client_from_state`."""
        path = check_tinker_path(path)
        weights_access_token = check_token(weights_access_token)
        base_model = None if base_model is None else check_model_name(base_model)
        metadata = check_metadata(user_metadata)
        optimizer_config = optimizer_config_to_wire(optimizer)
        runtime = self._runtime
        runtime.ensure_open("create_training_client_from_state")
        asked = Checkpoint(
            runtime.session.next_model_seq_id(),
            path,
            with_optimizer,
            base_model,
            metadata,
            weights_access_token,
            optimizer_config,
        )

        def create() -> TrainingClient:
            made = make_run(runtime, asked)
            client = TrainingClient(runtime, made.model_id, made.base_model, made.next_seq_id)
            return _ready(client)

        return runtime.run("create_training_client_from_state", create)


def _ready(client: TrainingClient) -> TrainingClient:
    """Ask for the run's facts while we are in the background anyway."""
    try:
        client.get_info()
    except BaseException:
        client.close()
        raise
    return client

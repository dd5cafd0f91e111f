"""Creating training runs in the background, with the clients that train them.

Arguments are checked before anything is sent.  A run's ``model_seq_id`` is reserved by the call,
so that runs are numbered in the order of the calls.
"""

from __future__ import annotations

import functools
from typing import Any, Mapping, Optional

from tinkex._api import training as api
from tinkex._sessions.runtime import Runtime
from tinkex._training.checks import check_metadata, check_token
from tinkex._training.create_run import Checkpoint, make_run, wait_for_result
from tinkex.clients.training import TrainingClient
from tinkex.futures import APIFuture
from tinkex.types import CreateModelResponse, LoraConfig, OptimizerConfig
from tinkex.types.checkpoint_path import check_model_name, check_tinker_path
from tinkex.types.optimizer import optimizer_config_to_wire


def create_run(
    runtime: Runtime,
    base_model: str,
    lora: LoraConfig,
    user_metadata: Optional[Mapping[str, str]],
    optimizer: Optional[OptimizerConfig],
) -> APIFuture[TrainingClient]:
    """Create a run with a new adapter; see `ServiceClient.create_lora_training_client`."""
    base_model = check_model_name(base_model)
    lora.check()
    metadata = check_metadata(user_metadata)
    optimizer_config = optimizer_config_to_wire(optimizer)
    runtime.ensure_open("create_lora_training_client")
    create = functools.partial(
        _create,
        runtime,
        base_model,
        session_id=runtime.session.session_id,
        model_seq_id=runtime.session.next_model_seq_id(),
        lora_config=lora,
        user_metadata=metadata,
        optimizer_config=optimizer_config,
    )
    return runtime.run("create_lora_training_client", create)


def load_run(
    runtime: Runtime,
    path: str,
    base_model: Optional[str] = None,
    user_metadata: Optional[Mapping[str, str]] = None,
    weights_access_token: Optional[str] = None,
    *,
    with_optimizer: bool,
    optimizer: Optional[OptimizerConfig] = None,
) -> APIFuture[TrainingClient]:
    """Create a run from a checkpoint; see `ServiceClient.create_training_client_from_state`."""
    path = check_tinker_path(path)
    weights_access_token = check_token(weights_access_token)
    base_model = None if base_model is None else check_model_name(base_model)
    metadata = check_metadata(user_metadata)
    optimizer_config = optimizer_config_to_wire(optimizer)
    runtime.ensure_open("create_training_client_from_state")
    checkpoint = Checkpoint(
        runtime.session.next_model_seq_id(),
        path,
        with_optimizer,
        base_model,
        metadata,
        weights_access_token,
        optimizer_config,
    )
    load = functools.partial(_load, runtime, checkpoint)
    return runtime.run("create_training_client_from_state", load)


def _create(runtime: Runtime, base_model: str, **fields: Any) -> TrainingClient:
    accepted = api.create_model(runtime.transport, base_model=base_model, **fields)
    created = wait_for_result(runtime, "create_model", accepted, CreateModelResponse)
    return _ready(TrainingClient(runtime, created.model_id, base_model))


def _load(runtime: Runtime, checkpoint: Checkpoint) -> TrainingClient:
    made = make_run(runtime, checkpoint)
    return _ready(TrainingClient(runtime, made.model_id, made.base_model, made.next_seq_id))


def _ready(client: TrainingClient) -> TrainingClient:
    """Fetch the facts about the run, since this is a background thread anyway."""
    try:
        client.get_info()
    except BaseException:
        client.close()
        raise
    return client

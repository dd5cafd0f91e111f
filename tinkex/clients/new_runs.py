"""Creating training runs in the background, with the clients that train them.

Arguments are checked before anything is sent.  A run's ``model_seq_id`` is reserved by the call,
so that runs are numbered in the order of the calls.
"""

from __future__ import annotations

import functools
from typing import Mapping, Optional, Union

from tinkex._sessions.runtime import Runtime
from tinkex._training.checks import check_metadata, check_token
from tinkex._training.create_run import FromCheckpoint, NewAdapter
from tinkex.clients.training import TrainingClient
from tinkex.futures import APIFuture
from tinkex.types import LoraConfig, OptimizerConfig
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
    model_seq_id = runtime.session.next_model_seq_id()
    source = NewAdapter(model_seq_id, base_model, lora, metadata, optimizer_config)
    create = functools.partial(_create, runtime, source)
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
    source = FromCheckpoint(
        runtime.session.next_model_seq_id(),
        path,
        with_optimizer,
        base_model,
        metadata,
        weights_access_token,
        optimizer_config,
    )
    create = functools.partial(_create, runtime, source)
    return runtime.run("create_training_client_from_state", create)


def _create(runtime: Runtime, source: Union[NewAdapter, FromCheckpoint]) -> TrainingClient:
    """Create the run, and fetch its facts, since this is a background thread anyway."""
    run = source.create(runtime)
    client = TrainingClient(runtime, run.model_id, run.base_model, run.next_seq_id)
    try:
        client.get_info()
    except BaseException:
        client.close()
        raise
    return client

"""tinkex has every public name of the official SDK, or docs/compatibility.md says why not."""

from __future__ import annotations

import inspect
from typing import Dict

import pytest

import tinkex
from tinkex import types

NAMES = """
ServiceClient TrainingClient SamplingClient RestClient AdminClient APIFuture LossHandle
PerDatumLossFn BackcompatTrainingClientFuture BackcompatSamplingClientFuture auth types resources
AdamOptimizerConfig AdamParams DimuonOptimizerConfig DimuonParams OptimParams Checkpoint
CheckpointType Datum DmelChunk EncodedTextChunk ForwardBackwardOutput LoraConfig ModelID ModelInput
ModelInputChunk OptimStepRequest OptimStepResponse ParsedCheckpointTinkerPath PromptProvenanceSpan
SampledProvenanceSpan SampledSequence SampleRequest SampleResponse SamplingParams StopReason
TensorData TensorDtype TrainingRun Timeout RequestOptions APIResponse AsyncAPIResponse TinkerError
APIError APIResponseValidationError APIStatusError BadRequestError AuthenticationError BillingError
PermissionDeniedError NotFoundError ConflictError UnprocessableEntityError RateLimitError
InternalServerError APIConnectionError APITimeoutError RequestFailedError ExperimentalWarning
__version__ __title__
"""
TOP = NAMES.split()

#: The names that tinkex lacks, and why.
LEFT_OUT: Dict[str, str] = {
    "resources": "coroutines, one class per group of endpoints; ours are plain functions",
    "Timeout": "an object of httpx; see Config for our timeouts",
    "RequestOptions": "options of an httpx request",
    "APIResponse": "wraps an httpx response",
    "AsyncAPIResponse": "wraps an httpx response, for coroutines",
    "OptimStepRequest": "a request body; no call takes one",
}

#: Client -> its methods.
METHODS: Dict[str, str] = {
    "ServiceClient": """create_lora_training_client create_training_client_from_state
        create_training_client_from_state_with_optimizer create_sampling_client create_custom_loss
        copy_weights close get_console_url get_telemetry get_server_capabilities
        create_rest_client""",
    "TrainingClient": """forward forward_backward forward_backward_custom optim_step save_state
        save_weights_for_sampler save_weights_external save_weights_and_get_sampling_client
        create_sampling_client get_info get_tokenizer get_console_url get_telemetry load_state
        load_state_with_optimizer""",
    "SamplingClient": """sample compute_logprobs get_base_model get_tokenizer get_sampler_handle
        from_sampler_handle get_telemetry""",
    "APIFuture": "result future",
}

#: Client -> its methods that have an awaitable twin ending in _async.
AWAITABLE: Dict[str, str] = {
    "ServiceClient": """create_lora_training_client create_training_client_from_state
        create_training_client_from_state_with_optimizer create_sampling_client
        get_server_capabilities""",
    "TrainingClient": """create_sampling_client forward forward_backward forward_backward_custom
        get_info load_state load_state_with_optimizer optim_step save_state
        save_weights_and_get_sampling_client save_weights_external save_weights_for_sampler""",
    "SamplingClient": "compute_logprobs get_base_model sample",
    "RestClient": """assign_session_project copy_weights delete_checkpoint
        delete_checkpoint_from_tinker_path export_session_trace get_audit_log get_billing_usage
        get_current_checkpoint_storage_usage get_external_weights_urls get_sampler get_session
        get_training_run get_training_run_by_tinker_path list_checkpoints list_sessions
        list_training_runs list_user_checkpoints publish_checkpoint_from_tinker_path
        set_checkpoint_ttl_from_tinker_path unpublish_checkpoint_from_tinker_path""",
    "AdminClient": "get_audit_log get_billing_usage get_current_checkpoint_storage_usage",
}

SIGNATURES: Dict[str, str] = {
    "ServiceClient.create_lora_training_client": "base_model rank seed train_mlp train_attn "
    "train_unembed user_metadata optimizer",
    "ServiceClient.create_training_client_from_state": "path base_model user_metadata "
    "weights_access_token optimizer",
    "ServiceClient.create_training_client_from_state_with_optimizer": "path base_model "
    "user_metadata weights_access_token",
    "ServiceClient.create_sampling_client": "model_path base_model retry_config "
    "record_stability_info",
    "ServiceClient.create_custom_loss": "fn input_ranks",
    "ServiceClient.copy_weights": "path ttl_seconds weights_access_token",
    "TrainingClient.forward": "data loss_fn loss_fn_config",
    "TrainingClient.forward_backward": "data loss_fn loss_fn_config",
    "TrainingClient.forward_backward_custom": "data loss_fn loss_type_input",
    "TrainingClient.optim_step": "optim_params adam_params",
    "TrainingClient.save_state": "name ttl_seconds overwrite user_metadata",
    "TrainingClient.save_weights_for_sampler": "name ttl_seconds user_metadata",
    "TrainingClient.save_weights_external": "name ttl_seconds age_encryption_recipients",
    "TrainingClient.save_weights_and_get_sampling_client": "name retry_config "
    "record_stability_info kind",
    "TrainingClient.create_sampling_client": "model_path retry_config record_stability_info",
    "TrainingClient.load_state": "path weights_access_token",
    "TrainingClient.load_state_with_optimizer": "path weights_access_token",
    "SamplingClient.sample": "prompt num_samples sampling_params include_prompt_logprobs "
    "topk_prompt_logprobs topk_sample_logprobs target_prompt_logprobs prompt_alt_tokens_k "
    "prompt_logprobs_last_n",
    "SamplingClient.compute_logprobs": "prompt prompt_logprobs_last_n",
}

HELPERS: Dict[str, str] = {
    "ModelInput": "from_ints to_ints length empty append append_int",
    "EncodedTextChunk": "length",
    "TensorData": "from_numpy from_torch from_torch_sparse to_numpy to_torch tolist data",
    "Datum": "with_provenance",
    "SaveWeightsResponse": "get_console_url",
    "SaveWeightsForSamplerResponse": "get_console_url get_playground_url",
    "ParsedCheckpointTinkerPath": "from_tinker_path",
    "RequestErrorCategory": "Unknown Server User",
}


@pytest.mark.parametrize("name", TOP)
def test_every_top_level_name_exists_or_has_a_reason_not_to(name: str) -> None:
    assert hasattr(tinkex, name) != (name in LEFT_OUT)


@pytest.mark.parametrize(
    ("client", "method"),
    [(client, method) for client, methods in METHODS.items() for method in methods.split()],
)
def test_every_method_exists(client: str, method: str) -> None:
    assert callable(getattr(getattr(tinkex, client), method))


@pytest.mark.parametrize("method", SIGNATURES)
def test_parameters_have_the_names_and_the_order_of_the_official_ones(method: str) -> None:
    owner, name = method.split(".")
    parameters = list(inspect.signature(getattr(getattr(tinkex, owner), name)).parameters)
    assert parameters[1:] == SIGNATURES[method].split()


@pytest.mark.parametrize(
    ("owner", "helper"),
    [(owner, helper) for owner, helpers in HELPERS.items() for helper in helpers.split()],
)
def test_every_helper_of_the_types_exists(owner: str, helper: str) -> None:
    assert hasattr(getattr(types, owner), helper)


def test_a_client_can_stand_in_for_the_future_of_itself() -> None:
    assert tinkex.BackcompatTrainingClientFuture is tinkex.TrainingClient
    assert tinkex.BackcompatSamplingClientFuture is tinkex.SamplingClient


@pytest.mark.parametrize(
    ("client", "method"),
    [(client, method) for client, methods in AWAITABLE.items() for method in methods.split()],
)
def test_every_awaitable_method_exists(client: str, method: str) -> None:
    twin = getattr(getattr(tinkex, client), f"{method}_async")
    assert inspect.iscoroutinefunction(twin)
    assert twin.__name__ == f"{method}_async"
    assert twin.__qualname__ == f"{client}.{method}_async"
    of_method = inspect.signature(getattr(getattr(tinkex, client), method))
    assert list(inspect.signature(twin).parameters) == list(of_method.parameters)


def test_the_holder_of_a_session_names_and_closes_it(service: tinkex.ServiceClient) -> None:
    assert service.holder.get_session_id() == service.session_id
    service.holder.close()
    with pytest.raises(tinkex.ClientClosedError):
        service.create_rest_client().list_sessions()


@pytest.mark.parametrize("client", ["ServiceClient", "TrainingClient", "SamplingClient"])
def test_a_misspelt_method_raises_an_attribute_error(client: str) -> None:
    cls = getattr(tinkex, client)
    with pytest.raises(AttributeError, match=r"no attribute 'smaple'$"):
        cls.__new__(cls).smaple  # noqa: B018


def test_the_category_of_a_failure_equals_its_enum() -> None:
    error = tinkex.RequestFailedError("x", category="user")
    assert error.category == types.RequestErrorCategory.User
    assert types.RequestErrorCategory("server") is types.RequestErrorCategory.Server
    assert str(types.RequestErrorCategory.Unknown) == "unknown"

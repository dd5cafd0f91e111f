"""Sessions, training and sampling, by public method (docs/protocol.md)."""

from __future__ import annotations

from api.endpoint import Endpoint, N

import tinkex
from tinkex import types

MODEL = "session-1:train:0"
LORA = {"rank": 8, "train_unembed": True, "train_mlp": True, "train_attn": True}
ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
SAVED = f"tinker://{MODEL}/weights/a"
SHOWN = f"tinker://{MODEL}/sampler_weights/a"
PROMPT = types.ModelInput.from_ints([1, 2, 3])
PROMPT_JSON = {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}
PARAMS = {"temperature": 1.0, "top_k": -1, "top_p": 1.0}

CREATE = (
    Endpoint(
        "create_lora_training_client",
        lambda c: c.service.create_lora_training_client("b", rank=8).model_id,
        "POST", "create_model",
        {"session_id": "session-1", "model_seq_id": N, "base_model": "b", "lora_config": LORA,
         "type": "create_model"},
        least={"model_id": MODEL}, least_gives=MODEL, polled=True,
        most={"model_id": "other", "type": "create_model"}, most_gives="other",
    ),
    Endpoint(
        "create_lora_training_client with everything",
        lambda c: c.service.create_lora_training_client(
            "b", 4, seed=5, train_mlp=False, train_attn=False, train_unembed=True,
            user_metadata={"k": "v"}, optimizer=types.DimuonOptimizerConfig()).model_id,
        "POST", "create_model",
        {"session_id": "session-1", "model_seq_id": N, "base_model": "b",
         "lora_config": {"rank": 4, "seed": 5, "train_unembed": True, "train_mlp": False,
                         "train_attn": False},
         "user_metadata": {"k": "v"}, "optimizer_config": {"type": "dimuon", "version": 1},
         "type": "create_model"},
        least={"model_id": MODEL}, least_gives=MODEL, polled=True,
    ),
    Endpoint(
        "create_training_client_from_state",
        lambda c: c.service.create_training_client_from_state(SAVED).model_id,
        "POST", "load_weights",
        {"session_id": "session-1", "model_seq_id": N, "path": SAVED, "optimizer": False,
         "type": "load_weights"},
        spare=("model_id",), least={"model_id": "loaded"}, least_gives="loaded", polled=True,
        most={"path": SAVED, "model_id": "loaded", "type": "load_weights"}, most_gives="loaded",
    ),
    Endpoint(
        "create_training_client_from_state with everything",
        lambda c: c.service.create_training_client_from_state(
            SAVED, "b", {"k": "v"}, "wat",
            optimizer={"type": "shampoo", "block": 128}).model_id,
        "POST", "load_weights",
        {"session_id": "session-1", "model_seq_id": N, "path": SAVED, "optimizer": False,
         "base_model": "b", "user_metadata": {"k": "v"}, "weights_access_token": "wat",
         "optimizer_config": {"type": "shampoo", "block": 128}, "type": "load_weights"},
        spare=("model_id",), least={"model_id": "loaded"}, least_gives="loaded", polled=True,
    ),
    Endpoint(
        "create_training_client_from_state_with_optimizer",
        lambda c: c.service.create_training_client_from_state_with_optimizer(SAVED).model_id,
        "POST", "load_weights",
        {"session_id": "session-1", "model_seq_id": N, "path": SAVED, "optimizer": True,
         "type": "load_weights"},
        spare=("model_id",), least={"model_id": "loaded"}, least_gives="loaded", polled=True,
    ),
    Endpoint(
        "create_sampling_client of a base model",
        lambda c: c.service.create_sampling_client(base_model="b").sampling_session_id,
        "POST", "create_sampling_session",
        {"session_id": "session-1", "sampling_session_seq_id": N, "base_model": "b",
         "type": "create_sampling_session"},
        least={"sampling_session_id": "p"}, least_gives="p",
        most={"sampling_session_id": "p", "type": "create_sampling_session"}, most_gives="p",
    ),
    Endpoint(
        "create_sampling_client of a checkpoint",
        lambda c: c.service.create_sampling_client("tinker://skyrl/s1").sampling_session_id,
        "POST", "create_sampling_session",
        {"session_id": "session-1", "sampling_session_seq_id": N,
         "model_path": "tinker://skyrl/s1", "type": "create_sampling_session"},
        least={"sampling_session_id": "p"}, least_gives="p",
    ),
)  # fmt: skip

TRAIN = (
    Endpoint(
        "optim_step",
        lambda c: c.trainer.optim_step(types.AdamParams(learning_rate=0.01)).result(),
        "POST", "optim_step",
        {"adam_params": ADAM, "model_id": MODEL, "seq_id": N, "type": "optim_step"},
        least={}, least_gives=types.OptimStepResponse({}), polled=True,
        most={"metrics": {"grad_norm:mean": 1.5}, "type": "optim_step"},
        most_gives=types.OptimStepResponse({"grad_norm:mean": 1.5}),
    ),
    Endpoint(
        "optim_step with everything",
        lambda c: c.trainer.optim_step(
            types.AdamParams(0.5, 0.1, 0.2, 1e-6, weight_decay=0.3, grad_clip_norm=1.0)).result(),
        "POST", "optim_step",
        {"adam_params": {"learning_rate": 0.5, "beta1": 0.1, "beta2": 0.2, "eps": 1e-6,
                         "weight_decay": 0.3, "grad_clip_norm": 1.0},
         "model_id": MODEL, "seq_id": N, "type": "optim_step"},
        least={"metrics": None}, spare=("metrics",), polled=True,
        least_gives=types.OptimStepResponse({}),
    ),
    Endpoint(
        "optim_step of another family",
        lambda c: c.trainer.optim_step(types.DimuonParams(learning_rate=0.1)).result(),
        "POST", "optim_step",
        {"optimizer_params": {"type": "dimuon", "learning_rate": 0.1, "grad_clip_norm": 0.0,
                              "beta1": 0.9},
         "model_id": MODEL, "seq_id": N, "type": "optim_step"},
        least={}, least_gives=types.OptimStepResponse({}), polled=True,
    ),
    Endpoint(
        "save_state",
        lambda c: c.trainer.save_state("a").result(),
        "POST", "save_weights",
        {"model_id": MODEL, "path": "a", "seq_id": N, "type": "save_weights"},
        least={"path": SAVED}, least_gives=types.SaveWeightsResponse(SAVED), polled=True,
        most={"path": SAVED, "type": "save_weights"}, most_gives=types.SaveWeightsResponse(SAVED),
    ),
    Endpoint(
        "save_state with everything",
        lambda c: c.trainer.save_state(
            "a", ttl_seconds=3600, overwrite=True, user_metadata={"k": "v"}).result(),
        "POST", "save_weights",
        {"model_id": MODEL, "path": "a", "seq_id": N, "ttl_seconds": 3600, "overwrite": True,
         "user_metadata": {"k": "v"}, "type": "save_weights"},
        least={"path": "tinker://any/thing"},
        least_gives=types.SaveWeightsResponse("tinker://any/thing"), polled=True,
    ),
    Endpoint(
        "save_weights_for_sampler",
        lambda c: c.trainer.save_weights_for_sampler("a").result(),
        "POST", "save_weights_for_sampler",
        {"model_id": MODEL, "path": "a", "seq_id": N, "type": "save_weights_for_sampler"},
        least={"path": SHOWN}, least_gives=types.SaveWeightsForSamplerResponse(SHOWN), polled=True,
    ),
    Endpoint(
        "save_weights_for_sampler with everything",
        lambda c: c.trainer.save_weights_for_sampler("a", 7200, {"k": "v"}).result(),
        "POST", "save_weights_for_sampler",
        {"model_id": MODEL, "path": "a", "seq_id": N, "ttl_seconds": 7200,
         "user_metadata": {"k": "v"}, "type": "save_weights_for_sampler"},
        least={"path": SHOWN}, least_gives=types.SaveWeightsForSamplerResponse(SHOWN), polled=True,
    ),
    Endpoint(
        "save_weights_and_get_sampling_client",
        lambda c: c.trainer.save_weights_and_get_sampling_client().sampling_session_id,
        "POST", "save_weights_for_sampler",
        {"model_id": MODEL, "seq_id": N, "sampling_session_seq_id": N,
         "type": "save_weights_for_sampler"},
        least={"sampling_session_id": "p"}, least_gives="p", polled=True,
    ),
    Endpoint(
        "save_weights_and_get_sampling_client inflight",
        lambda c: c.trainer.save_weights_and_get_sampling_client(
            kind="inflight").sampling_session_id,
        "POST", "save_weights_for_sampler",
        {"model_id": MODEL, "seq_id": N, "sampling_session_seq_id": N, "kind": "inflight",
         "type": "save_weights_for_sampler"},
        least={"sampling_session_id": "p"}, least_gives="p", polled=True,
    ),
    Endpoint(
        "save_weights_external",
        lambda c: c.trainer.save_weights_external("e").result(),
        "POST", "save_weights_external",
        {"model_id": MODEL, "path": "e", "seq_id": N, "type": "save_weights_external"},
        least={"path": "tinker://m/external_weights/e"},
        least_gives=types.SaveWeightsExternalResponse("tinker://m/external_weights/e"),
        most={"path": "tinker://m/external_weights/e", "size_bytes": 9},
        most_gives=types.SaveWeightsExternalResponse("tinker://m/external_weights/e", 9),
        polled=True,
    ),
    Endpoint(
        "save_weights_external with everything",
        lambda c: c.trainer.save_weights_external("e", 3600, ["age1x"]).result(),
        "POST", "save_weights_external",
        {"model_id": MODEL, "path": "e", "seq_id": N, "ttl_seconds": 3600,
         "age_encryption_recipients": ["age1x"], "type": "save_weights_external"},
        least={"path": "tinker://m/external_weights/e"},
        least_gives=types.SaveWeightsExternalResponse("tinker://m/external_weights/e"),
        polled=True,
    ),
    Endpoint(
        "load_state",
        lambda c: c.trainer.load_state(SAVED).result(),
        "POST", "load_weights",
        {"model_id": MODEL, "seq_id": N, "path": SAVED, "optimizer": False,
         "type": "load_weights"},
        least={}, least_gives=types.LoadWeightsResponse(), polled=True,
        most={"path": SAVED, "model_id": MODEL},
        most_gives=types.LoadWeightsResponse(SAVED, MODEL),
    ),
    Endpoint(
        "load_state_with_optimizer",
        lambda c: c.trainer.load_state_with_optimizer(SAVED, weights_access_token="wat").result(),
        "POST", "load_weights",
        {"model_id": MODEL, "seq_id": N, "path": SAVED, "optimizer": True,
         "weights_access_token": "wat", "type": "load_weights"},
        least={}, least_gives=types.LoadWeightsResponse(), polled=True,
    ),
)  # fmt: skip

_LEAST_SAMPLES = {"sequences": [{"stop_reason": "length", "tokens": [5]}]}


def _told(response):
    """Return the contents of a sample response, comparable with ==."""
    return {
        "sequences": [(s.stop_reason, s.tokens, s.logprobs, s.topk_logprobs)
                      for s in response.sequences],
        "prompt_logprobs": response.prompt_logprobs,
        "topk_prompt_logprobs": response.topk_prompt_logprobs,
        "target": None if response.target_prompt_logprobs is None
        else response.target_prompt_logprobs.tolist(),
        "cached": response.prompt_cache_hit_tokens,
        "alt": None if response.prompt_alt_tokens is None
        else response.prompt_alt_tokens.tokens.tolist(),
    }  # fmt: skip


_LEAST_TOLD = {
    "sequences": [("length", [5], None, None)], "prompt_logprobs": None,
    "topk_prompt_logprobs": None, "target": None, "cached": 0, "alt": None,
}  # fmt: skip
_TARGET = tinkex.types.TensorData([[4, -1], [6, 7]], dtype="int64", shape=[2, 2])

SAMPLE = (
    Endpoint(
        "sample",
        lambda c: _told(c.sampler.sample(PROMPT).result()),
        "POST", "asample",
        {"num_samples": 1, "prompt": PROMPT_JSON, "sampling_params": PARAMS,
         "prompt_logprobs": False, "sampling_session_id": "session-1:sample:0", "seq_id": N,
         "type": "sample"},
        least=_LEAST_SAMPLES, least_gives=_LEAST_TOLD, polled=True,
        most={"type": "sample", "sequences": [{"stop_reason": "stop", "tokens": [5, 6],
                                              "logprobs": [-0.5, -0.25]}],
              "prompt_logprobs": None},
        most_gives={**_LEAST_TOLD, "sequences": [("stop", [5, 6], [-0.5, -0.25], None)]},
    ),
    Endpoint(
        "sample with everything",
        lambda c: _told(c.sampler.sample(
            PROMPT, 2, types.SamplingParams(max_tokens=4, seed=5, stop=["x"], temperature=0.5,
                                            top_k=6, top_p=0.5),
            include_prompt_logprobs=True, topk_prompt_logprobs=1, topk_sample_logprobs=1,
            target_prompt_logprobs=_TARGET, prompt_alt_tokens_k=1).result()),
        "POST", "asample",
        {"num_samples": 2, "prompt": PROMPT_JSON,
         "sampling_params": {"max_tokens": 4, "seed": 5, "stop": ["x"], "temperature": 0.5,
                             "top_k": 6, "top_p": 0.5},
         "prompt_logprobs": True, "topk_prompt_logprobs": 1, "topk_sample_logprobs": 1,
         "target_prompt_logprobs": {"data": [4, -1, 6, 7], "dtype": "int64", "shape": [2, 2]},
         "prompt_alt_tokens_k": 1, "sampling_session_id": "session-1:sample:0", "seq_id": N,
         "type": "sample"},
        spare=("prompt_logprobs", "topk_prompt_logprobs", "prompt_cache_hit_tokens",
               # tests/clients/test_sampling_client.py tests their use.
               "target_prompt_logprobs", "prompt_alt_tokens"),
        least={
            "sequences": [{"stop_reason": "length", "tokens": [5], "logprobs": [-0.5],
                           "topk_logprobs": [[[5, -0.5]]]}] * 2,
            "prompt_logprobs": [None, -1.0, -2.0],
            "topk_prompt_logprobs": [None, [[2, -1.0]], [[3, -2.0]]],
            "target_prompt_logprobs": {"data": [-3.0, 0.0, -4.0, -5.0], "dtype": "float32",
                                       "shape": [2, 2]},
            "prompt_alt_tokens": {
                "tokens": {"data": [8, 9], "dtype": "int64", "shape": [2, 1]},
                "logprobs": {"data": [-1.0, -1.0], "dtype": "float32", "shape": [2, 1]}},
            "prompt_cache_hit_tokens": 2,
        },
        least_gives={
            "sequences": [("length", [5], [-0.5], [[(5, -0.5)]])] * 2,
            "prompt_logprobs": [None, -1.0, -2.0],
            "topk_prompt_logprobs": [None, [(2, -1.0)], [(3, -2.0)]],
            "target": [[-3.0, 0.0], [-4.0, -5.0]], "cached": 2, "alt": [[8], [9]]},
        polled=True,
    ),
    Endpoint(
        "compute_logprobs",
        lambda c: c.sampler.compute_logprobs(PROMPT).result(),
        "POST", "asample",
        {"num_samples": 1, "prompt": PROMPT_JSON, "sampling_params": {**PARAMS, "max_tokens": 1},
         "prompt_logprobs": True, "sampling_session_id": "session-1:sample:0", "seq_id": N,
         "type": "sample"},
        spare=("prompt_logprobs",),
        least={**_LEAST_SAMPLES, "prompt_logprobs": [None, -1.0, -2.0]},
        least_gives=[None, -1.0, -2.0], polled=True,
        most={**_LEAST_SAMPLES, "prompt_logprobs": [-1.0, -2.0]},  # SkyRL: one fewer
        most_gives=[None, -1.0, -2.0],
    ),
    Endpoint(
        "compute_logprobs of the last",
        lambda c: c.sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=1).result(),
        "POST", "asample",
        {"num_samples": 1, "prompt": PROMPT_JSON, "sampling_params": {**PARAMS, "max_tokens": 1},
         "prompt_logprobs": True, "prompt_logprobs_last_n": 1,
         "sampling_session_id": "session-1:sample:0", "seq_id": N, "type": "sample"},
        spare=("prompt_logprobs",),
        least={**_LEAST_SAMPLES, "prompt_logprobs": [None, None, -2.0]},
        least_gives=[None, None, -2.0], polled=True,
    ),
)  # fmt: skip

OTHER = (
    Endpoint(
        "unload",
        lambda c: c.service.create_lora_training_client("b", rank=8).unload().result(),
        "POST", "unload_model", {"model_id": MODEL, "type": "unload_model"},
        least={"model_id": MODEL}, spare=("model_id",), polled=True,
        least_gives=types.UnloadModelResponse(MODEL),
    ),
    Endpoint(
        "copy_weights of the session",
        lambda c: c.service.copy_weights(SAVED).result(),
        "POST", "copy_weights", {"source_path": SAVED},
        least={"tinker_path": "tinker://c/weights/a"}, least_gives="tinker://c/weights/a",
    ),
    Endpoint(
        "copy_weights of the session with everything",
        lambda c: c.service.copy_weights(
            SAVED, ttl_seconds=3600, weights_access_token="wat").result(),
        "POST", "copy_weights", {"source_path": SAVED, "ttl_seconds": 3600},
        headers={"x-tinker-weights-access-token": "wat"},
        least={"tinker_path": "tinker://c/weights/a"}, least_gives="tinker://c/weights/a",
    ),
    Endpoint(
        "get_info",
        lambda c: c.service.create_lora_training_client("b", rank=8).get_info(),
        "POST", "get_info", {"model_id": MODEL, "type": "get_info"},
        least={"model_id": MODEL, "model_data": {}}, spare=("model_data",),
        least_gives=types.GetInfoResponse(MODEL),
        most={"model_id": MODEL, "is_lora": True, "lora_rank": 8, "model_name": "n",
              "model_data": {"arch": "a", "model_name": "b", "tokenizer_id": "t:x"},
              "optimizer_config": {"type": "adamw"}, "type": "get_info"},
        most_gives=types.GetInfoResponse(
            MODEL, types.ModelData("a", "b", "t:x"), True, 8, "n", {"type": "adamw"}),
    ),
)  # fmt: skip

WORK = CREATE + TRAIN + SAMPLE + OTHER

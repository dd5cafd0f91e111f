"""Turns the application's results into another server's: their encoding, and what they leave out.

Pure functions of a profile and a value.
"""

from __future__ import annotations

import dataclasses
from typing import Tuple

import numpy as np
from servers.profiles.profile import Profile

from tinkex.local.json_text import write_json
from tinkex.types import ForwardBackwardOutput, SampleResponse, TopkLogprobs
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, codec_for

_SCHEME = "tinker://"


def encode(profile: Profile, value: object, accept: str) -> Tuple[bytes, str]:
    """Return a result as *profile* sends it to a client that accepts *accept*, and its type."""
    in_protobuf = profile.results == "protobuf" or (
        profile.results == "accept" and PROTOBUF_CONTENT_TYPE in accept
    )
    codec = codec_for(PROTOBUF_CONTENT_TYPE if in_protobuf else JSON_CONTENT_TYPE)
    if isinstance(value, ForwardBackwardOutput):
        if not profile.pass_metrics:
            value = dataclasses.replace(value, metrics={})
        return codec.encode_output(value), codec.content_type
    if isinstance(value, SampleResponse):
        return codec.encode_samples(_prompt_rows(profile, value)), codec.content_type
    if isinstance(value, dict):
        if "metrics" in value and not profile.step_metrics:
            value = {**value, "metrics": None}
        if isinstance(value.get("path"), str):
            value = {**value, "path": path_outward(profile, value["path"])}
    return write_json(value), JSON_CONTENT_TYPE


def _prompt_rows(profile: Profile, response: SampleResponse) -> SampleResponse:
    logprobs, topk = response.prompt_logprobs_np, response.topk_prompt_logprobs_np
    if profile.first_logprob == "absent":
        logprobs = None if logprobs is None else logprobs[1:]
        topk = None if topk is None else TopkLogprobs(topk.token_ids[1:], topk.logprobs[1:])
    elif profile.first_logprob == "zero" and logprobs is not None:
        logprobs = np.concatenate([np.zeros(1, np.float32), logprobs[1:]])
    return dataclasses.replace(response, prompt_logprobs_np=logprobs, topk_prompt_logprobs_np=topk)


def path_outward(profile: Profile, path: str) -> str:
    """Return the application's checkpoint path in the shape that *profile* hands out."""
    run, _, rest = path[len(_SCHEME) :].partition("/")
    kind, _, name = rest.partition("/")
    if profile.sampler_paths == "checkpoints":
        return f"{_SCHEME}{run}/checkpoints/{name}"
    if profile.sampler_paths == "two" and kind == "sampler_weights":
        return f"{_SCHEME}{run}/{name}"
    return path


def path_inward(profile: Profile, path: str, kinds: Tuple[str, ...]) -> Tuple[str, ...]:
    """Return the application's paths that the outward *path* may stand for, likeliest first.

    *kinds* are the segments to try if the path does not name its kind.
    """
    parts = path[len(_SCHEME) :].split("/")
    if not path.startswith(_SCHEME):
        return (path,)
    if profile.sampler_paths == "checkpoints" and len(parts) == 3 and parts[1] == "checkpoints":
        return tuple(f"{_SCHEME}{parts[0]}/{kind}/{parts[2]}" for kind in kinds)
    if profile.sampler_paths == "two" and len(parts) == 2:
        return (f"{_SCHEME}{parts[0]}/sampler_weights/{parts[1]}",)
    return (path,)

"""The servers, as observed from outside in November 2026 (see docs/servers.md).

If something could not be observed, the profile takes the choice that is harder for a client.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, Dict, Tuple

from servers.profiles.profile import Profile

from tinkex.errors import LocalServerError
from tinkex.local.settings import ServerSettings

#: The routes that a client cannot do without; every server has them.
_CORE = (
    "GET healthz",
    "POST client/config",
    "POST create_session",
    "POST session_heartbeat",
    "GET get_server_capabilities",
    "POST create_model",
    "POST get_info",
    "POST load_weights",
    "POST weights_info",
    "POST forward_backward",
    "POST optim_step",
    "POST save_weights",
    "POST save_weights_for_sampler",
    "POST create_sampling_session",
    "POST asample",
    "POST retrieve_future",
    "POST telemetry",
)
_RUNS = "training_runs/{id}/checkpoints"

_SKYRL_ROUTES = (
    *_CORE,
    "POST unload_model",
    "GET samplers/{id}",
    "GET training_runs",
    "GET training_runs/{id}",
    f"GET {_RUNS}",
    f"GET {_RUNS}/{{id}}/archive",
)
_SKYRL_03 = Profile(
    name="skyrl-0.3",
    routes=(*_SKYRL_ROUTES, "POST forward"),
    reads=("json",),
    unreadable=500,
    results="json",
    future_ids=True,
    unknown_heartbeat=404,
    beats_go_on=True,
    numbers="arrival",
    first_logprob="absent",
    failures="400",
    busy="408",
    hold_s=300.0,
    key="none",
    load_into_new=422,
    load_first_only=True,
    pass_metrics=False,
    overwrites=False,
    sampler_paths="two",
    plain_ids=True,
    strange_tokens="nan",
)
_SKYRL_04 = dataclasses.replace(
    _SKYRL_03,
    name="skyrl-0.4",
    routes=_SKYRL_ROUTES,
    reads=("protobuf",),
    unreadable=415,
    results="protobuf",
)
_TUFT = Profile(
    name="tuft-0.2",
    routes=(
        *_CORE,
        "POST unload_model",
        "POST auth/token",
        "GET samplers/{id}",
        "GET sessions",
        "GET sessions/{id}",
        "GET training_runs",
        "GET training_runs/{id}",
        f"GET {_RUNS}",
        f"GET {_RUNS}/{{cp}}/archive",
        f"POST {_RUNS}/{{id}}/{{id}}/publish",
        f"DELETE {_RUNS}/{{id}}/{{id}}/publish",
        f"DELETE {_RUNS}/{{cp}}",
        "GET checkpoints",
    ),
    reads=("protobuf",),
    refuses_extras=True,
    unknown_heartbeat=500,
    crashes_on_unknown=True,
    unpublish_crashes=True,
    numbers="strict",
    first_logprob="zero",
    failures="mapped",
    created=201,
    accepted=202,
    deleted=204,
    wrong_key=403,
    load_into_new=400,
    step_metrics=False,
    overwrites=True,
    strange_tokens="unchecked",
)
_HATCHERY = Profile(
    name="hatchery-0.3",
    routes=(*_CORE, "GET client/config", "POST forward"),
    reads=("json",),
    unreadable=500,
    results="json",
    compresses=True,
    unknown_heartbeat=200,
    numbers="arrival",
    first_body_wins=True,
    first_logprob="zero",
    key="bearer",
    load_into_new=422,
    overwrites=True,
    sampler_paths="checkpoints",
    plain_ids=True,
    sampler_by_base="future",
    sampler_by_path=False,
    model_key="model_id",
)
_HOSTED = Profile(
    name="hosted",
    lacks=(
        "POST forward",
        "POST sample",
        "POST unload_model",
        "GET client/config",
        f"GET {_RUNS}/{{cp}}/archive",
    ),
    reads=("protobuf",),
    results="protobuf",
    checks_bodies=False,
    sequence_ids=True,
)

_PROFILES = {profile.name: profile for profile in (_HOSTED, _SKYRL_03, _SKYRL_04, _TUFT, _HATCHERY)}

#: The names of all profiles.
NAMES: Tuple[str, ...] = tuple(_PROFILES)


def profile_named(name: str) -> Profile:
    """Return the profile called *name*; LocalServerError if there is none."""
    if name not in _PROFILES:
        raise LocalServerError(
            f"there is no server profile {name!r}", hint=f"There are {', '.join(NAMES)}."
        )
    return _PROFILES[name]


def settings_of(profile: Profile, settings: ServerSettings) -> ServerSettings:
    """Return *settings* with the choices of *profile* filled in."""
    changes: Dict[str, Any] = {}
    if settings.retrieve_hold_s == ServerSettings.retrieve_hold_s:  # the caller did not set it
        changes["retrieve_hold_s"] = profile.hold_s
    if profile.routes is None:
        # The hosted service: tokens instead of keys, compressed batches, polls for many samples.
        changes["jwt"] = settings.api_key is not None
        changes["flags"] = dataclasses.replace(
            settings.flags,
            proto_compress_fwdbwd=importlib.util.find_spec("zstandard") is not None,
        )
    else:
        changes["jwt"] = False
    return dataclasses.replace(settings, **changes)

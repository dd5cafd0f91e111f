"""Sampler handles: text from which another process can make a client of the same sampler.

A handle travels through job queues, and anyone who can write to the queue can forge one.  So only
the settings that `write_handle` writes are read, and the credentials of this process are sent only
to the server that this process would use anyway.
"""

from __future__ import annotations

import base64
import logging
from typing import Any, Dict, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

import orjson

from tinkex._transport.request import same_origin
from tinkex.config import Config, own_base_url
from tinkex.errors import CredentialError, InvalidInputError, a_type

logger = logging.getLogger(__name__)

#: The settings in a handle: none that may contain a secret or a path.
_SETTINGS = (
    "base_url",
    "wire",
    "heartbeat_interval_s",
    "heartbeat_warn_after_s",
    "max_outage_s",
    "max_concurrent_samples",
    "max_unanswered_samples",
)


class SamplerHandle(NamedTuple):
    """What another process must know about a sampler."""

    session_id: str
    sampling_session_id: str
    base_model: Optional[str]
    model_path: Optional[str]
    record_stability_info: bool


def write_handle(facts: SamplerHandle, config: Config, *, include_api_key: bool) -> str:
    """Return the handle as text."""
    settings = {name: getattr(config, name) for name in _SETTINGS}
    if include_api_key:
        settings["api_key"] = config.api_key
    state = {**facts._asdict(), "settings": settings}
    return base64.urlsafe_b64encode(orjson.dumps(state)).decode("ascii")


def read_handle(handle: str) -> Tuple[SamplerHandle, Dict[str, Any]]:
    """Return the sampler and the settings in a handle; settings outside _SETTINGS are ignored.

    Raises:
        InvalidInputError: *handle* is not a sampler handle.
    """
    try:
        state = orjson.loads(base64.urlsafe_b64decode(handle))
        facts = SamplerHandle(
            _text(state["session_id"]),
            _text(state["sampling_session_id"]),
            _optional_text(state.get("base_model")),
            _optional_text(state.get("model_path")),
            bool(state.get("record_stability_info")),
        )
        found = dict(state["settings"])
        settings = {name: found[name] for name in _SETTINGS if name in found}
        settings["base_url"] = _text(settings["base_url"])
        # Not one of _SETTINGS: a handle contains the key only if its writer asked for that.
        settings["api_key"] = _optional_text(found.get("api_key"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInputError(f"this is not a sampler handle: {error}") from error
    return facts, settings


def config_of_handle(settings: Dict[str, Any], *, trusted: bool = False) -> Config:
    """Resolve the settings of a handle into those of a client in this process.

    This process's credentials are used only if the handle names this process's own server
    (``TINKER_BASE_URL``, or else the hosted service), or if it is *trusted*.

    Raises:
        ConfigError: a setting is out of its range.
    """
    # A trusted handle is from a pickle; withholding the key would protect nothing, since loading a
    # pickle can run any code.
    if trusted:
        return Config.resolve(**settings)
    own = own_base_url()
    if not _same_server(settings["base_url"], own):
        return Config.resolve(own_credentials=False, **settings)
    # Use this process's own URL: another URL parser might find a different host in the handle's
    # URL, and the key would be sent there.
    return Config.resolve(**{**settings, "base_url": own})


def warn_of_withheld_key(config: Config) -> None:
    """Log a warning if this process has a key that is not sent to a handle's server."""
    if config.api_key is not None or _same_server(config.base_url, own_base_url()):
        return
    from tinkex.auth import tinker_has_credentials  # imports dataclasses-json

    try:
        withheld = tinker_has_credentials()
    except CredentialError:
        return  # there is no key to withhold
    if withheld:
        logger.warning(
            "the sampler handle names %s, which is not the server of this process: the API key of "
            "this process is not sent there; pass api_key=, or set TINKER_BASE_URL",
            config.base_url,
        )


def _same_server(one: str, other: str) -> bool:
    try:
        same_path = urlsplit(one).path.rstrip("/") == urlsplit(other).path.rstrip("/")
        return same_path and same_origin(one, other)
    except ValueError:  # not a URL; Config will report it
        return False


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"it has {a_type(value)} instead of a text")
    return value


def _optional_text(value: Any) -> Optional[str]:
    return None if value is None else _text(value)

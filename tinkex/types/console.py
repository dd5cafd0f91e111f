"""Addresses of the hosted service's web console."""

from __future__ import annotations

from urllib.parse import quote

from tinkex.types.checkpoint_path import SCHEME, check_tinker_path

CONSOLE = "https://tinker.thinkingmachines.ai"


def session_url(session_id: str) -> str:
    """The page of a session."""
    return f"{CONSOLE}/sessions/{quote(session_id, safe=':')}"


def training_run_url(model_id: str) -> str:
    """The page of a training run."""
    return f"{CONSOLE}/training_runs/{quote(model_id, safe=':')}"


def checkpoint_url(tinker_path: str) -> str:
    """The page of a checkpoint.  Other servers' paths, which may have any form, make one too."""
    run, _, checkpoint = check_tinker_path(tinker_path)[len(SCHEME) :].partition("/")
    return f"{CONSOLE}/checkpoints/{quote(run, safe='')}/{quote(checkpoint, safe='')}"


def playground_url(tinker_path: str) -> str:
    """The page that samples a checkpoint."""
    path = quote(check_tinker_path(tinker_path), safe="")
    return f"{CONSOLE}/playground?mode=checkpoint&checkpoint={path}"

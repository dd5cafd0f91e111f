"""Pushes a checkpoint to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from pathlib import Path
from threading import Event
from typing import Any, Dict, Optional, Sequence

from tinkex._api import rest as api
from tinkex._downloads.checkpoints import Progress, fetch_checkpoint
from tinkex._transport.transport import Transport
from tinkex.errors import ConfigError, InvalidInputError, TinkexError
from tinkex.types.checkpoint_path import locate_checkpoint

logger = logging.getLogger(__name__)

# The hub refuses longer names.
_LONGEST_NAME = 96


def push_to_hub(
    transport: Transport,
    tinker_path: str,
    repo_id: str,
    *,
    private: bool = True,
    revision: Optional[str] = None,
    commit_message: Optional[str] = None,
    create_pr: bool = False,
    allow_patterns: Optional[Sequence[str]] = None,
    ignore_patterns: Optional[Sequence[str]] = None,
    add_model_card: bool = True,
    progress: Optional[Progress] = None,
    cancel: Optional[Event] = None,
    hub: Any = None,
) -> str:
    """See `RestClient.push_to_hub`."""
    tinker_path = locate_checkpoint(tinker_path).tinker_path
    if not isinstance(repo_id, str) or not repo_id.strip("/"):
        raise InvalidInputError(f"repo_id is {repo_id!r}; it must be like 'me/my-model'")
    # Before the download, which would be useless without huggingface_hub.
    hub = hub or _hub()
    with tempfile.TemporaryDirectory(prefix="tinkex-") as folder:
        files = fetch_checkpoint(
            transport, tinker_path, Path(folder) / "checkpoint", progress=progress, cancel=cancel
        )
        if add_model_card and not (files / "README.md").exists():
            card = _model_card(transport, tinker_path, repo_id, files)
            (files / "README.md").write_text(card, encoding="utf-8")
        # Only now, so that a failed download leaves no empty repository behind.
        hub.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            # The upload expects the branch to exist.
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=str(files),
            revision=revision,
            commit_message=commit_message or f"Upload {tinker_path}",
            create_pr=create_pr,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            ignore_patterns=None if ignore_patterns is None else list(ignore_patterns),
        )
    return str(getattr(commit, "pr_url", None) or getattr(commit, "commit_url", commit))


def derived_repo_id(tinker_path: str) -> str:
    """Return a repository name for a checkpoint, under the user who is logged in to the hub.

    It is derived from the ids of the run and the checkpoint.  Blocks.

    Raises:
        ConfigError: huggingface_hub is not installed.
        Also everything that huggingface_hub raises, for example if the user is not logged in.
    """
    parsed = locate_checkpoint(tinker_path)
    name = f"tinker-{parsed.training_run_id}-{parsed.checkpoint_id}"
    # Ids contain colons and slashes, which the hub does not allow in names.
    name = re.sub("[^A-Za-z0-9_]+", "-", name)[:_LONGEST_NAME]
    return f"{_hub().whoami()['name']}/{name.strip('-')}"


def _hub() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            "pushing to the hub needs huggingface_hub", hint='Run pip install "tinkex[hub]".'
        ) from error
    return HfApi()


def _model_card(transport: Transport, tinker_path: str, repo_id: str, files: Path) -> str:
    """Return a README.md for the hub: its front matter, and the origin of the weights."""
    config: Dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((files / "adapter_config.json").read_text(encoding="utf-8"))
    base_model = config.get("base_model_name_or_path")
    rank = config.get("r")
    try:
        # Optional: not every server has the route (docs/protocol.md, "Endpoints").
        info = api.get_weights_info(transport, tinker_path)
        base_model, rank = info.base_model, info.lora_rank or rank
    except TinkexError as error:
        logger.info("the model card describes only what the files show: %s", error)
    lines = ["---"]
    if base_model:
        # As a JSON string, which is also valid YAML; bare text with a colon might not be.
        lines.append(f"base_model: {json.dumps(base_model)}")
    if config:
        lines.append("library_name: peft")
    lines += ["tags:", "- tinker", *(["- lora"] if rank else []), "---", ""]
    lines += [f"# {repo_id.rpartition('/')[2]}", ""]
    what = f"LoRA adapter of rank {rank}" if rank else "Weights"
    over = f" over `{base_model}`" if base_model else ""
    lines += [f"{what}{over}, trained through the Tinker API.", "", f"Checkpoint: `{tinker_path}`"]
    return "\n".join(lines) + "\n"

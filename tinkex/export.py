"""Exports the weights of a run to a folder that transformers and PEFT can load.

`export_model` takes a run folder, a ``tinker://`` path or a downloaded adapter, and writes the
adapter, or the model with the adapter merged into it.  The command is ``tinkex export``.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple, Union

from tinkex._downloads.checkpoint_files import CONFIG_FILE
from tinkex._downloads.checkpoints import Progress, fetch_checkpoint
from tinkex._downloads.download_folder import check_free
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.clients.rest import RestClient
from tinkex.errors import InvalidInputError, NotFoundError, TinkexError
from tinkex.recipes.serving import open_service
from tinkex.runs.journal import JOURNAL_NAME
from tinkex.types.checkpoint_path import SCHEME


def export_model(
    source: Union[str, Path],
    dest: Union[str, Path],
    *,
    merge: bool = False,
    base_model: Optional[str] = None,
    rest: Optional[RestClient] = None,
    progress: Optional[Progress] = None,
) -> Path:
    """Write trained weights to the folder *dest*, for transformers and PEFT to load.  Blocks.

    Without *merge*, *dest* gets the adapter, which ``AutoPeftModelForCausalLM.from_pretrained``
    loads as it is.  With *merge*, it gets the whole model, for ``AutoModelForCausalLM`` and for
    programs that cannot use adapters.  The tokenizer is included in either case.  Merging is exact
    even for models whose output layer is tied to their embedding.  *dest* is written atomically: it
    is complete or absent.

    Needs ``pip install "tinkex[local]"``, and the base model (for an adapter, only its
    configuration and its tokenizer).

    Args:
        source: a run folder, whose newest checkpoint is taken from the run's server (an embedded
            server is started for it); the ``tinker://`` path of a checkpoint; or the folder of an
            adapter, as `RestClient.download_checkpoint` makes it.
        dest: the folder to write to, created with its parents; if it exists, it must be empty.
            ``~`` is the home folder.
        base_model: a folder, a Hugging Face name, or a model of the embedded server; by default the
            one that the checkpoint names.
        rest: a client of the server that holds the ``tinker://`` path; by default one made from the
            environment.
        progress: called with the number of bytes downloaded and the total (None if unknown).

    Returns:
        The absolute path of *dest*.

    Raises:
        InvalidInputError: *source* is none of these, is damaged, or does not fit the base model; or
            *dest* is taken.
        RunFolderError: the run has no checkpoint.
        NotFoundError: the server no longer has the checkpoint.
        APIError: the server cannot be reached, or has failed.
        LocalServerError: the base model cannot be obtained, or a package is missing.
        TinkexError: *dest* cannot be written, e.g. because the disk is full.
    """
    target = Path(os.path.abspath(os.path.expanduser(os.fspath(dest))))
    try:
        check_free(target, overwrite=False)
    except InvalidInputError as error:
        error.hint = "Choose another folder."
        raise
    with _writing(target) as work:
        adapter, trained_on = _fetch(os.fspath(source), work / "adapter", rest, progress)
        name = base_model or _named_base(adapter) or trained_on
        if not name:
            raise InvalidInputError(
                f"{source} does not name its base model",
                hint=ErrorText("Give ", Setting("base_model", ...)),
            )
        _write(adapter, work / "model", name, merge)
        if target.is_dir():
            target.rmdir()  # it is empty
        os.rename(work / "model", target)
    return target


def _write(adapter: Path, dest: Path, base_model: str, merge: bool) -> None:
    from tinkex.local.engines import models

    models.check_packages("torch", "transformers", "peft", "safetensors")
    from safetensors import SafetensorError

    from tinkex.local.engines.torch_engine import portable

    base = models.resolve(base_model).source
    try:
        if merge:
            portable.merge_adapter(adapter, dest, base_model=base)
        else:
            portable.copy_adapter(adapter, dest, base)
    except SafetensorError as error:  # also raised if the disk is full
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside *target*; raise OSErrors of the block as TinkexError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            yield Path(work)
    except OSError as error:
        raise TinkexError(
            f"cannot write {target}: {error.strerror or error}",
            hint="Nothing was left behind.  Free some space, or choose another folder.",
        ) from error


def _fetch(
    source: str, dest: Path, rest: Optional[RestClient], progress: Optional[Progress]
) -> Tuple[Path, Optional[str]]:
    """Return the adapter's folder (*dest* if it was downloaded), and its base model if known."""
    if source.startswith(SCHEME):
        if rest is not None:
            return _download(rest, source, dest, progress), None
        with RestClient() as client:
            return _download(client, source, dest, progress), None
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder, None
    if not (folder / JOURNAL_NAME).is_file():
        what = "holds neither" if folder.is_dir() else "is neither a tinker:// path nor a folder of"
        absent = "" if folder.exists() else "; there is no such file or folder"
        raise InvalidInputError(
            f"{source} {what} a run ({JOURNAL_NAME}) nor an adapter ({CONFIG_FILE}){absent}",
            hint="Give the folder of `tinkex train --out`, once a step is saved in it.",
        )
    service, record = open_service(folder)
    with service:
        path = record.newest_weights().path
        client = service.create_rest_client()
        return _download(client, path, dest, progress), record.spec["base_model"]


def _download(rest: RestClient, path: str, dest: Path, progress: Optional[Progress]) -> Path:
    try:
        return fetch_checkpoint(rest.transport, path, dest, progress=progress)
    except NotFoundError as error:
        error.hint = (
            "It was deleted, or has expired; `tinkex checkpoint list` shows the remaining ones."
        )
        raise


def _named_base(adapter: Path) -> Optional[str]:
    try:
        config: Any = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"] or "") or None
    except (OSError, ValueError, KeyError, TypeError):  # its reader says what is wrong
        return None

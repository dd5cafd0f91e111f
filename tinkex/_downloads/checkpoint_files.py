"""The files of a checkpoint: the names that belong to one, and the check that it is complete.

Servers put different files into a checkpoint, so little is required: a file that is not empty, the
weights of an adapter beside its configuration, and no truncated weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import List, Optional

from tinkex.errors import ResponseDecodeError

CONFIG_FILE = "adapter_config.json"

#: The weights of an adapter, in one file or several, as PEFT names them.
_WEIGHTS = re.compile(r"adapter_model.*\.(safetensors|bin)")

_SAFETENSORS = ".safetensors"

#: The specification's limit for a header of safetensors.
_MAX_HEADER_BYTES = 100_000_000


def is_adapter_file(name: str) -> bool:
    """Whether *name*, without a folder, is a file of PEFT's adapter format."""
    return name == CONFIG_FILE or _WEIGHTS.fullmatch(name) is not None


def files_in(folder: Path) -> List[Path]:
    """Return the files in *folder*, at any depth, as sorted paths relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_complete(folder: Path, what: str) -> None:
    """Check that *folder* holds a complete checkpoint; *what* names it.

    Raises:
        ResponseDecodeError: the folder is empty, lacks weights, or holds damaged weights.
    """
    sizes = {file: (folder / file).stat().st_size for file in files_in(folder)}
    if not any(sizes.values()):
        raise _damaged(f"{what} has no data")
    for config in (file for file in sizes if file.name == CONFIG_FILE):
        beside = [file for file in sizes if file.parent == config.parent and sizes[file]]
        if not any(_WEIGHTS.fullmatch(file.name) for file in beside):
            raise _damaged(f"{what} has {config} but not the weights of the adapter")
    for file in sizes:
        if file.suffix == _SAFETENSORS:
            _check_safetensors(folder / file, f"{file} of {what}")


def _check_safetensors(path: Path, what: str) -> None:
    """Check that the file is as long as its header announces."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        # The format: the header's length in eight bytes, the header, which is a JSON object, and
        # the tensors.
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if length == 0:
            raise _damaged(f"{what} is empty or begins with zeros")
        # Not a header of safetensors, for example in an encrypted file.
        if length > _MAX_HEADER_BYTES or start[8:] != b"{":
            return
        file.seek(8)
        header = file.read(length)
    announced = _announced_bytes(header)
    if announced is None or size != 8 + length + announced:
        total = "unknown" if announced is None else 8 + length + announced
        raise _damaged(f"{what} is damaged: it has {size} bytes, and should have {total}")


def _announced_bytes(header: bytes) -> Optional[int]:
    """Return how many bytes of tensors follow *header*; None if it cannot be read."""
    try:
        entries = json.loads(header)
        ends = [
            entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"
        ]
        return max(ends, default=0)
    # A header may be any JSON, or none, so any of these errors can occur.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _damaged(message: str) -> ResponseDecodeError:
    return ResponseDecodeError(
        message, hint="Nothing was kept. Download it again, or ask the operator of the server."
    )

"""Encrypting the files of exported weights with age (https://age-encryption.org).

pyrage is optional; if it is installed, the server imports it at start.  No threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Sequence

from tinkex.local.errors import HTTPError

#: Appended to the name of an encrypted file, as the hosted service does.
SUFFIX = ".age"

_MAX_RECIPIENTS = 10


def read_recipients(keys: Sequence[object]) -> List[Any]:
    """Return pyrage's recipients for public keys of age (``age1...``).

    HTTPError 400 if there are no keys or too many, if one is not a key of age, or if pyrage is not
    installed.
    """
    if not 1 <= len(keys) <= _MAX_RECIPIENTS:
        raise HTTPError(
            400,
            f"age_encryption_recipients has {len(keys)} keys; give 1 to {_MAX_RECIPIENTS}, or "
            "leave it out to save without encryption",
        )
    try:
        import pyrage
    except ImportError as error:
        raise HTTPError(
            400,
            "age_encryption_recipients needs pyrage, which is not installed where this server "
            'runs: python -m pip install "tinkex[age]"',
        ) from error
    recipients = []
    for index, key in enumerate(keys):
        try:
            recipients.append(pyrage.x25519.Recipient.from_str(key))
        except (TypeError, pyrage.RecipientError) as error:
            raise HTTPError(
                400,
                f"age_encryption_recipients[{index}] is not a public key of age (age1...): {error}",
            ) from error
    return recipients


def encrypt_files(folder: Path, recipients: Sequence[Any]) -> None:
    """Replace each file in *folder* by one that is encrypted for *recipients*, named ``*.age``."""
    import pyrage

    # Listed before the loop, which adds encrypted files to the folder.
    for file in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        pyrage.encrypt_file(str(file), f"{file}{SUFFIX}", recipients)
        file.unlink()


def is_encrypted(folder: Path) -> bool:
    """Return whether the files of a checkpoint are encrypted."""
    return any(folder.glob(f"*{SUFFIX}"))

"""Credentials: where a key comes from, and the claims of a token (docs/authentication.md).

The order is: the argument, ``$TINKER_API_KEY``, ``$TINKER_CREDENTIAL_CMD``, and the default key
that `tinkex auth login` stored.  The file may be shared with the official client.  No threads.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import orjson

from tinkex.errors import CredentialError

KEY_VARIABLE = "TINKER_API_KEY"
COMMAND_VARIABLE = "TINKER_CREDENTIAL_CMD"

_FILE = Path(".tinker") / "credentials.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class StoredKey:
    """One key in the file.

    Attributes:
        key: the secret itself.
        type: ``"manual"`` (typed in) or ``"generated"`` (made by the server for this machine).
        details: whose key it is, as ``auth/apikey/me`` reports.
    """

    key: str = dataclasses.field(repr=False)
    name: str = ""
    type: str = "manual"
    note: Optional[str] = None
    details: Optional[Mapping[str, Any]] = None

    def to_json(self) -> Dict[str, Any]:
        """Return the entry for the file."""
        entry = {name: value for name, value in vars(self).items() if value is not None}
        return {"type": entry.pop("type"), **entry}


class CredentialsFile:
    """``~/.tinker/credentials.json``, readable only by its owner.  Every call rereads it.

    Args:
        path: the file's path; by default in the home folder.
    """

    def __init__(self, path: Optional[Path] = None) -> None:
        self.path = default_path() if path is None else path

    def default(self) -> Optional[StoredKey]:
        """Return the default key, or None.  Raises CredentialError if the file is broken."""
        content = self._read()
        default, keys = content.get("default"), content["keys"]
        if default is None:
            return None
        entry = keys.get(default)
        if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
            raise self._broken("its default key has no entry")
        name, note, details = (entry.get(field) for field in ("name", "note", "details"))
        return StoredKey(
            entry["key"].strip(),
            name if isinstance(name, str) else "",
            "generated" if entry.get("type") == "generated" else "manual",
            note if isinstance(note, str) else None,
            details if isinstance(details, dict) else None,
        )

    def store_default(self, key_id: str, key: StoredKey) -> None:
        """Store *key* as the default, and keep the others; CredentialError if that fails."""
        content = self._read()
        content["keys"][key_id] = key.to_json()
        content["default"] = key_id
        self._write(content)

    def forget_default(self) -> None:
        """Remove the default key; a no-op if there is none."""
        content = self._read()
        default = content.pop("default", None)
        if default is not None:
            content["keys"].pop(default, None)
            self._write(content)

    def _read(self) -> Dict[str, Any]:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return {"version": _VERSION, "keys": {}}
        except OSError as error:
            raise CredentialError(
                f"the credentials file {self.path} cannot be read: {error.strerror or error}"
            ) from error
        content = _parse(raw)
        if not isinstance(content, dict) or not isinstance(content.get("keys", {}), dict):
            raise self._broken("it is not a JSON object with keys")
        if content.get("version", _VERSION) != _VERSION:
            raise self._broken(f"its version is not {_VERSION}")
        if not isinstance(content.get("default"), (str, type(None))):
            raise self._broken("its default is not the name of a key")
        content.setdefault("version", _VERSION)
        content.setdefault("keys", {})
        return content

    def _broken(self, why: str) -> CredentialError:
        return CredentialError(
            f"the credentials file {self.path} is not valid: {why}",
            hint=f"Remove it and run `tinkex auth login` again, or set {KEY_VARIABLE}.",
        )

    def _write(self, content: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.parent.chmod(0o700)
            # In the same folder, so that os.replace is atomic; mkstemp makes it with mode 0600.
            handle, name = tempfile.mkstemp(prefix=".credentials-", dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=2)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, self.path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                raise
        except OSError as error:
            raise CredentialError(
                f"the credentials file {self.path} cannot be written: {error.strerror or error}"
            ) from error


def _parse(raw: bytes) -> Any:
    """Return the decoded content, or None: an exception would contain the keys."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


def default_path(environ: Optional[Mapping[str, str]] = None) -> Path:
    """Return the path of the file, for this process or for another environment.

    Raises:
        CredentialError: there is no home folder.
    """
    if environ is None:
        try:
            return Path.home() / _FILE
        except RuntimeError as error:
            raise CredentialError(f"there is no home folder for {_FILE}") from error
    home = environ.get("HOME") or environ.get("USERPROFILE")
    if not home:
        raise CredentialError(f"there is no home folder for {_FILE}")
    return Path(home) / _FILE


def stored_key(environ: Optional[Mapping[str, str]] = None) -> Optional[str]:
    """Return the stored default key, or None.  Raises CredentialError if the file is broken."""
    try:
        path = default_path(environ)
    except CredentialError:
        return None  # no home, no file
    found = CredentialsFile(path).default()
    return None if found is None else found.key or None


def is_jwt(text: str) -> bool:
    """True if *text* is a token rather than a key."""
    # This is ``{"`` in base64, with which every JWT begins.
    return text.startswith("eyJ")


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a JWT claims, unverified: the server verifies it; the client only plans renewals by it.

    Attributes:
        issued_at, expires_at: seconds since the epoch.
        issuer: the prefix ``passport-`` marks the hosted service's own tokens.
    """

    issued_at: Optional[float] = None
    expires_at: Optional[float] = None
    subject: Optional[str] = None
    org_id: Optional[str] = None
    email: Optional[str] = None
    issuer: Optional[str] = None


def read_claims(jwt: str) -> Optional[Claims]:
    """Read the claims of *jwt*; None if it is not one."""
    parts = jwt.split(".")
    if len(parts) != 3:
        return None
    try:
        raw = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = orjson.loads(raw)
    except ValueError:  # not base64, or not JSON
        return None
    if not isinstance(claims, dict):
        return None

    def number(name: str) -> Optional[float]:
        value = claims.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        return float(value) if abs(value) < 1e15 else None  # not NaN, infinite or absurd

    def text(name: str) -> Optional[str]:
        value = claims.get(name)
        return value if isinstance(value, str) else None

    return Claims(
        number("iat"), number("exp"), text("sub"), text("org_id"), text("email"), text("iss")
    )

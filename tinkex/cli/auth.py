"""``tinkex auth``: the API key stored on this machine, and its owner."""

from __future__ import annotations

import hashlib
import os
from typing import Optional, Tuple

import click

from tinkex import auth as access
from tinkex._transport.transport import Transport
from tinkex.cli import status_line
from tinkex.cli.commands import Group, in_flags
from tinkex.cli.connect import advice, base_url_option, explained
from tinkex.cli.output import format_option, print_facts
from tinkex.cli.terminal import ask_secret, echo, echo_error
from tinkex.config import Config
from tinkex.credentials import COMMAND_VARIABLE, KEY_VARIABLE, CredentialsFile, StoredKey
from tinkex.errors import APIError, CredentialError, NotFoundError, TinkexError


@click.group(cls=Group)
def auth() -> None:
    """Store a key, remove it, and check whether it works."""


@auth.command()
@base_url_option
def login(base_url: Optional[str]) -> None:
    """Ask for a key, or read it from a pipe; check it, and store it for this user.

    The key is stored in ~/.tinker/credentials.json, which only its owner can read.
    """
    file = CredentialsFile()
    stored = file.default()
    if stored is not None:
        named = f" ({stored.name})" if stored.name else ""
        raise click.ClickException(
            f"a key{named} is already stored; run `tinkex auth logout` first"
        )
    typed = ask_secret("API key")
    config = _config(base_url, api_key=typed)
    with explained(config):
        key_id, key = _checked(config, typed)
    file.store_default(key_id, key)
    echo(f"Logged in to {config.host_and_port}{f' as {key.name}' if key.name else ''}.")
    if os.environ.get(KEY_VARIABLE) or os.environ.get(COMMAND_VARIABLE):
        echo_error("A key in the environment takes precedence over this one.")


def _config(base_url: Optional[str], api_key: Optional[str] = None) -> Config:
    config = Config.resolve(base_url=base_url, api_key=api_key)
    status_line.waiting_for(f"waiting for {config.host_and_port}")
    return config


def _checked(config: Config, typed: str) -> Tuple[str, StoredKey]:
    """Return the id and the entry to store for a key; APIError if the server rejects it."""
    try:
        found = access.about_key(config)
    except NotFoundError:  # the server has no information about keys
        access.check_access(config)
        return hashlib.sha256(typed.encode()).hexdigest()[:8], StoredKey(typed)
    return str(found.key_id), StoredKey(typed, found.name, "manual", found.note, found.details)


@auth.command()
@base_url_option
def logout(base_url: Optional[str]) -> None:
    """Remove the stored key; a key generated for this machine is also revoked."""
    file = CredentialsFile()
    stored = file.default()
    if stored is None:
        echo("No key is stored.")
        return
    file.forget_default()
    if stored.type == "generated":
        try:
            access.revoke_key(Config.resolve(base_url=base_url, api_key=stored.key))
        except APIError as error:
            raise click.ClickException(
                f"the key was removed here, but could not be revoked: {error.message}"
            ) from error
    echo(f"Removed the key{f' {stored.name}' if stored.name else ''}.")


@auth.command()
@base_url_option
@click.pass_context
def status(ctx: click.Context, base_url: Optional[str]) -> None:
    """Show where the key comes from, and whether the server accepts it (exit code 1 if not)."""
    echo(f"Credential: {access.credential_source() or 'none'}")
    config = _config(base_url)
    try:
        access.check_access(config)
    except TinkexError as error:
        remedy = advice(error) if isinstance(error, APIError) else error.hint
        reason = "\n  ".join(in_flags(text, ctx) for text in (error.message, remedy) if text)
        echo(f"Access to {config.host_and_port}: no, {reason}")
        ctx.exit(1)
    echo(f"Access to {config.host_and_port}: yes")


@auth.command()
@base_url_option
@format_option
def whoami(base_url: Optional[str]) -> None:
    """Show the owner of the key."""
    config = _config(base_url)
    transport = Transport(config)
    try:
        with explained(config):
            try:
                found = access.whoami(transport)
            except CredentialError:
                access.check_access(config)  # raises a better error if the server is the problem
                raise
    finally:
        transport.abort()
    rows = [["User", found.user_urn], ["Organization", found.org_urn], ["Email", found.email or ""]]
    as_json = {"user_urn": found.user_urn, "org_urn": found.org_urn, "email": found.email}
    print_facts("Who am I", [row for row in rows if row[1]], as_json=as_json)

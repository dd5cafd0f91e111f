"""``tinkex auth``: the key on this machine, and who it belongs to."""

from __future__ import annotations

import hashlib
import os
from typing import Optional

import click

from tinkex import auth as access
from tinkex.cli.connect import base_url_option
from tinkex.cli.output import format_option, print_json, print_table, wants_json
from tinkex.config import Config
from tinkex.errors import APIError, NotFoundError, TinkexError
from tinkex.keys.credentials import COMMAND_VARIABLE, KEY_VARIABLE, CredentialsFile, StoredKey
from tinkex.transport import Transport


@click.group()
def auth() -> None:
    """Store a key, remove it, and see whether it works."""


@auth.command()
@base_url_option
def login(base_url: Optional[str]) -> None:
    """Ask for a key, try it, and store it for this user.

    It is kept in ~/.tinker/credentials.json, which only its owner can read.
    """
    file = CredentialsFile()
    stored = file.default()
    if stored is not None:
        raise click.ClickException(
            f"the key {stored.name!r} is stored already; `tinkex auth logout` removes it"
        )
    typed = click.prompt("API key", hide_input=True, err=True).strip()
    config = Config.resolve(base_url=base_url, api_key=typed)
    try:
        found = access.about_key(config)
    except NotFoundError:  # a server that does not tell about keys
        access.check_access(config)
        key_id, key = hashlib.sha256(typed.encode()).hexdigest()[:8], StoredKey(typed)
    else:
        key_id = str(found.key_id)
        key = StoredKey(typed, found.name, "manual", found.note, found.details)
    file.store_default(key_id, key)
    click.echo(f"Logged in to {config.host_and_port}{f' as {key.name}' if key.name else ''}.")
    if os.environ.get(KEY_VARIABLE) or os.environ.get(COMMAND_VARIABLE):
        click.echo("The environment names a credential, too, which goes before this one.", err=True)


@auth.command()
@base_url_option
def logout(base_url: Optional[str]) -> None:
    """Remove the stored key; one made for this machine is revoked, too."""
    file = CredentialsFile()
    stored = file.default()
    if stored is None:
        click.echo("No key is stored.")
        return
    file.forget_default()
    if stored.type == "generated":
        try:
            access.revoke_key(Config.resolve(base_url=base_url, api_key=stored.key))
        except APIError as error:
            raise click.ClickException(
                f"the key was removed here, but could not be revoked: {error.message}"
            ) from error
    click.echo(f"Removed the key{f' {stored.name}' if stored.name else ''}.")


@auth.command()
@base_url_option
@click.pass_context
def status(ctx: click.Context, base_url: Optional[str]) -> None:
    """Say where the key comes from, and whether the server takes it: exit code 1 if not."""
    click.echo(f"Credential: {_source() or 'none'}")
    config = Config.resolve(base_url=base_url)
    try:
        access.check_access(config)
    except TinkexError as error:
        click.echo(f"Access to {config.host_and_port}: no, {error.message}")
        ctx.exit(1)
    click.echo(f"Access to {config.host_and_port}: yes")


@auth.command()
@base_url_option
@format_option
def whoami(base_url: Optional[str]) -> None:
    """Say who the key belongs to."""
    transport = Transport(Config.resolve(base_url=base_url))
    try:
        found = access.whoami(transport)
    finally:
        transport.abort()
    if wants_json():
        print_json({"user_urn": found.user_urn, "org_urn": found.org_urn, "email": found.email})
        return
    rows = [["User", found.user_urn], ["Organization", found.org_urn], ["Email", found.email or ""]]
    print_table("Who am I", ["Property", "Value"], [row for row in rows if row[1]])


def _source() -> Optional[str]:
    """Where the credential comes from, in words; None if there is none."""
    if os.environ.get(KEY_VARIABLE, "").strip():
        return f"the environment (${KEY_VARIABLE})"
    if os.environ.get(COMMAND_VARIABLE, "").strip():
        return f"a command (${COMMAND_VARIABLE})"
    file = CredentialsFile()
    stored = file.default()
    return None if stored is None else f"{stored.name or 'a key'} ({file.path})"

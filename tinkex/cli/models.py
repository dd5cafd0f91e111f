"""``tinkex model``: the base models that the server offers."""

from __future__ import annotations

import dataclasses
from typing import Optional

import click

from tinkex.cli.commands import Group
from tinkex.cli.connect import base_url_option, open_rest
from tinkex.cli.output import count, format_option, print_table
from tinkex.errors import NotFoundError


@click.group(cls=Group)
def model() -> None:
    """List the models that the server offers."""


@model.command("list")
@click.argument("substring", default="")
@base_url_option
@format_option
def list_models(substring: str, base_url: Optional[str]) -> None:
    """List the models whose names contain SUBSTRING, ignoring case."""
    with open_rest(base_url) as rest:
        offered = rest.get_server_capabilities().result().supported_models
    found = [item for item in offered if substring.lower() in (item.model_name or "").lower()]
    if substring and not found:
        names = ", ".join(sorted(item.model_name or "?" for item in offered))
        raise NotFoundError(
            f"the server offers no model whose name contains {substring!r}",
            hint=f"It offers {names}." if names else None,
        )
    print_table(
        count(len(found), "model"),
        ["Model", "Max Context", "Trainable", "Sampleable"],
        [
            [
                item.model_name or "-",
                "-" if item.max_context_length is None else str(item.max_context_length),
                _yes_or_no(item.trainable),
                _yes_or_no(item.sampleable),
            ]
            for item in found
        ],
        as_json={"models": [dataclasses.asdict(item) for item in found]},
    )


def _yes_or_no(value: Optional[bool]) -> str:
    return "-" if value is None else "yes" if value else "no"

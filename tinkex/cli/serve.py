"""``tinkex serve``: the embedded server in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Optional, Tuple

import click

from tinkex.errors import LocalServerError

#: Away from 8000 and 8080, where other servers of a developer's machine tend to live.
DEFAULT_PORT = 8642


def default_data_dir() -> Path:
    """Where runs and checkpoints are kept: ``$XDG_DATA_HOME/tinkex``, or its usual default."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "tinkex" / "server"


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, metavar="NAME_OR_PATH",
              help="smollm2-135m, tiny-random, a Hugging Face name, or a folder; "
              "'deterministic' needs no ML library.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Interface to bind; anything but loopback needs --api-key.")  # fmt: skip
@click.option("--port", default=DEFAULT_PORT, show_default=True, type=click.IntRange(0, 65535),
              help="Port to bind; 0 takes a free one.")  # fmt: skip
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="Keeps runs and checkpoints; by default tinkex/server in the user's data "
              "folder.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="Where the model runs.")  # fmt: skip
@click.option("--api-key", envvar="TINKEX_SERVER_API_KEY", default=None,
              help="Key that clients must send; $TINKEX_SERVER_API_KEY keeps it out of the "
              "process list.")  # fmt: skip
@click.option("--allow-host", "allowed_hosts", multiple=True, metavar="NAME",
              help="Also answer requests for this host, such as the name of a reverse proxy; may "
              "be repeated.  A server without a key answers to localhost only, so that no web "
              "page can use it.")  # fmt: skip
@click.option("--session-ttl", "session_ttl_s", default=60.0, show_default=True, metavar="SECONDS",
              type=click.FloatRange(min=1), help="A session without a heartbeat for this long "
              "expires.")  # fmt: skip
@click.option("--profile", default=None, metavar="NAME",
              help="Differ from the protocol like a real server: hosted, skyrl-0.3, skyrl-0.4, "
              "tuft-0.2 or hatchery-0.3.  By default every form is taken.")  # fmt: skip
def serve(
    model: str,
    host: str,
    port: int,
    data_dir: Optional[Path],
    device: str,
    api_key: Optional[str],
    allowed_hosts: Tuple[str, ...],
    session_ttl_s: float,
    profile: Optional[str],
) -> None:
    """Serve the Tinker API on this machine, with one base model.

    The last line it prints before it is ready holds the URL.  Ctrl-C ends it.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _serve(
            model,
            host,
            port,
            data_dir or default_data_dir(),
            device,
            api_key,
            allowed_hosts,
            session_ttl_s,
            profile,
        )
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(130)
    except LocalServerError as error:
        raise click.ClickException(str(error)) from error


def _serve(
    model: str,
    host: str,
    port: int,
    data_dir: Path,
    device: str,
    api_key: Optional[str],
    allowed_hosts: Tuple[str, ...],
    session_ttl_s: float,
    profile: Optional[str],
) -> None:
    from tinkex.local.admission import read_hosts
    from tinkex.local.profiles import profile_named
    from tinkex.local.server import LocalServer, check_bind, load_engine
    from tinkex.local.settings import ServerSettings

    read_hosts(allowed_hosts)
    check_bind(host, port, api_key)  # before the model is loaded, which takes long
    if profile is not None:
        profile_named(profile)
    server = LocalServer(
        load_engine(model, device, progress=_say),
        host=host,
        port=port,
        data_dir=data_dir,
        api_key=api_key,
        session_ttl_s=session_ttl_s,
        settings=ServerSettings(allowed_hosts=allowed_hosts),
        profile=profile,
    )
    with server:
        click.echo(
            f"tinkex is ready: {model} at {server.url}   "
            f"(export TINKER_BASE_URL={server.url}; Ctrl-C ends it)"
        )
        sys.stdout.flush()
        threading.Event().wait()


def _say(line: str) -> None:
    click.echo(line, err=True)


def _terminate(number: int, frame: Optional[FrameType]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end has begun; once is enough
    sys.exit(0)

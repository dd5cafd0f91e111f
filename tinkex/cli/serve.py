"""``tinkex serve``: run the embedded server in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Optional, Tuple

import click

from tinkex.cli import status_line, terminal
from tinkex.cli.commands import Command
from tinkex.cli.signals import Ended, EndSignals
from tinkex.cli.terminal import echo, echo_error
from tinkex.errors import LocalServerError

#: Not 8000 or 8080, which other servers on a developer's machine often use.
DEFAULT_PORT = 8642


def default_data_dir() -> Path:
    """Return the default folder for runs and checkpoints, in ``$XDG_DATA_HOME`` or its default."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "tinkex" / "server"


@click.command(cls=Command)
@click.option("--model", default="smollm2-135m", show_default=True, metavar="NAME_OR_PATH",
              help="smollm2-135m, tiny-random, a Hugging Face name, or a folder; "
              "'deterministic' needs no ML library.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Interface to bind; any but loopback requires --api-key.")  # fmt: skip
@click.option("--port", default=DEFAULT_PORT, show_default=True, type=click.IntRange(0, 65535),
              help="Port to bind; 0 picks a free one.")  # fmt: skip
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="Folder for runs and checkpoints; by default tinkex/server in the user's data "
              "folder.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="Where the model runs.")  # fmt: skip
@click.option("--api-key", envvar="TINKEX_SERVER_API_KEY", default=None,
              help="Key that clients must send; $TINKEX_SERVER_API_KEY keeps it out of the "
              "process list.")  # fmt: skip
@click.option("--allow-host", "allowed_hosts", multiple=True, metavar="NAME",
              help="Also accept requests for this host, such as the name of a reverse proxy; may "
              "be repeated.  A server without a key accepts only localhost, so that no web page "
              "can use it.")  # fmt: skip
@click.option("--session-ttl", "session_ttl_s", default=60.0, show_default=True, metavar="SECONDS",
              type=click.FloatRange(min=1), help="A session without a heartbeat for this long "
              "expires.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Do not write an access log.")
@click.pass_context
def serve(
    ctx: click.Context,
    model: str,
    host: str,
    port: int,
    data_dir: Optional[Path],
    device: str,
    api_key: Optional[str],
    allowed_hosts: Tuple[str, ...],
    session_ttl_s: float,
    quiet: bool,
) -> None:
    """Serve the Tinker API on this machine, with one base model.

    The URL is printed once the server is ready.  Ctrl-C stops the server.  Each request is logged
    on stderr: time, method, path, status and duration.
    """
    from tinkex.local.http.admission import read_hosts
    from tinkex.local.server import LocalServer, check_bind, check_folder, load_engine
    from tinkex.local.settings import ServerSettings

    signals = EndSignals()
    try:
        with signals.installed():
            read_hosts(allowed_hosts)
            # Check before loading the model, which takes a while.
            check_bind(host, port, api_key)
            folder = data_dir or default_data_dir()
            check_folder(folder)
            status_line.waiting_for(f"loading {model}")
            engine = load_engine(model, device, progress=echo_error)
            server = LocalServer(
                engine,
                host=host,
                port=port,
                data_dir=folder,
                api_key=api_key,
                session_ttl_s=session_ttl_s,
                settings=ServerSettings(allowed_hosts=allowed_hosts),
                access_log=None if quiet else _log_request,
            )
            # From here on, signals must not raise: one could interrupt the server while it closes.
            signals.hold()
            with server, status_line.hidden():
                echo(
                    f"tinkex is ready: {model} at {server.url}   "
                    f"(open it in a browser to watch it; export TINKER_BASE_URL={server.url}; "
                    "Ctrl-C stops it)"
                )
                code = signals.wait()
    except Ended as ended:
        code = ended.code
    except LocalServerError:
        if signals.code is None:
            raise
        code = signals.code  # some libraries convert the interrupt to an error of their own
    echo_error("stopped")
    ctx.exit(code)


def _log_request(line: str) -> None:
    """Write a line to the access log; called by the threads that handle requests."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # stderr is full or closed
        terminal.discard(sys.stderr)

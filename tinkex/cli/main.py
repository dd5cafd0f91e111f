"""The command group, and the exit codes.

Exit codes: 0 success, 1 an error (``Error: <message>`` and advice on stderr), 2 wrong usage, 130
Ctrl-C.  Output that cannot be written, and a question without a reply, are errors.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Any, Dict, List, NoReturn, Optional, Sequence

import click

from tinkex._version import __version__
from tinkex.cli import terminal
from tinkex.cli.commands import Command, Group, verbose_option
from tinkex.cli.output import format_option
from tinkex.cli.signals import (
    INTERRUPTED,
    exit_at_interrupt,
    is_interrupt,
    raise_lost_interrupts,
)

#: Command -> its location and its summary; a command is imported only when it is run.
COMMANDS: Dict[str, Sequence[str]] = {
    "auth": ("tinkex.cli.auth:auth", "Store a key, and check whether it works."),
    "billing": ("tinkex.cli.billing:billing", "Show usage, and the cost of stored checkpoints."),
    "chat": ("tinkex.cli.chat:chat", "Talk to a model."),
    "checkpoint": ("tinkex.cli.checkpoints:checkpoint", "List, change and download checkpoints."),
    "data": ("tinkex.cli.data:data", "See what a model would learn from a file."),
    "doctor": ("tinkex.cli.doctor:doctor", "Check the settings, the network and the server."),
    "export": ("tinkex.cli.export:export", "Write a trained model for transformers and PEFT."),
    "model": ("tinkex.cli.models:model", "List the models that the server offers."),
    "run": ("tinkex.cli.runs:run", "List and show training runs."),
    "sample": ("tinkex.cli.sample:sample", "Prompt in, text out."),
    "session": ("tinkex.cli.sessions:session", "List and show sessions."),
    "serve": ("tinkex.cli.serve:serve", "Serve a model on this machine."),
    "status": ("tinkex.cli.status:status", "Show what is in flight on this machine."),
    "train": ("tinkex.cli.train:train", "Fine-tune a model on a file of examples."),
    "version": ("tinkex.cli.main:version", "Print the version."),
}


class LazyGroup(Group):
    """A group that imports each command only when it is run."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the command line; print the help if it was requested."""
        with terminal.write_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with terminal.write_errors():
            result = super().invoke(ctx)
            # Flush here, so that a full disk or a closed pipe is an error of the command: at exit,
            # Python would report it with a traceback and exit code 120.
            terminal.flush_output()
        return result

    def list_commands(self, ctx: click.Context) -> List[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        """Import and return a command; None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tinkex", message="%(prog)s %(version)s")
@format_option
def cli() -> None:
    """Fine-tune and sample language models over the Tinker API.

    Commands that talk to a server find it by --base-url or TINKER_BASE_URL, and send
    TINKER_API_KEY.
    """


cli.params.append(verbose_option())


@click.command(cls=Command)
def version() -> None:
    """Print the version."""
    terminal.echo(f"tinkex {__version__}")


def run_command(args: Optional[Sequence[str]] = None) -> int:
    """Run the command line *args* (default: the process's arguments); return the exit code."""
    try:
        # In standalone mode, click would print errors itself and end the process.
        result: Any = cli.main(args, prog_name="tinkex", standalone_mode=False)
    except click.UsageError as error:
        _show_usage(error)
        return error.exit_code
    except click.ClickException as error:
        # transformers turns Ctrl-C during one of its late imports into an ImportError.
        if is_interrupt(error):
            terminal.echo_error("Interrupted.")
            return INTERRUPTED
        terminal.echo_error(f"Error: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # click converts KeyboardInterrupt to Abort
        terminal.echo_error("Interrupted.")
        return INTERRUPTED
    # Options such as --help return an exit code; commands return None.
    return result if isinstance(result, int) else 0


def _show_usage(error: click.UsageError) -> None:
    if sys.stderr is None:  # click would write to stdout
        return
    try:
        error.show()
    except OSError:
        terminal.discard(sys.stderr)


def main() -> NoReturn:
    """Entry point of the command ``tinkex``."""
    terminal.escape_unencodable()
    raise_lost_interrupts()
    try:
        code = run_command()
        exit_at_interrupt()
    except KeyboardInterrupt:  # a second Ctrl-C while the first one is reported
        code = INTERRUPTED
    # Exclude all existing objects from the interpreter's final collections: with torch and
    # transformers imported, the process would live on for seconds after its last line of output.
    gc.freeze()
    sys.exit(code)

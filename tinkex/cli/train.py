"""``tinkex train``: from a file of examples to a fine-tuned model, in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tinkex.cli.commands import Command
from tinkex.cli.output import format_option
from tinkex.cli.training_job import run_job
from tinkex.cli.training_settings import METHODS, SCHEDULES, Job
from tinkex.loggers import NAMES


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="NAME", help="Base model, by its name at the "
              "server; for the embedded one also a folder.")  # fmt: skip
@click.option("--out", required=True, metavar="FOLDER", type=click.Path(path_type=Path),
              help="Run folder: made if it is missing, continued if it holds a run.")  # fmt: skip
@click.option("--method", type=click.Choice(METHODS), help="Default: dpo for a file of "
              "preferences, otherwise supervised.")  # fmt: skip
@click.option("--learn", type=click.Choice(["all", "last"]), default="all", show_default=True,
              help="Which messages of the assistant are learnt.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True,
              help="Rank of the LoRA adapter.")  # fmt: skip
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True),
              help="After warm-up (default: 2e-4, or 5e-4 without --base-url; for dpo 1e-5).",
              )  # fmt: skip
@click.option("--schedule", type=click.Choice(SCHEDULES), default="linear", show_default=True,
              help="How the learning rate decreases.")  # fmt: skip
@click.option("--warmup", type=click.IntRange(min=0), default=0, show_default=True,
              help="Steps in which the learning rate rises.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True,
              help="Examples per step.")  # fmt: skip
@click.option("--accumulation", type=click.IntRange(min=1), default=1, show_default=True,
              help="Passes per step, into which each batch is split.")  # fmt: skip
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True),
              help="How often each example is used (default: 1).")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Number of steps, instead of --epochs.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Cut longer examples to this many "
              "tokens (default: what the model takes).")  # fmt: skip
@click.option("--heldout", metavar="FILE_OR_SHARE", help="File of held-out examples, or the share "
              "of FILE to hold out, such as 0.1; 0 for none (default: one in 20 from 40 examples "
              "on, 200 at most).")  # fmt: skip
@click.option("--eval-every", type=click.IntRange(min=1), help="Steps between two measurements of "
              "the held-out loss (default: a tenth of the run).")  # fmt: skip
@click.option("--save-every", type=click.IntRange(min=1), help="Steps between two checkpoints "
              "(default: a tenth of the run).")  # fmt: skip
@click.option("--beta", type=click.FloatRange(min=0, min_open=True), default=0.1,
              show_default=True, help="For dpo: strength of the reference.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True,
              help="Of the adapter, the order of the examples, and those held out.")  # fmt: skip
@click.option("--logger", "loggers", multiple=True, type=click.Choice(NAMES),
              help="Write metrics here besides metrics.jsonl; may be repeated.")  # fmt: skip
@click.option("--skip-bad", is_flag=True, help="Leave bad lines and examples out.")
@click.option("--base-url", metavar="URL", help="URL of the server (default: TINKER_BASE_URL, or "
              "else the embedded server, with its data in FOLDER/server).")  # fmt: skip
@click.option("--accept-changes", is_flag=True, help="Continue a run with other settings.")
@format_option
def train(**options: Any) -> None:
    """Fine-tune a model on FILE, one example a line (JSONL).

    Lines are conversations (messages), a prompt and its completion, text, or preferences (prompt,
    chosen, rejected).  Run again, the command continues where it was; then try `tinkex chat
    FOLDER`.
    """
    run_job(Job(**options))

"""``tinkex train``: fine-tune a model on a file of examples, in a run folder."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterator, List, Tuple

import click

import tinkex
from tinkex import data, loggers, recipes
from tinkex._runtime.error_text import ErrorText
from tinkex.cli import status_line
from tinkex.cli.commands import Command
from tinkex.cli.connect import base_sampler, context_length, open_service
from tinkex.cli.output import count, format_option, print_facts, warnings_in_words
from tinkex.cli.terminal import echo_error
from tinkex.cli.training_progress import TrainingProgress
from tinkex.cli.training_settings import METHODS, SCHEDULES, Job, JobExamples, schedule_of
from tinkex.errors import InvalidInputError, RunFolderError, SessionLostError, TinkexError
from tinkex.loggers.files import require_folder
from tinkex.loggers.loggers import check_loggers
from tinkex.recipes.evaluation import logged
from tinkex.recipes.prepared import Prepared
from tinkex.recipes.serving import start_server
from tinkex.runs import RunRecord
from tinkex.runs.folder import check_same
from tinkex.runs.journal import JOURNAL_NAME

#: Up to this many examples are prepared before training begins, to find bad ones.
_CHECKED = 20_000

#: By default, a run has this many measurements of the held-out loss, and this many checkpoints.
_PARTS = 10
#: A checkpoint is also saved when the last one is this many minutes old.
_SAVE_MINUTES = 10.0


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="NAME", help="Base model, by its name at the "
              "server; for the embedded one also a folder.")  # fmt: skip
@click.option("--out", required=True, metavar="FOLDER", type=click.Path(path_type=Path),
              help="Run folder: created if it is missing; a run in it is continued.")  # fmt: skip
@click.option("--method", type=click.Choice(METHODS), help="Default: dpo for a file of "
              "preferences, otherwise supervised.")  # fmt: skip
@click.option("--learn", type=click.Choice(["all", "last"]), default="all", show_default=True,
              help="Which of the assistant's messages are learnt.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True,
              help="Rank of the LoRA adapter.")  # fmt: skip
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True),
              help="After warm-up (default: 2e-4; 5e-4 without --base-url; 1e-5 for dpo).",
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
              "tokens (default: the model's context length).")  # fmt: skip
@click.option("--heldout", metavar="FILE_OR_SHARE", help="File of held-out examples, or the share "
              "of FILE to hold out, such as 0.1; 0 for none (default: one example in 20, at most "
              "200; none of fewer than 40).")  # fmt: skip
@click.option("--eval-every", type=click.IntRange(min=1), help="Steps between two measurements of "
              "the held-out loss (default: a tenth of the run).")  # fmt: skip
@click.option("--save-every", type=click.IntRange(min=1), help="Steps between two checkpoints "
              "(default: a tenth of the run).")  # fmt: skip
@click.option("--beta", type=click.FloatRange(min=0, min_open=True), default=0.1,
              show_default=True, help="For dpo: how strongly the reference holds the model back.",
              )  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True,
              help="Seed for the adapter, the order of the examples, and the choice of held-out "
              "ones.")  # fmt: skip
@click.option("--logger", "loggers", multiple=True, type=click.Choice(loggers.NAMES),
              help="Write metrics here besides metrics.jsonl; may be repeated.")  # fmt: skip
@click.option("--skip-bad", is_flag=True, help="Leave bad lines and examples out.")
@click.option("--base-url", metavar="URL", help="URL of the server (default: TINKER_BASE_URL, or "
              "else an embedded server that keeps its data in FOLDER/server).")  # fmt: skip
@click.option("--accept-changes", is_flag=True, help="Continue a run with changed settings.")
@format_option
def train(**options: Any) -> None:
    """Fine-tune a model on FILE, which has one example per line (JSONL).

    A line is a conversation (messages), a prompt and its completion, text, or a preference (prompt,
    chosen, rejected).  If the command is interrupted, run it again: it continues.  Afterwards, try
    `tinkex chat FOLDER`.
    """
    job = Job(**options)
    with warnings_in_words():
        examples = JobExamples(job)
    # Check whatever needs no server before a server is started or asked.
    check_loggers(job.loggers)
    record = _record_so_far(job, examples.config)
    if record.sampler is not None and record.config == examples.config:
        echo_error(f"The run in {job.out} is finished already.")
        _report(job, record)
        return
    try:
        with _open_service(job) as service:
            _train(job, examples, service)
    except TinkexError as error:
        # With bad input, the command would only fail again.
        if not isinstance(error, (InvalidInputError, RunFolderError)) and _read(job.out).has_begun:
            _add_remedy(error)
        raise
    except (KeyboardInterrupt, SystemExit):  # SIGTERM raises SystemExit
        saved = _read(job.out).checkpoints
        steps = f"{count(saved[-1].steps, 'step')} saved" if saved else "No step is saved yet"
        echo_error(f"{steps} in {job.out}; run the command again to continue.")
        raise
    _report(job, _read(job.out))


def _add_remedy(error: TinkexError) -> None:
    """Add the remedy to the hint of *error*: to run the command again."""
    # Replace the hint of a lost session, which would say the same; keep others, which may be a
    # command to copy.
    keeps = error.hint and not isinstance(error, SessionLostError)
    earlier = (error.hint, "\n  ") if keeps else ()
    error.hint = ErrorText(*earlier, "The run continues when the command is run again.")


def _train(job: Job, examples: JobExamples, service: tinkex.ServiceClient) -> None:
    """Train, and save the weights for sampling."""
    training, heldout = _prepare(job, examples, service)
    given = examples.config
    batches = recipes.Batches(
        training, job.batch_size, epochs=job.epochs or 1.0, steps=job.steps, seed=job.seed
    )
    schedule = schedule_of(given, len(batches))
    part = max(1, len(batches) // _PARTS)
    status_line.waiting_for("creating the run")
    with contextlib.ExitStack() as opened:
        run = opened.enter_context(
            service.open_run(
                job.out,
                job.model,
                rank=job.rank,
                seed=job.seed,
                config=given,
                save_every=job.save_every or part,
                save_minutes=_SAVE_MINUTES,
                on_session_loss="resume",
                exit_on_sigterm=True,
                accept_changes=job.accept_changes,
            )
        )
        outputs = opened.enter_context(loggers.open_loggers(job.out, job.loggers, config=given))
        if run.steps_done:
            echo_error(f"Continuing after {run.steps_done} of {count(len(batches), 'step')}.")
            _log_again(run, outputs, job.out)
        status_line.waiting_for("training")
        with _interrupts_explained(), TrainingProgress(len(batches), run.steps_done) as progress:

            def log(step: int, metrics: Any) -> None:
                outputs.log(step, metrics)
                progress.log(step, metrics)

            recipe: Any = recipes.train_supervised
            if examples.method == "dpo":
                recipe = functools.partial(recipes.train_dpo, beta=job.beta)
            recipe(
                run,
                batches,
                schedule,
                accumulation=job.accumulation,
                heldout=heldout,
                eval_every=job.eval_every or part,
                log=log,
            )
        status_line.waiting_for("saving")
        run.save_for_sampler()


@contextlib.contextmanager
def _interrupts_explained() -> Iterator[None]:
    """At Ctrl-C, explain why the command does not end immediately: the run saves its last step."""
    try:
        yield
    except KeyboardInterrupt:
        echo_error("Saving the last step; Ctrl-C again ends the command immediately.")
        status_line.waiting_for("saving the last step")
        raise


def _log_again(run: tinkex.Run, outputs: loggers.Loggers, folder: Path) -> None:
    """Log the steps that only the journal has, e.g. those finished while Ctrl-C was handled."""
    lines = loggers.read_metrics(folder)
    first = lines[-1]["step"] + 1 if lines else 0
    for step in run.record.steps[first : run.steps_done]:
        outputs.log(step.index, logged(step.metrics))


def _prepare(
    job: Job, examples: JobExamples, service: tinkex.ServiceClient
) -> Tuple[Prepared[Any], Prepared[Any]]:
    """Return the training data and the held-out data, checked for bad examples."""
    status_line.waiting_for("loading the tokenizer")
    # Ask the server for its tokenizer, so that an unknown model is an early error.
    tokenizer = base_sampler(service, job.model).get_tokenizer()
    longest = job.max_tokens or context_length(service, job.model)
    cut: List[int] = []

    def prepare(example: data.Example) -> Any:
        if isinstance(example, data.Preference):
            return data.preference_data(example, tokenizer, max_tokens=longest, on_cut=cut.append)
        return data.example_datum(
            example, tokenizer, learn=job.learn, max_tokens=longest, on_cut=cut.append
        )

    def checked(done: int, total: int) -> None:
        status_line.waiting_for(f"checking examples: {done} of {total}")

    training = Prepared(examples.training, prepare, examples.indices, skip_bad=job.skip_bad)
    heldout = Prepared(examples.heldout, prepare, examples.heldout_indices, skip_bad=job.skip_bad)
    total = len(training)
    if training.check(_CHECKED, checked) < total:
        echo_error(f"Only the first {_CHECKED} of {total} examples were checked.")
    heldout.check(len(heldout), checked)  # all of them, because the first measurement needs all
    if cut:
        echo_error(
            f"{count(len(cut), 'text')} longer than {longest} tokens were cut; the longest "
            f"has {max(cut)} tokens."
        )
    if len(heldout):
        status_line.waiting_for("comparing the held-out examples with the others")
        _leave_out_overlap(heldout, training, examples.heldout is not examples.training)
    if not len(heldout):
        echo_error("No examples are held out.")
    return training, heldout


def _leave_out_overlap(heldout: Prepared[Any], training: Prepared[Any], is_file: bool) -> None:
    total = len(heldout)
    shared = heldout.leave_out(training)
    if shared and not len(heldout) and is_file:
        raise InvalidInputError(
            f"all {total} held-out examples are trained on as well, so their loss would show "
            "nothing",
            hint="Give other examples with --heldout, or --heldout 0 for none.",
        )
    if shared:
        echo_error(
            f"{shared} of {total} held-out examples are trained on as well; they are not used "
            "for the held-out loss."
        )


def _record_so_far(job: Job, config: Dict[str, Any]) -> RunRecord:
    """Return the record in the run folder; RunFolderError if its settings are different."""
    require_folder(job.out, "Choose another folder for --out.")
    record = _read(job.out)
    if record.spec:
        spec = {**record.spec, "base_model": job.model, "rank": job.rank, "seed": job.seed}
        check_same(job.out, record, {**spec, "start_from": None}, config, job.accept_changes)
    return record


def _read(folder: Path) -> RunRecord:
    return tinkex.read_run(folder) if (folder / JOURNAL_NAME).exists() else RunRecord()


def _open_service(job: Job) -> ContextManager[tinkex.ServiceClient]:
    """Open a session on the server of *job*; the session ends with the block."""
    if job.base_url is not None:
        return open_service(job.base_url)
    status_line.waiting_for(f"loading {job.model}")
    return start_server(job.out, job.model)


def _report(job: Job, record: RunRecord) -> None:
    """Print the result of the run."""
    assert record.sampler is not None
    metrics = loggers.read_metrics(job.out)
    losses = [line["heldout_loss"] for line in metrics if "heldout_loss" in line]
    first, final = (losses[0], losses[-1]) if losses else (None, None)
    unit = "" if record.config["method"] == "dpo" else " nats per token"
    facts = {
        "steps": str(record.sampler.steps),
        "held-out loss before": None if first is None else f"{first:.3f}{unit}",
        "held-out loss after": None if final is None else f"{final:.3f}{unit}",
        "weights": record.sampler.path,
        "talk to it": f"tinkex chat {job.out}",
    }
    values = {
        "folder": str(job.out),
        "steps": record.sampler.steps,
        "heldout_loss_before": first,
        "heldout_loss_after": final,
        "sampler_path": record.sampler.path,
    }
    rows = [(name, value) for name, value in facts.items() if value is not None]
    print_facts(f"{job.model}, trained in {job.out}", rows, as_json=values)

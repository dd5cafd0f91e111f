"""Fine-tune a small language model on a small book, and show what changes.

    python examples/quickstart.py                      # on the embedded server
    python examples/quickstart.py --base-url URL --model NAME     # on another server

The text is a file of paragraphs; each is one training example.  Before and after training, the
script measures the loss per token on held-out paragraphs, and samples the same prompts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tinkex
from tinkex import types

TEXT = Path(__file__).parent / "data"
MAX_TOKENS = 512  # longer paragraphs are truncated
PROMPTS = ("PROGRAMMER, n.", "COFFEE, n.", "TELEPHONE, n.")

console = Console(highlight=False, emoji=False)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=20, help="training steps")
    add("--batch-size", type=int, default=8, help="paragraphs per step")
    add("--learning-rate", type=float, default=1e-3, help="of the first step; decreases to zero")
    add("--rank", type=int, default=16, help="rank of the LoRA adapter")
    add("--seed", type=int, default=0, help="of the adapter, the order of the text and the samples")
    add("--data", type=Path, default=TEXT / "devils_dictionary_train.txt", help="training text")
    add("--heldout", type=Path, default=TEXT / "devils_dictionary_heldout.txt", help="unseen text")
    add("--eval-entries", type=int, default=None, help="held-out paragraphs to use (default: all)")
    add("--prompt", action="append", default=None, help="a prompt to sample; may be repeated")
    add("--model", default="smollm2-135m", help="base model")
    add("--base-url", default=os.environ.get("TINKER_BASE_URL"), help="a server to use instead")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="for the embedded server")
    add("--data-dir", type=Path, default=Path("runs"), help="where its checkpoints are kept")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.batch_size < 1:
        parser.error("--steps and --batch-size must be at least 1")
    return arguments


def connect(arguments: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here."""
    if arguments.base_url:
        console.print(f"Using the server at {arguments.base_url} ...")
        return tinkex.ServiceClient(base_url=arguments.base_url)
    console.print(f"Starting {arguments.model} here (it is downloaded the first time) ...")
    return tinkex.ServiceClient.local(
        arguments.model, data_dir=str(arguments.data_dir), device=arguments.device
    )


def read_paragraphs(path: Path) -> List[str]:
    """Return the paragraphs of a text file, each on one line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise tinkex.InvalidInputError(f"cannot read {path}: {error}") from error
    paragraphs = [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]
    if not paragraphs:
        raise tinkex.InvalidInputError(f"{path} contains no text")
    return paragraphs


def make_datum(text: str, tokenizer: Any) -> types.Datum:
    """Make an example of *text*: each token is predicted from the ones before it."""
    tokens = tokenizer.encode(text, truncation=True, max_length=MAX_TOKENS - 1)
    tokens.append(tokenizer.eos_token_id)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": np.ones(len(tokens) - 1, np.float32),
        },
    )


def batches(data: Sequence[types.Datum], size: int, seed: int) -> Iterator[List[types.Datum]]:
    """Yield batches indefinitely; the data are reshuffled for each pass."""
    order = random.Random(seed)
    queue: List[types.Datum] = []
    while True:
        while len(queue) < size:
            queue += order.sample(data, len(data))
        yield queue[:size]
        del queue[:size]


def loss_per_token(output: types.ForwardBackwardOutput) -> float:
    """Return the mean negative log-likelihood of the predicted tokens, in nats."""
    logprobs = [datum["logprobs"].to_numpy() for datum in output.loss_fn_outputs]
    return -float(np.concatenate(logprobs).mean())


class Step(NamedTuple):
    """A training step in progress on the server."""

    passed: tinkex.APIFuture[types.ForwardBackwardOutput]
    stepped: tinkex.APIFuture[types.OptimStepResponse]
    tokens: int


def submit(trainer: tinkex.TrainingClient, batch: List[types.Datum], rate: float) -> Step:
    """Submit a forward and backward pass and an optimizer step without waiting."""
    return Step(
        trainer.forward_backward(batch, "cross_entropy"),
        trainer.optim_step(types.AdamParams(learning_rate=rate)),
        sum(datum.model_input.length for datum in batch),
    )


def train(trainer: tinkex.TrainingClient, data: List[types.Datum], arguments: Any) -> List[float]:
    """Train with a progress bar; return the loss per token of each step."""
    rates = arguments.learning_rate * (1 - np.arange(arguments.steps) / arguments.steps)
    source = batches(data, arguments.batch_size, arguments.seed)
    steps = (submit(trainer, batch, float(rate)) for rate, batch in zip(rates, source))
    losses: List[float] = []
    tokens, started_at = 0, time.monotonic()
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s "),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=arguments.steps, loss="-", speed="-")
        ahead = next(steps, None)
        while ahead is not None:
            # Submit the next step before waiting for this one, so that the server is never idle.
            step, ahead = ahead, next(steps, None)
            losses.append(loss_per_token(step.passed.result()))
            step.stepped.result()
            tokens += step.tokens
            speed = tokens / (time.monotonic() - started_at)
            progress.update(task, advance=1, loss=f"{losses[-1]:.3f}", speed=f"{speed:.0f}")
            if not console.is_terminal:  # there the bar is printed only at the end
                console.print(f"step {len(losses)}/{arguments.steps}: loss {losses[-1]:.3f}")
    console.print(f"Trained on {tokens} tokens in {time.monotonic() - started_at:.0f} s.")
    return losses


def evaluate(trainer: tinkex.TrainingClient, data: List[types.Datum]) -> float:
    """Return the loss per token on the held-out text."""
    console.print("Measuring the loss on held-out text ...")
    return loss_per_token(trainer.forward(data, "cross_entropy").result())


def sample(
    sampler: tinkex.SamplingClient, tokenizer: Any, prompts: Sequence[str], seed: int
) -> List[str]:
    """Return the model's continuation of each prompt."""
    params = types.SamplingParams(max_tokens=60, temperature=0.7, top_p=0.9, seed=seed)
    console.print("Sampling ...")
    futures = [
        sampler.sample(types.ModelInput.from_ints(tokenizer.encode(text)), 1, params)
        for text in prompts
    ]
    sequences = [future.result().sequences[0] for future in futures]
    texts = [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in sequences]
    return [" ".join(text.split()) for text in texts]


def show_samples(title: str, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Print each prompt and its continuation."""
    console.print(f"\n[bold]{title}[/bold]")
    for prompt, text in zip(prompts, texts):
        console.print(f"  [cyan]{escape(prompt)}[/cyan] {escape(text)}")


def draw_curve(losses: Sequence[float], folder: Path, rows: int = 8, width: int = 64) -> None:
    """Plot the loss of each step in the terminal, and as a PNG if matplotlib is installed."""
    points = [float(part.mean()) for part in np.array_split(losses, min(width, len(losses)))]
    low, high = min(points), max(points)
    heights = [round((value - low) / ((high - low) or 1) * (rows - 1)) for value in points]
    console.print("\n[bold]Loss per token of each training batch[/bold]")
    for row in reversed(range(rows)):
        label = f"{low + (high - low) * row / (rows - 1):6.2f}"
        line = "".join("●" if height == row else " " for height in heights)
        console.print(f"{label} ┤{line}".rstrip())
    console.print(f"{'':7}└{'─' * len(points)} step {len(losses)}")
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7, 4)).subplots()
        axes.plot(range(1, len(losses) + 1), losses, marker=".")
        axes.set(xlabel="step", ylabel="loss per token")
        folder.mkdir(parents=True, exist_ok=True)
        axes.figure.savefig(folder / "quickstart_loss.png")
        console.print(f"Also saved as {folder / 'quickstart_loss.png'}.")


def run(service: tinkex.ServiceClient, arguments: argparse.Namespace) -> None:
    """Train and compare on an open session."""
    prompts = arguments.prompt or PROMPTS
    trainer = service.create_lora_training_client(
        arguments.model, rank=arguments.rank, seed=arguments.seed
    )
    tokenizer = trainer.get_tokenizer()
    training = [make_datum(text, tokenizer) for text in read_paragraphs(arguments.data)]
    heldout = [make_datum(text, tokenizer) for text in read_paragraphs(arguments.heldout)]
    heldout = heldout[: arguments.eval_entries]
    console.print(
        f"[bold]{arguments.model}[/bold], LoRA of rank {arguments.rank}: {len(training)} "
        f"paragraphs to train on, {len(heldout)} held out\nSession {service.session_id}"
    )
    before = evaluate(trainer, heldout)
    base = service.create_sampling_client(base_model=arguments.model)
    texts_before = sample(base, tokenizer, prompts, arguments.seed)

    losses = train(trainer, training, arguments)

    after = evaluate(trainer, heldout)
    state = trainer.save_state("quickstart").result().path
    weights = trainer.save_weights_for_sampler("quickstart").result().path
    tuned = service.create_sampling_client(model_path=weights)
    texts_after = sample(tuned, tokenizer, prompts, arguments.seed)

    show_samples("Before", prompts, texts_before)
    show_samples("After", prompts, texts_after)
    draw_curve(losses, arguments.data_dir)
    where = arguments.base_url or f"files in {arguments.data_dir}"
    console.print(
        f"\nHeld-out loss per token: [bold]{before:.3f} before, {after:.3f} after[/bold] "
        f"({100 * (after / before - 1):+.1f} %)"
    )
    console.print(f"To train on: {state}\nTo sample:   {weights}\n({where})", soft_wrap=True)


def main() -> int:
    """Run the example and return its exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it like Ctrl-C
    try:
        for path in (arguments.data, arguments.heldout):
            read_paragraphs(path)  # report a wrong path before loading a model
        with connect(arguments) as service:
            run(service, arguments)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing is left running.")
        return 130
    except tinkex.TinkexError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

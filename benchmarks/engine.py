"""The embedded server against a plain transformers + peft loop, side by side on the same batches.

    python benchmarks/engine.py [--model smollm2-135m] [--rows 8] [--tokens 128] [--repeat 5]
        [--new-tokens 64] [--skip-start]

Three measurements, through the whole stack (client, HTTP, server, engine) and with the engine
alone:

- a training step (forward, backward, AdamW) on --rows sequences of --tokens tokens, and on rows of
  mixed lengths.  The plain loop pads to the longest row, as people do; with equal lengths neither
  side pads.  Aim: at most 1.15 x the plain loop's time on equal lengths.
- eight concurrent samples of --new-tokens tokens against one batched `generate` of the same
  prompts.  Aim: at least 0.9 x its tokens per second.
- `tinkex serve`, from the start of the process to the first answered health check.  Aim: 10 s.

Contenders take turns, round by round, and each is judged by its best round: on a shared machine,
that is the least disturbed one.  CPU seconds (of the whole process, including client and server
threads) are shown as well; busy neighbours hardly change them.  Needs the extra "local", and the
model (downloaded once).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import numpy as np

from tinkex import ServiceClient
from tinkex.types import AdamParams, Datum, LoraConfig, ModelInput, SampleRequest, SamplingParams

RANK = 16
ADAM = AdamParams(learning_rate=1e-4)
PROMPT_LENGTHS = (12, 30, 17, 25, 9, 40, 33, 21)

Tokens = Sequence["np.ndarray[Any, Any]"]


def make_rows(lengths: Sequence[int], vocabulary: int) -> List[Any]:
    """Return random token rows, each one longer than its length (inputs and shifted targets)."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, length + 1) for length in lengths]


def to_data(rows: Tokens) -> List[Datum]:
    """Return datums for next-token training on every token of every row."""
    return [
        Datum(
            ModelInput.from_ints(row[:-1]),
            {"target_tokens": row[1:], "weights": np.ones(len(row) - 1, np.float32)},
        )
        for row in rows
    ]


class PlainLoop:
    """What people write without a server: transformers, peft and torch.optim."""

    def __init__(self, source: str) -> None:
        import peft
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()
        self._torch = torch
        self.base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        targets = [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "lm_head",
        ]
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=32,
            target_modules=[*targets, "lm_head"],
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the output layer is tied on purpose
            self._model = peft.get_peft_model(base, config)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=ADAM.learning_rate, weight_decay=0.0)

    def _pad(self, rows: Tokens, *, left: bool) -> Any:
        torch, longest = self._torch, max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[index, where] = torch.tensor(row)
            mask[index, where] = 1
        return ids, mask

    def step(self, rows: Tokens) -> float:
        """One training step; return the summed loss."""
        torch = self._torch
        ids, mask = self._pad(rows, left=False)
        logits = self._model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def generate(self, prompts: Tokens, count: int) -> int:
        """One batched generate; return the number of new tokens."""
        ids, mask = self._pad(prompts, left=True)
        output = self.base.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
        return int(output.shape[1] - ids.shape[1]) * len(prompts)


class EngineAlone:
    """The torch engine, called directly."""

    def __init__(self, model: str) -> None:
        from tinkex.local import load_engine

        self.engine = load_engine(model)
        self.engine.create("bench", LoraConfig(rank=RANK, seed=0))
        self.engine.create_sampler("base", None)

    def step(self, rows: Tokens) -> float:
        """One training step; return the summed loss."""
        output = self.engine.forward_backward("bench", to_data(rows), "cross_entropy", {})
        self.engine.optim_step("bench", ADAM)
        return output.metrics["loss:sum"]

    def generate(self, prompts: Tokens, count: int) -> int:
        """One batch of samples; return the number of new tokens."""
        params = SamplingParams(max_tokens=count, stop=[])
        requests = [SampleRequest(ModelInput.from_ints(p), 1, params) for p in prompts]
        total = 0
        for finished in self.engine.sample("base", requests):
            for _, answer in finished:
                if isinstance(answer, Exception):
                    raise answer
                total += sum(len(sequence.tokens_np) for sequence in answer.sequences)
        return total


class WholeStack:
    """Client, HTTP, server and engine, in one process."""

    def __init__(self, service: ServiceClient, model: str) -> None:
        self._trainer = service.create_lora_training_client(base_model=model, rank=RANK, seed=0)
        self._sampler = service.create_sampling_client(base_model=model)

    def step(self, rows: Tokens) -> float:
        """One training step; return the summed loss."""
        passed = self._trainer.forward_backward(to_data(rows), "cross_entropy")
        stepped = self._trainer.optim_step(ADAM)
        stepped.result()
        loss: float = passed.result().metrics["loss:sum"]
        return loss

    def generate(self, prompts: Tokens, count: int) -> int:
        """Concurrent samples, one request per prompt; return the number of new tokens."""
        params = SamplingParams(max_tokens=count, stop=[])
        futures = [self._sampler.sample(ModelInput.from_ints(p), 1, params) for p in prompts]
        return sum(len(s.tokens_np) for future in futures for s in future.result().sequences)


class Best(NamedTuple):
    """The fewest seconds of several rounds: wall time, and CPU time of the whole process."""

    seconds: float
    cpu: float


def best_times(
    contenders: Mapping[str, Callable[[], Any]], repeat: int, same: float
) -> Dict[str, Best]:
    """Let *contenders* take turns; return the best seconds of each.

    Raises:
        AssertionError: their first answers (losses or tokens) have a relative difference above
            *same*.
    """
    answers = {name: work() for name, work in contenders.items()}  # warm up, and compare
    first = next(iter(answers.values()))
    assert all(abs(answer - first) <= same * abs(first) for answer in answers.values()), answers
    best = dict.fromkeys(contenders, Best(float("inf"), float("inf")))
    for _ in range(repeat):
        for name, work in contenders.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            work()
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
            best[name] = Best(min(best[name].seconds, seconds), min(best[name].cpu, cpu))
    return best


def seconds_to_ready(model: str) -> float:
    """Start ``tinkex serve`` in a process of its own; return the seconds until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tinkex", "serve", "--model", model, "--port", str(port)]
    started = time.perf_counter()
    with _running(command) as process:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/healthz", timeout=5).close()
                return time.perf_counter() - started
            if process.poll() is not None:
                raise RuntimeError(f"tinkex serve ended with code {process.returncode}")
            time.sleep(0.05)


@contextlib.contextmanager
def _running(command: List[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def report(title: str, best: Mapping[str, Best], amount: int, unit: str) -> None:
    """Print one table; ratios are to the plain loop, the first row."""
    plain = next(iter(best.values()))
    print(f"\n{title}")
    print(f"  {'':22}{'s':>9}{unit + '/s':>9}{'time x':>9}{'speed x':>9}{'cpu s':>9}{'cpu x':>8}")
    for name, (seconds, cpu) in best.items():
        line = f"  {name:22}{seconds:9.3f}{amount / seconds:9.1f}{seconds / plain.seconds:9.3f}"
        print(f"{line}{plain.seconds / seconds:9.3f}{cpu:9.3f}{cpu / plain.cpu:8.3f}", flush=True)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--skip-start", action="store_true", help="do not start tinkex serve")
    chosen = parser.parse_args()

    if not chosen.skip_start:
        starts = [seconds_to_ready(chosen.model) for _ in range(2)]
        print(f"tinkex serve is ready after {min(starts):.1f} s (of {len(starts)} starts)")
    alone = EngineAlone(chosen.model)
    info = alone.engine.info
    plain = PlainLoop(str(info.tokenizer_id))
    with ServiceClient.local(model=chosen.model) as service:
        stack = WholeStack(service, chosen.model)
        mixed = np.random.default_rng(1).integers(chosen.tokens // 4, chosen.tokens, chosen.rows)
        for title, lengths in (
            ("equal lengths", [chosen.tokens] * chosen.rows),
            ("mixed lengths", mixed.tolist()),
        ):
            rows = make_rows(lengths, info.vocab_size)
            best = best_times(
                {
                    "transformers + peft": functools.partial(plain.step, rows),
                    "engine": functools.partial(alone.step, rows),
                    "whole stack": functools.partial(stack.step, rows),
                },
                chosen.repeat,
                same=1e-2,  # A is drawn differently, and earlier steps were taken
            )
            total = sum(lengths)
            report(
                f"training step, {chosen.rows} rows, {title}, {total} tokens", best, total, "tok"
            )
        prompts = [row[:-1] for row in make_rows(PROMPT_LENGTHS, info.vocab_size)]
        count = chosen.new_tokens
        best = best_times(
            {
                "generate, one batch": functools.partial(plain.generate, prompts, count),
                "engine": functools.partial(alone.generate, prompts, count),
                "whole stack": functools.partial(stack.generate, prompts, count),
            },
            chosen.repeat,
            same=0.0,
        )
        total = count * len(prompts)
        report(f"{len(prompts)} samples of {count} tokens", best, total, "tok")


if __name__ == "__main__":
    main()

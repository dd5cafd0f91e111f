"""Requests to the OpenAI-compatible endpoint and samples by Tinker clients, at the same time.

    python benchmarks/endpoint.py [--model smollm2-135m] [--requests 8] [--tokens 64] [--repeat 3]
        [--before FOLDER]

Starts `tinkex serve`, sends --requests completions and as many samples, all at once, and reports
the tokens per second of both together and the mean seconds until a request is done.  With --before,
a folder with an earlier tinkex package, that package's server takes turns with this one, round by
round; each is judged by its best round.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

import numpy as np

from tinkex import SamplingClient, SamplingParams, ServiceClient
from tinkex.types import ModelInput


class Round(NamedTuple):
    """Tokens per second, and the mean seconds until a request was done."""

    tokens_per_s: float
    latency_s: float


@contextlib.contextmanager
def serving(model: str, package: Optional[Path]) -> Iterator[int]:
    """Run ``tinkex serve``, from *package* if given, during the block; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = dict(os.environ)
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "tinkex", "serve", "--quiet", "--model", model]
        command += ["--port", str(port), "--data-dir", data]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=data)
        try:
            while True:
                with contextlib.suppress(ConnectionError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"tinkex serve ended with code {process.returncode}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(30)


class Contender:
    """A running server and its clients."""

    def __init__(self, port: int, model: str, prompts: List[List[int]], tokens: int) -> None:
        self._port = port
        self._model = model
        self._prompts = prompts
        self._tokens = tokens
        service = ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key="tml-benchmark")
        self._sampler: SamplingClient = service.create_sampling_client(base_model=model).result()

    def _complete(self, prompt: List[int]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        body = {"model": self._model, "prompt": prompt, "max_tokens": self._tokens}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        usage = json.loads(connection.getresponse().read())["usage"]
        connection.close()
        return int(usage["completion_tokens"])

    def _sample(self, prompt: List[int]) -> int:
        params = SamplingParams(max_tokens=self._tokens)
        response = self._sampler.sample(ModelInput.from_ints(prompt), 1, params).result()
        return len(response.sequences[0].tokens_np)

    def round(self) -> Round:
        """Send all requests, and wait until all are done."""
        started = time.perf_counter()
        ends: List[float] = []

        def timed(index: int) -> int:
            call = self._complete if index % 2 else self._sample
            count = call(self._prompts[index // 2])
            ends.append(time.perf_counter() - started)
            return count

        with ThreadPoolExecutor(2 * len(self._prompts)) as pool:
            total = sum(pool.map(timed, range(2 * len(self._prompts))))
        return Round(total / max(ends), sum(ends) / len(ends))


def main() -> None:
    """Measure, and print one line per server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--before", type=Path)
    chosen = parser.parse_args()

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 20 + 3 * n).tolist() for n in range(chosen.requests)]
    packages = {"this tree": None, **({"before": chosen.before} if chosen.before else {})}
    with contextlib.ExitStack() as servers:
        contenders = {
            name: Contender(
                servers.enter_context(serving(chosen.model, package)),
                chosen.model,
                prompts,
                chosen.tokens,
            )
            for name, package in packages.items()
        }
        for contender in contenders.values():
            contender.round()  # warm up
        rounds = [
            {name: contender.round() for name, contender in contenders.items()}
            for _ in range(chosen.repeat)
        ]
    print(f"{chosen.requests} completions and {chosen.requests} samples of {chosen.tokens} tokens")
    for name in contenders:
        best = max(figures[name] for figures in rounds)
        print(f"  {name:12}{best.tokens_per_s:9.1f} tok/s{best.latency_s:9.2f} s each")


if __name__ == "__main__":
    main()

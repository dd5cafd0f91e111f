"""Runs one client in one scenario, in its own process; prints the cost as JSON.

    python client.py tinkex|tinker|http SCENARIO URL [COUNT]

``tinkex`` and ``tinker`` run the same lines; ``http`` is a bare loop of http.client that makes the
same requests and decodes no results.
"""

from __future__ import annotations

import http.client
import importlib
import json
import queue
import sys
import threading
import time
from typing import Any, Callable, Dict, List
from urllib.parse import urlsplit

PROMPT = list(range(1000, 1100))
BATCH = (64, 1024)

#: How many batches `Sdk.million` runs; it reports their mean CPU and the first one's extra memory.
MILLIONS = 5


def memory_mib(field: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def measured(work: Callable[[], Dict[str, Any]]) -> Dict[str, Any]:
    """Run *work*; return its result with its CPU and wall seconds and its memory in MiB."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")  # resets the peak
    before = memory_mib("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    facts = work()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "extra_mib": memory_mib("VmHWM") - before,
        "peak_mib": memory_mib("VmHWM"),
        **facts,
    }


def done(created: Any) -> Any:
    """Return the created client; wait for it if the SDK returned a future."""
    return created.result() if hasattr(created, "result") else created


class Sdk:
    """The scenarios, written for both SDKs."""

    def __init__(self, name: str, url: str) -> None:
        self.sdk = importlib.import_module(name)
        self.service = self.sdk.ServiceClient(base_url=url, api_key="tml-benchmark")

    def sampler(self) -> Any:
        return done(self.service.create_sampling_client(base_model="base"))

    def trainer(self) -> Any:
        return done(self.service.create_lora_training_client("base", rank=32))

    def data(self, count: int, length: int) -> List[Any]:
        import numpy as np  # here, so that `imports` measures it

        types = self.sdk.types
        tokens = np.arange(length + 1) % 32000
        inputs = {
            "target_tokens": types.TensorData.from_numpy(tokens[1:]),
            "weights": types.TensorData.from_numpy(np.ones(length, np.float32)),
        }
        ints = tokens[:-1].tolist()
        return [
            types.Datum(model_input=types.ModelInput.from_ints(ints), loss_fn_inputs=inputs)
            for _ in range(count)
        ]

    def burst(self, count: int) -> Dict[str, Any]:
        """Request *count* samples at once."""
        sampler, types = self.sampler(), self.sdk.types
        prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=2)
        sampler.sample(prompt, num_samples=1, sampling_params=params).result()

        def work() -> Dict[str, Any]:
            futures = [
                sampler.sample(prompt, num_samples=1, sampling_params=params) for _ in range(count)
            ]
            return {"results": sum(len(f.result().sequences[0].tokens) == 2 for f in futures)}

        return measured(work)

    def latency(self, count: int) -> Dict[str, Any]:
        """Measure how long after the server finishes a sample its future is resolved, in ms.

        Also the longest time from a request to its result, in seconds.
        """
        sampler, types = self.sampler(), self.sdk.types
        prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=2)
        sampler.sample(prompt, num_samples=1, sampling_params=params).result()
        stamps: List[Any] = []
        made: Dict[Any, float] = {}
        threads = 0

        def note(future: Any) -> None:
            stamps.append((time.monotonic(), future))

        def work() -> Dict[str, Any]:
            nonlocal threads
            futures = []
            for _ in range(count):
                began = time.monotonic()
                future = sampler.sample(prompt, num_samples=1, sampling_params=params)
                future.add_done_callback(note)
                futures.append(future)
                made[future] = began
            for future in futures[::100]:
                future.result()
                threads = max(threads, threading.active_count())
            for future in futures:
                future.result()
            return {}

        facts = measured(work)
        while len(stamps) < count:
            time.sleep(0.01)
        late_ms = []
        for at, future in stamps:
            high, low = (int(token) for token in future.result().sequences[0].tokens)
            late_ms.append(1e3 * at - ((high << 30) + low) / 1e3)
        late_ms.sort()
        longest_s = max(at - made[future] for at, future in stamps)
        return {
            **facts,
            "threads": threads,
            "p50_ms": late_ms[count // 2],
            "p95_ms": late_ms[int(0.95 * count)],
            "max_ms": late_ms[-1],
            "longest_s": longest_s,
        }

    def sequential(self, count: int) -> Dict[str, Any]:
        """Request one sample after another."""
        sampler, types = self.sampler(), self.sdk.types
        prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=2)

        def work() -> Dict[str, Any]:
            for _ in range(count):
                sampler.sample(prompt, num_samples=1, sampling_params=params).result()
            return {}

        sampler.sample(prompt, num_samples=1, sampling_params=params).result()
        return measured(work)

    def steps(self, count: int) -> Dict[str, Any]:
        """Run training steps of 64 x 1024 tokens, each submitted before the last one is done."""
        trainer, types = self.trainer(), self.sdk.types
        data, adam = self.data(*BATCH), types.AdamParams(learning_rate=1e-4)
        trainer.forward_backward(data, "cross_entropy").result()

        def work() -> Dict[str, Any]:
            before: List[Any] = []
            for _ in range(count):
                step = [trainer.forward_backward(data, "cross_entropy"), trainer.optim_step(adam)]
                for future in before:
                    future.result()
                before = step
            for future in before:
                future.result()
            return {}

        return measured(work)

    def million(self, count: int) -> Dict[str, Any]:
        """Run batches of *count* x 1024 tokens, one after another, as in an epoch."""
        trainer = self.trainer()
        trainer.forward_backward(self.data(*BATCH), "cross_entropy").result()
        data = self.data(count, 1024)

        def work() -> Dict[str, Any]:
            output = trainer.forward_backward(data, "cross_entropy").result()
            return {"results": len(output.loss_fn_outputs)}

        runs = [measured(work) for _ in range(MILLIONS)]
        mean_cpu_s = sum(run["cpu_s"] for run in runs) / MILLIONS
        return {**runs[0], "cpu_s": mean_cpu_s, "later_extra_mib": runs[-1]["extra_mib"]}


class Bare:
    """The requests of `Sdk.burst` and `Sdk.sequential`, with nothing but http.client."""

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc
        self.headers = {"Content-Type": "application/json", "X-API-Key": "tml-benchmark"}

    def post(self, connection: http.client.HTTPConnection, route: str, **body: Any) -> bytes:
        connection.request("POST", f"/api/v1/{route}", json.dumps(body), self.headers)
        return connection.getresponse().read()

    def sample(self, connection: http.client.HTTPConnection) -> None:
        accepted = self.post(
            connection,
            "asample",
            sampling_session_id="s",
            seq_id=0,
            num_samples=1,
            prompt={"chunks": [{"tokens": PROMPT, "type": "encoded_text"}]},
            sampling_params={"max_tokens": 2},
            type="sample",
        )
        self.post(connection, "retrieve_future", request_id=json.loads(accepted)["request_id"])

    def burst(self, count: int) -> Dict[str, Any]:
        tasks: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def loop() -> None:
            connection = http.client.HTTPConnection(self.address)
            while tasks.get():
                self.sample(connection)
            connection.close()

        def work() -> Dict[str, Any]:
            threads = [threading.Thread(target=loop) for _ in range(400)]
            for thread in threads:
                thread.start()
            for _ in range(count):
                tasks.put(True)
            for _ in threads:
                tasks.put(False)
            for thread in threads:
                thread.join()
            return {}

        return measured(work)

    def sequential(self, count: int) -> Dict[str, Any]:
        connection = http.client.HTTPConnection(self.address)
        self.sample(connection)

        def work() -> Dict[str, Any]:
            for _ in range(count):
                self.sample(connection)
            return {}

        return measured(work)


def imports(name: str) -> Dict[str, Any]:
    """Time importing the SDK, and then getting ServiceClient (both SDKs import lazily)."""
    began = time.perf_counter()
    sdk = importlib.import_module(name)
    middle = time.perf_counter()
    service_client = sdk.ServiceClient
    ended = time.perf_counter()
    assert service_client.__name__ == "ServiceClient"
    return {
        "import_ms": 1e3 * (middle - began),
        "all_ms": 1e3 * (ended - began),
        "peak_mib": memory_mib("VmHWM"),
    }


def main() -> None:
    if sys.argv[2] == "imports":
        print(json.dumps(imports(sys.argv[1])))
        return
    name, scenario, url, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    client: Any = Bare(url) if name == "http" else Sdk(name, url)
    facts = getattr(client, scenario)(count)
    print(json.dumps(facts), flush=True)
    if name != "http":
        closing = client.service.close("success")
        closing.result(30)


if __name__ == "__main__":
    main()

"""Encode and decode one batch in both dialects, side by side with plain lists and `json`.

    python benchmarks/wire.py [--datums 64] [--tokens 1024] [--repeat 20]

The baseline is what a client without numpy buffers does: lists of Python numbers, written and read
by the standard library.  Times are the best of the repeats; MB/s refer to the batch's size as numpy
buffers (tokens int32, targets int64, weights and logprobs float32), so that dialects can be
compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ModelInput,
    TensorData,
)
from tinkex.wire.codec import codec_for


def make_batch(datums: int, tokens: int) -> Tuple[ForwardBackwardRequest, ForwardBackwardOutput]:
    """Make a request of *datums* x *tokens* with realistic ids and weights, and its result."""
    rng = np.random.default_rng(0)
    data: List[Datum] = []
    outputs = []
    for _ in range(datums):
        ids = rng.integers(0, 150_000, tokens + 1)
        inputs = {"target_tokens": ids[1:], "weights": rng.random(tokens, dtype=np.float32)}
        data.append(Datum(ModelInput.from_ints(ids[:-1]), inputs))
        logprobs = np.log(rng.random(tokens, dtype=np.float32) + 1e-6)
        outputs.append({"logprobs": TensorData(logprobs)})
    request = ForwardBackwardRequest("session:train:0", 1, data, "cross_entropy")
    return request, ForwardBackwardOutput(outputs, {"loss:sum": 1.5}, "TorchLossReturn")


def naive_tensor(tensor: TensorData) -> Any:
    """Return the JSON form of *tensor* as plain lists, built number by number."""
    values = [float(v) if tensor.dtype == "float32" else int(v) for v in tensor.values]
    return {"data": values, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def naive_encode_request(request: ForwardBackwardRequest) -> bytes:
    """Write *request* the naive way."""
    data = [
        {
            "model_input": {"chunks": [{"tokens": [int(t) for t in d.model_input.to_numpy()]}]},
            "loss_fn_inputs": {name: naive_tensor(t) for name, t in d.loss_fn_inputs.items()},
        }
        for d in request.data
    ]
    body = {"forward_backward_input": {"data": data, "loss_fn": request.loss_fn}}
    return json.dumps({**body, "model_id": request.model_id, "seq_id": request.seq_id}).encode()


def naive_decode_request(body: bytes) -> Any:
    """Read a request into lists, each number checked, as a validating model would."""
    data = json.loads(body)["forward_backward_input"]["data"]
    for datum in data:
        for chunk in datum["model_input"]["chunks"]:
            chunk["tokens"] = [int(t) for t in chunk["tokens"]]
        for tensor in datum["loss_fn_inputs"].values():
            kind = float if tensor["dtype"] == "float32" else int
            tensor["data"] = [kind(v) for v in tensor["data"]]
    return data


def naive_encode_output(output: ForwardBackwardOutput) -> bytes:
    """Write *output* the naive way."""
    maps = [{name: naive_tensor(t) for name, t in d.items()} for d in output.loss_fn_outputs]
    return json.dumps({"loss_fn_outputs": maps, "metrics": output.metrics}).encode()


def naive_decode_output(body: bytes) -> Any:
    """Read an output into lists, each number checked."""
    maps = json.loads(body)["loss_fn_outputs"]
    return [{name: [float(v) for v in t["data"]] for name, t in d.items()} for d in maps]


def best_ms(call: Callable[[], Any], repeat: int) -> float:
    """Return the duration of the fastest of *repeat* calls, in milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def main() -> None:
    """Measure, and print one line per dialect and message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--datums", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    request, output = make_batch(args.datums, args.tokens)
    dialects: Mapping[str, Sequence[Tuple[str, Any, Any, Any]]] = {
        "naive json": (
            ("request", request, naive_encode_request, naive_decode_request),
            ("output", output, naive_encode_output, naive_decode_output),
        ),
        **{
            codec.name: (
                ("request", request, codec.encode_forward_backward, codec.decode_forward_backward),
                ("output", output, codec.encode_output, codec.decode_output),
            )
            for codec in (codec_for("application/json"), codec_for("application/x-protobuf"))
        },
    }
    tokens = args.datums * args.tokens
    nbytes = {"request": tokens * (4 + 8 + 4), "output": tokens * 4}
    naive_ms: Dict[str, float] = {}
    print(f"{args.datums} x {args.tokens} tokens, best of {args.repeat}")
    print("dialect     message  body MB   encode ms    MB/s   decode ms    MB/s   naive / this")
    for dialect, messages in dialects.items():
        for title, value, encode, decode in messages:
            body = encode(value)
            encode_ms = best_ms(functools.partial(encode, value), args.repeat)
            decode_ms = best_ms(functools.partial(decode, body), args.repeat)
            ratio = naive_ms.setdefault(title, encode_ms + decode_ms) / (encode_ms + decode_ms)
            print(
                f"{dialect:11} {title:8} {len(body) / 1e6:7.2f}"
                f" {encode_ms:11.2f} {nbytes[title] / encode_ms / 1e3:7.0f}"
                f" {decode_ms:11.2f} {nbytes[title] / decode_ms / 1e3:7.0f} {ratio:14.1f}"
            )


if __name__ == "__main__":
    main()

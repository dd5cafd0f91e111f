"""lm-evaluation-harness, as published: it scores a checkpoint before and after training.

Its model `local-completions` gets the log-likelihoods of given answers from the OpenAI-compatible
endpoint.  The task and its data are made here; nothing comes from a hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from field.conftest import KEY, MODEL

from tinkex import ServiceClient, types
from tinkex.local import LocalServer

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

#: Question, the answers to choose from, and which is right.
QUESTIONS = [
    (f"{name} likes", [" red", " blue", " green"], number % 3)
    for number, name in enumerate(["Ann", "Bob", "Cy", "Dan", "Eve", "Fay", "Gus", "Hal", "Ivy"])
]

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data = tmp_path / "colours.jsonl"
    lines = [
        json.dumps({"question": question, "choices": choices, "label": label})
        for question, choices, label in QUESTIONS
    ]
    data.write_text("\n".join(lines) + "\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.format(data=data))
    return folder


def score(server: LocalServer, model: str, tokenizer: str, tasks: Path) -> float:
    """Run the harness as users do, in its own process; return the accuracy."""
    output = tasks.parent / "results"
    arguments = {
        "model": model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": tokenizer,
        "num_concurrent": 2,
        "max_length": 512,
    }
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", listed, "--tasks", "colours", "--include_path", str(tasks)]
    command += ["--output_path", str(output), "--batch_size", "4"]
    environment = {
        **os.environ,
        "OPENAI_API_KEY": KEY,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tasks.parent / "datasets"),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    newest = max(output.rglob("results*.json"), key=lambda path: path.stat().st_mtime_ns)
    results: Dict[str, Any] = json.loads(newest.read_text())["results"]["colours"]
    newest.unlink()
    return float(results["acc,none"])


def datums(tokenizer: Any) -> List[types.Datum]:
    made = []
    for question, choices, label in QUESTIONS:
        prompt, answer = tokenizer.encode(question), tokenizer.encode(choices[label])
        tokens = prompt + answer
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        made.append(types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs))
    return made


def test_the_harness_scores_a_checkpoint_before_and_after_training(
    server: LocalServer, tasks: Path
) -> None:
    with ServiceClient(base_url=server.url, api_key=KEY) as service:
        training = service.create_lora_training_client(base_model=MODEL, rank=32)
        tokenizer = training.get_tokenizer()
        before = training.save_weights_for_sampler("before").result().path
        data = datums(tokenizer)
        for _ in range(60):
            training.forward_backward(data, "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=0.005)).result()
        after = training.save_weights_for_sampler("after").result().path
        folder = training.get_info().model_data.tokenizer_id
    assert score(server, before, folder, tasks) < 0.7
    assert score(server, after, folder, tasks) == 1.0

"""DPO on the embedded server: the loss, what it learns, and how it continues."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import pytest

from tinkex import Datum, ModelInput, ServiceClient, read_run
from tinkex.errors import InvalidInputError, NoProgressError
from tinkex.recipes import Batches, constant, dpo_loss, train_dpo

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine

STEPS = 6


def reply(prompt: int, token: int) -> Datum:
    """Return the datum of a reply of two tokens to a prompt of three."""
    return Datum(
        ModelInput.from_ints([prompt, 32, 33, token]),
        {"target_tokens": [32, 33, token, token], "weights": [0.0, 0.0, 1.0, 1.0]},
    )


PAIRS = [(reply(40 + index, 65), reply(40 + index, 66)) for index in range(8)]
HELDOUT = [(reply(60 + index, 65), reply(60 + index, 66)) for index in range(4)]


class Crash(NoProgressError):
    """Stands for an end of the program that leaves no chance to save."""


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[ServiceClient]:
    """A client of the embedded server with the tiny model."""
    torch.set_num_threads(1)
    with ServiceClient.local("tiny-random", data_dir=str(tmp_path / "server")) as service:
        yield service


def train(
    service: ServiceClient, folder: Path, crash_in: Optional[int] = None, **options: Any
) -> Tuple[Optional[float], List[Any]]:
    lines: List[Any] = []

    def log(index: int, metrics: Any) -> None:
        if index == crash_in:
            raise Crash("the lights went out")
        lines.append((index, dict(metrics)))

    batches = Batches(PAIRS, 4, steps=STEPS)
    with service.open_run(folder, "tiny-random", rank=4, seed=1, save_every=2) as run:
        given = {"heldout": HELDOUT, "eval_every": 3, "log": log, **options}
        return train_dpo(run, batches, constant(0.003), **given), lines


def test_the_chosen_reply_becomes_likelier(tiny: ServiceClient, tmp_path: Path) -> None:
    final, lines = train(tiny, tmp_path / "run")
    first = lines[0][1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the model is the reference
    assert first["heldout_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["margin"] == pytest.approx(0.0, abs=1e-4)
    assert [index for index, metrics in lines if "heldout_loss" in metrics] == [0, 3, STEPS]
    assert lines[-1] == (STEPS, {"heldout_loss": final, "heldout_accuracy": 1.0})
    assert final is not None
    assert final < 0.6
    assert lines[-2][1]["accuracy"] == 1.0


@pytest.mark.parametrize("crash_in", [1, 4, STEPS])
def test_an_interrupted_run_has_the_results_of_an_uninterrupted_one(
    tiny: ServiceClient, tmp_path: Path, crash_in: int
) -> None:
    final, _ = train(tiny, tmp_path / "whole")
    with pytest.raises(Crash):
        train(tiny, tmp_path / "parts", crash_in)
    again, _ = train(tiny, tmp_path / "parts")
    assert again == final
    records = [read_run(tmp_path / name).steps for name in ("whole", "parts")]
    expected, found = ([(step.index, step.metrics) for step in steps] for steps in records)
    assert found == expected


def test_accumulation_gives_the_same_gradient_in_several_passes(
    tiny: ServiceClient, tmp_path: Path
) -> None:
    _, once = train(tiny, tmp_path / "once")
    _, parts = train(tiny, tmp_path / "parts", accumulation=3)
    for (_, found), (_, expected) in zip(parts, once):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_checkpoint_may_be_the_reference(tiny: ServiceClient, tmp_path: Path) -> None:
    train(tiny, tmp_path / "first")
    path = read_run(tmp_path / "first").checkpoints[-1].path
    _, lines = train(tiny, tmp_path / "second", reference=path)
    # The base model prefers the chosen reply less than that checkpoint does.
    assert lines[0][1]["margin"] < -0.01
    batches = Batches(PAIRS, 4, steps=1)
    margins: List[float] = []
    with tiny.open_run(tmp_path / "third", "tiny-random", start_from=path) as run:
        train_dpo(run, batches, constant(0.003), log=lambda _, m: margins.append(m["margin"]))
    assert margins == [pytest.approx(0.0, abs=1e-4)]  # a run's own starting point is its reference


def test_the_loss_is_the_formula_of_the_paper() -> None:
    def datum(reference: float) -> Datum:
        inputs = {"target_tokens": [1, 2], "weights": [0.0, 1.0], "reference_logprob": [reference]}
        return Datum(ModelInput.from_ints([0, 1]), inputs)

    data = [datum(-2.0), datum(-1.0), datum(-1.0), datum(-1.0)]
    rows = [torch.tensor(row) for row in ([9.0, -1.0], [9.0, -3.0], [9.0, -2.0], [9.0, -1.0])]
    loss, metrics = dpo_loss(0.5)(data, rows)
    margins = np.array([0.5 * ((-1 + 2) - (-3 + 1)), 0.5 * ((-2 + 1) - (-1 + 1))])
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margins)).sum(), rel=1e-6)
    assert {name: float(value) for name, value in metrics.items()} == {
        "accuracy:sum": 1.0,
        "margin:sum": pytest.approx(margins.sum()),
    }


def test_a_beta_that_is_not_positive_is_refused(tiny: ServiceClient, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="beta is 0"):
        train(tiny, tmp_path / "run", beta=0)

"""Plots and trackers, with stand-ins for their packages."""

from __future__ import annotations

import logging

import pytest

from tinkex.errors import ConfigError
from tinkex.loggers import curves, open_loggers


class Recorder:
    """A run of a tracker, or a SummaryWriter: records what it is given."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        self.logged = []
        self.closed = 0

    def define_metric(self, name, step_metric):
        self.x_axis = name, step_metric

    def log(self, metrics, step=None):
        if step is None:  # wandb
            assert self.x_axis == ("*", "step")
            step = metrics.pop("step")
        self.logged.append((step, metrics))

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.logged.append((global_step, {tag: scalar_value}))

    def finish(self):
        self.closed += 1

    close = finish


@pytest.fixture
def made():
    return []


@pytest.fixture
def make(made):
    def make(*arguments, **options):
        made.append(Recorder(*arguments, **options))
        return made[-1]

    return make


def log_steps(folder, name, steps, **options):
    with open_loggers(folder, [name], **options) as loggers:
        for step in steps:
            loggers.log(step, {"loss": float(step)})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_each_step_once_in_one_run(tmp_path, install, make, made, name):
    install(name, init=make)
    folder = tmp_path / "first"
    log_steps(folder, name, range(4), config={"rank": 8})
    log_steps(folder, name, range(2, 6))
    before, after = made
    assert [step for step, _ in before.logged] == [0, 1, 2, 3]
    assert [step for step, _ in after.logged] == [4, 5]
    assert after.logged[0] == (4, {"loss": 4.0})
    assert before.closed == after.closed == 1
    assert before.options["project"] == "tinkex"
    assert before.options["config"] == {"rank": 8}
    assert before.options["resume"] == after.options["resume"] == "allow"
    identity = "id" if name == "wandb" else "name"
    assert before.options[identity] == after.options[identity]
    log_steps(tmp_path / "second", name, range(1))
    assert made[-1].options[identity] != before.options[identity]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_each_step_of_a_finished_run_that_is_continued(
    tmp_path, install, make, made, name
):
    install(name, init=make)
    for steps in (2, 4):
        with open_loggers(tmp_path, [name]) as loggers:
            for step in range(2 if steps == 4 else 0, steps):
                loggers.log(step, {"loss": float(step)})
            loggers.log(steps, {"heldout_loss": 9.0})
    before, after = made
    assert before.logged == [(0, {"loss": 0.0}), (1, {"loss": 1.0}), (2, {"heldout_loss": 9.0})]
    assert after.logged == [(2, {"loss": 2.0}), (3, {"loss": 3.0}), (4, {"heldout_loss": 9.0})]


def test_further_metrics_of_the_same_step_are_sent_when_logged(tmp_path, install, make, made):
    install("wandb", init=make)
    with open_loggers(tmp_path, ["wandb"]) as loggers:
        loggers.log(0, {"loss": 1.0})
        loggers.log(0, {"heldout_loss": 2.0})
        loggers.log(1, {"loss": 0.5})
        loggers.log(0, {"loss": 1.0})  # as if the session was lost and the run went back
        loggers.log(1, {"loss": 0.5})
        loggers.log(2, {"loss": 0.1})
    sent = [(0, {"loss": 1.0}), (0, {"heldout_loss": 2.0}), (1, {"loss": 0.5}), (2, {"loss": 0.1})]
    assert made[0].logged == sent


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_project_is_read_from_the_variable_of_the_tracker(
    tmp_path, install, make, made, name, monkeypatch
):
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "poems")
    install(name, init=make)
    log_steps(tmp_path, name, [0])
    assert made[0].options["project"] == "poems"


def test_tensorboard_skips_repeated_steps(tmp_path, install, make, made):
    install("tensorboardX", SummaryWriter=make)
    log_steps(tmp_path, "tensorboard", range(4))
    log_steps(tmp_path, "tensorboard", [2, 3, 1])
    assert [writer.options["purge_step"] for writer in made] == [0, 2, 1]
    assert {writer.arguments for writer in made} == {(str(tmp_path / "tensorboard"),)}
    assert [writer.closed for writer in made] == [1, 1, 1]
    assert made[1].logged == [(2, {"loss": 2.0}), (3, {"loss": 3.0})]


def test_torch_writes_for_tensorboard_if_tensorboardx_is_missing(
    tmp_path, install, uninstall, make, made
):
    uninstall("tensorboardX")
    install("torch.utils.tensorboard", SummaryWriter=make)
    log_steps(tmp_path, "tensorboard", [0])
    assert made[0].logged == [(0, {"loss": 0.0})]


@pytest.mark.parametrize(
    ("name", "modules", "extra"),
    [
        ("png", ["matplotlib.figure", "matplotlib"], "plots"),
        ("tensorboard", ["tensorboardX", "torch.utils.tensorboard"], "tensorboard"),
        ("wandb", ["wandb"], "wandb"),
        ("trackio", ["trackio"], "trackio"),
    ],
)
def test_a_missing_package_is_an_error_with_the_command_to_install_it(
    tmp_path, uninstall, name, modules, extra
):
    uninstall(*modules)
    with pytest.raises(ConfigError) as caught:
        open_loggers(tmp_path, ["csv", name])
    assert f'the logger "{name}" needs {modules[0]}, which is not installed' in str(caught.value)
    assert f'python -m pip install "tinkex[{extra}]"' in str(caught.value)


def test_a_folder_with_the_name_of_the_package_is_not_the_package(tmp_path, install):
    install("wandb")
    with pytest.raises(ConfigError, match="needs wandb, which is not installed"):
        open_loggers(tmp_path, ["wandb"])


def test_a_tracker_that_cannot_start_is_an_error_and_closes_the_others(
    tmp_path, install, make, made
):
    def init(**options):
        raise RuntimeError("no API key configured")

    install("tensorboardX", SummaryWriter=make)
    install("wandb", init=init)
    with pytest.raises(ConfigError, match="wandb could not start: no API key configured"):
        open_loggers(tmp_path, ["tensorboard", "wandb"])


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path, install, make, made, caplog):
    install("trackio", init=make)
    with open_loggers(tmp_path, ["trackio"]) as loggers:

        def log(metrics, step=None):
            raise ConnectionError("the server is gone")

        made[0].log = log
        with caplog.at_level(logging.WARNING, "tinkex"):
            loggers.log(0, {"loss": 1.0})
            loggers.log(1, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the logger 'trackio' failed" in caplog.text


class Axes:
    def __init__(self):
        self.curves = {}

    def plot(self, *points, label, marker):
        self.curves[label] = list(zip(*points)), marker

    def set_xlabel(self, text):
        pass

    def grid(self, alpha):
        pass

    def legend(self):
        pass


class Figures:
    """matplotlib.figure."""

    def __init__(self):
        self.drawn = []

    def Figure(self, **options):
        return FigureStandIn(self)


class FigureStandIn:
    def __init__(self, figures):
        self.figures = figures

    def subplots(self, rows, squeeze):
        import numpy as np

        axes = np.empty((rows, 1), object)
        for row in range(rows):
            axes[row, 0] = Axes()
        self.panels = axes[:, 0].tolist()
        return axes

    def savefig(self, file, format, dpi):
        file.write(b"PNG")
        self.figures.drawn.append([panel.curves for panel in self.panels])


def test_losses_and_rewards_are_plotted_in_separate_panels(tmp_path, install):
    figures = Figures()
    install("matplotlib.figure", Figure=figures.Figure)
    with open_loggers(tmp_path, ["png"]) as loggers:
        for step in range(4):
            loggers.log(step, {"loss": 4.0 - step, "reward": float(step), "tokens": 7})
        loggers.log(3, {"heldout_loss": 2.0})
    losses, rewards = figures.drawn[-1]
    assert losses == {
        "loss": ([(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)], None),
        "heldout_loss": ([(3, 2.0)], "o"),
    }
    assert list(rewards) == ["reward"]
    assert (tmp_path / "metrics.png").read_bytes() == b"PNG"
    assert len(figures.drawn) == 1  # at the end


def test_a_plot_is_drawn_when_it_is_due_and_not_more_often(tmp_path, install, monkeypatch):
    now = 0.0
    monkeypatch.setattr(curves.time, "monotonic", lambda: now)
    figures = Figures()
    install("matplotlib.figure", Figure=figures.Figure)
    with open_loggers(tmp_path, ["png"], plot_every_s=60) as loggers:
        loggers.log(0, {"loss": 1.0})
        now = 60.0
        loggers.log(1, {"loss": 1.0})
        assert len(figures.drawn) == 1
        now = 119.0
        loggers.log(2, {"loss": 1.0})
        assert len(figures.drawn) == 1
        now = 120.0
        loggers.log(3, {"loss": 1.0})
        assert len(figures.drawn) == 2
    assert len(figures.drawn) == 2  # nothing was logged since the last plot


def test_without_losses_and_rewards_everything_is_plotted():
    assert curves.panels_of([{"step": 0, "a": 1, "b": 2}]) == [["a", "b"]]


def test_matplotlib_draws_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    log_steps(tmp_path, "png", range(3))
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")

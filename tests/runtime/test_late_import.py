"""Late imports, and forks in the middle of them."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from support.threads import PATIENCE_S, wait_until

from tinkex._runtime import late_import
from tinkex._runtime.late_import import import_late

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that signals that its import has begun, and waits."""
    name = "tinkex_test_slow_module"
    (tmp_path / f"{name}.py").write_text(
        "import sys\nsys.tinkex_test_begun.set()\nsys.tinkex_test_go_on.wait(60)\nvalue = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "tinkex_test_begun", threading.Event(), raising=False)
    monkeypatch.setattr(sys, "tinkex_test_go_on", threading.Event(), raising=False)
    for modules in (sys.modules, late_import._modules):
        modules.pop(name, None)  # type: ignore[attr-defined]
    return name


def exit_code(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_waits_for_an_import_in_another_thread(slow_module: str) -> None:
    importer = threading.Thread(target=import_late, args=(slow_module,))
    importer.start()
    assert sys.tinkex_test_begun.wait(PATIENCE_S)  # type: ignore[attr-defined]
    forks = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:  # if the fork did not wait, this would wait for the importer's lock forever
            os._exit(import_late(slow_module).value)
        forks.append(pid)

    forker = threading.Thread(target=fork)
    forker.start()
    forker.join(0.1)
    assert forks == []
    sys.tinkex_test_go_on.set()  # type: ignore[attr-defined]
    for thread in (importer, forker):
        thread.join(PATIENCE_S)
    assert exit_code(forks[0]) == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_does_not_wait_for_an_import_forever(
    slow_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_import, "_MAX_FORK_WAIT_S", 0.01)
    importer = threading.Thread(target=import_late, args=(slow_module,))
    importer.start()
    assert sys.tinkex_test_begun.wait(PATIENCE_S)  # type: ignore[attr-defined]
    pid = os.fork()
    if pid == 0:
        os._exit(len(late_import._importing))
    assert exit_code(pid) == 0
    sys.tinkex_test_go_on.set()  # type: ignore[attr-defined]
    importer.join(PATIENCE_S)
    wait_until(lambda: not late_import._importing, "it is done")


def test_a_missing_module_is_an_ordinary_error() -> None:
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            import_late("tinkex_test_no_such_module")
    assert not late_import._importing

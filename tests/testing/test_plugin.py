"""The pytest plugin, in separate test runs, and the documented example."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "tinkex.testing.plugin"
EXAMPLE = ROOT / "examples" / "testing"


def run_pytest(folder: Path, *options: str) -> List[str]:
    """Run the tests in *folder* with the plugin; return the lines that pytest printed."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["TINKER_API_KEY"] = "tml-real"
    environment.pop("TINKER_BASE_URL", None)
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", "-q"]
    strict = ["-W", "error", "--strict-markers", "--rootdir", str(folder), "-c", os.devnull]
    done = subprocess.run(
        [*command, *strict, *options, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_entry_point_is_the_plugin() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["pytest11"].strip() == f"tinkex = {PLUGIN}"
    plugin = importlib.import_module(PLUGIN)
    assert {"tinkex_server", "tinkex_service"} <= set(vars(plugin))


def test_the_fixtures(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        """
import os
import pytest
from tinkex import ServiceClient

def test_both(tinkex_server, tinkex_service):
    assert tinkex_server.live_sessions() == [tinkex_service.session_id]
    tinkex_service.create_lora_training_client("deterministic")

def test_a_client_without_a_url_goes_to_the_server(tinkex_server):
    with ServiceClient() as service:
        assert service.config.base_url == tinkex_server.url
        assert service.config.api_key == "tml-fake"

@pytest.mark.tinkex_server(models=["Qwen/Qwen3-8B"], api_key="tml-mine")
def test_options(tinkex_service):
    names = tinkex_service.get_server_capabilities().supported_models
    assert [model.model_name for model in names] == ["Qwen/Qwen3-8B"]
    assert os.environ["TINKER_API_KEY"] == "tml-mine"

def test_the_environment_is_restored():
    assert os.environ["TINKER_API_KEY"] == "tml-real"
    assert "TINKER_BASE_URL" not in os.environ
"""
    )
    assert run_pytest(tmp_path)[-1].startswith("4 passed")


def test_a_run_without_the_fixtures_imports_nothing_else_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        """
import sys

def test_modules():
    loaded = {name for name in sys.modules if name.startswith("tinkex")}
    assert loaded == {
        "tinkex",
        "tinkex._runtime",
        "tinkex._runtime.late_import",
        "tinkex._version",
        "tinkex.testing",
        "tinkex.testing.plugin",
    }
    assert not {"flask", "waitress", "numpy", "requests"} & set(sys.modules)
"""
    )
    assert run_pytest(tmp_path)[-1].startswith("1 passed")


def test_a_program_that_has_imported_tinkex_may_start_pytest(tmp_path: Path) -> None:
    """If tinkex is installed like this, pytest warns of plugins that are already imported."""
    installed = tmp_path / "tinkex-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tinkex\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[pytest11]\ntinkex = {PLUGIN}\n")
    (installed / "RECORD").write_text("tinkex/__init__.py,,\ntinkex/config.py,,\n")
    (tmp_path / "test_mine.py").write_text("def test_it(tinkex_service): pass\n")
    program = f"""
import sys, tinkex, pytest
options = ["-q", "-p", "no:cacheprovider", "-W", "error", "-c", {os.devnull!r}]
sys.exit(pytest.main([*options, {str(tmp_path / "test_mine.py")!r}]))
"""
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("PYTEST_DISABLE_PLUGIN_AUTOLOAD", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_passes() -> None:
    assert run_pytest(EXAMPLE)[-1].startswith("2 passed")


def test_the_page_quotes_the_example_and_the_faults() -> None:
    from tinkex.testing import faults

    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    example = (EXAMPLE / "test_rl_loop.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert any(block.strip() in example for block in blocks), "the page quotes no test"
    public = {
        name
        for name, value in vars(faults).items()
        if isinstance(value, type) and value.__module__ == faults.__name__
    }
    assert public == set(re.findall(r"^\| `([A-Z]\w+)\(", page, flags=re.MULTILINE))

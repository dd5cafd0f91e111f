"""tinkex in place of ``tinker``, for programs and libraries that import the official SDK."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from compat.programs import ROOT, source

from tinkex.local import LocalServer, load_engine

INSTALL = "import tinkex; tinkex.install_as_tinker()\n"


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in *cwd*, from which it can also import modules."""
    path = os.pathsep.join([str(ROOT), str(cwd)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check(code: str, tmp_path: Path) -> None:
    """Run *code* after install_as_tinker; an exception in it fails the test."""
    done = python("-c", INSTALL + code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def another_tinker(tmp_path: Path) -> Path:
    """A folder with a foreign package called "tinker"."""
    (tmp_path / "tinker.py").write_text("ServiceClient = 'another'\n")
    return tmp_path


def test_a_library_that_imports_tinker_gets_tinkex(another_tinker: Path) -> None:
    (another_tinker / "library.py").write_text("import tinker\nfrom tinker import types\n")
    check(
        "import library\nassert library.tinker is tinkex\nassert library.types is tinkex.types\n",
        another_tinker,
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import tinker.types as T; assert T is tinkex.types",
        "from tinker.types import TensorData",
        "from tinker.types.tensor_data import TensorData",
        "from tinker.types.loss_fn_type import LossFnType",
        "from tinker.types.image_chunk import ImageChunk",
        "from tinker.types.model_id import ModelID",
        "from tinker._exceptions import APIStatusError, RequestFailedError",
        "from tinker.lib.public_interfaces import APIFuture, ServiceClient",
        "from tinker.lib.public_interfaces.api_future import APIFuture",
        "from tinker.lib.public_interfaces.service_client import RetryConfig, ServiceClient",
        "from tinker.lib.retry_handler import RetryConfig",
        "import tinker.auth; assert tinker.auth is tinkex.auth",
    ],
)
def test_the_official_module_paths_lead_to_the_classes_of_tinkex(
    statement: str, tmp_path: Path
) -> None:
    check(
        f"{statement}\n"
        "for name in ('TensorData', 'ServiceClient', 'APIStatusError', 'RetryConfig'):\n"
        "    assert globals().get(name, getattr(tinkex, name)) is getattr(tinkex, name)\n",
        tmp_path,
    )


@pytest.mark.parametrize(
    "module", ["nope", "_client", "types.nope", "lib.nope", "lib.public_interfaces.nope"]
)
def test_a_module_without_a_counterpart_is_not_found(module: str, tmp_path: Path) -> None:
    check(
        "try:\n"
        f"    import tinker.{module}\n"
        "except ModuleNotFoundError as error:\n"
        f"    assert error.name == 'tinker.{module}', error.name\n"
        "else:\n"
        "    raise AssertionError('imported')\n",
        tmp_path,
    )


def test_no_module_is_imported_a_second_time_under_the_other_name(tmp_path: Path) -> None:
    check(
        "import sys, tinker.errors, tinker.types.tensor_data, tinker.futures\n"
        "for name, module in list(sys.modules.items()):\n"
        "    assert not getattr(module, '__name__', '').startswith('tinker.'), name\n"
        "assert tinkex.types.tensor_data.__spec__.name == 'tinkex.types.tensor_data'\n"
        "assert tinker.errors.TinkexError is tinkex.TinkexError\n",
        tmp_path,
    )


def test_installing_twice_is_the_same_as_installing_once(tmp_path: Path) -> None:
    check("before = list(__import__('sys').meta_path)\n" + INSTALL + "import sys\n"
          "assert sys.meta_path == before\n", tmp_path)  # fmt: skip


def test_installing_is_refused_if_another_tinker_is_already_imported(another_tinker: Path) -> None:
    code = (
        "import tinker, tinkex\n"
        "try:\n"
        "    tinkex.install_as_tinker()\n"
        "except tinkex.ConfigError as error:\n"
        "    assert 'already imported' in str(error) and 'tinker.py' in str(error), error\n"
        "    assert tinker.ServiceClient == 'another'\n"
        "    import sys; assert sys.modules['tinker'] is tinker\n"
        "else:\n"
        "    raise AssertionError('installed')\n"
    )
    done = python("-c", code, cwd=another_tinker)
    assert (done.returncode, done.stderr) == (0, "")


PROGRAM = """
import helper, json, sys, tinker
print(json.dumps([__name__, tinker.__name__, helper.tinker.__name__, sys.argv[1:], __file__]))
sys.exit(3)
"""


@pytest.mark.parametrize("as_module", [False, True], ids=["a file", "a module"])
def test_a_program_runs_as_it_would_by_itself(as_module: bool, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "helper.py").write_text("import tinker\n")  # next to the program
    arguments = ["program.py", "--steps", "-m", "7"]
    if as_module:
        done = python("-m", "tinkex.as_tinker", "-m", "program", *arguments[1:], cwd=folder)
    else:
        done = python(
            "-m", "tinkex.as_tinker", "elsewhere/program.py", *arguments[1:], cwd=tmp_path
        )
    assert (done.returncode, done.stderr) == (3, "")
    name, tinker, helper, argv, file = json.loads(done.stdout)
    assert (name, tinker, helper) == ("__main__", "tinkex", "tinkex")
    assert argv == ["--steps", "-m", "7"]
    assert Path(tmp_path, file).resolve() == (folder / "program.py").resolve()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: program"),
        (["missing.py"], 1, "missing.py"),
        (["-m", "tinkex_no_such_module"], 1, "No module named tinkex_no_such_module"),
    ],
)
def test_a_missing_program_is_an_error(
    arguments: List[str], code: int, message: str, tmp_path: Path
) -> None:
    done = python("-m", "tinkex.as_tinker", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr


def test_a_script_for_the_official_sdk_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(source("supervised"))
    with LocalServer(load_engine("deterministic", "cpu")) as server:
        done = python(
            "-m",
            "tinkex.as_tinker",
            "script.py",
            cwd=tmp_path,
            SCRIPT_STYLE="newer",
            TINKER_BASE_URL=server.url,
            TINKER_API_KEY="tml-local",
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["base_model"] == "deterministic"


def test_the_official_path_of_the_clients_exists_in_tinkex_too(tmp_path: Path) -> None:
    done = python(
        "-c",
        "import tinkex\n"
        "from tinkex.lib.public_interfaces import APIFuture\n"
        "assert APIFuture is tinkex.APIFuture\n",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")

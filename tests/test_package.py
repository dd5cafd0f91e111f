"""The package as users see it: its names, its version, the cost of importing it."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.resources
import inspect
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tinkex
import tinkex.types

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "flask", "waitress", "rich", "asyncio", "google.protobuf")


def modules_after(statement: str) -> set:
    script = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import tinkex",
        "import tinkex.types",
        "import tinkex.data",
        "import tinkex.errors",
        "import tinkex.local.engines.engine",
    ],
)
def test_importing_tinkex_imports_no_heavy_library(statement):
    assert modules_after(statement) & set(HEAVY) == set()


def test_a_client_needs_no_numpy_or_protobuf_until_there_are_tokens():
    loaded = modules_after("import tinkex; tinkex.ServiceClient")
    unused = {"numpy", "google.protobuf", "dataclasses_json", "tinkex.clients.rest"}
    assert loaded & (unused | {"tinkex.clients.training", "tinkex._sessions.telemetry"}) == set()
    prompt = "import tinkex; prompt = tinkex.ModelInput.from_ints([1]); prompt.to_json()"
    assert "numpy" not in modules_after(prompt)
    assert "numpy" in modules_after(f"{prompt}; prompt.to_numpy()")


def test_importing_starts_no_thread():
    script = "import threading, tinkex, tinkex.types; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.stdout.strip() == b"1"


@pytest.mark.parametrize("module", [tinkex, tinkex.types], ids=lambda m: m.__name__)
def test_every_public_name_exists_and_is_documented(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) or inspect.isroutine(value):
            assert value.__doc__, f"{module.__name__}.{name} has no docstring"


def test_the_main_clients_are_reachable_from_the_top():
    assert {
        "ServiceClient",
        "TrainingClient",
        "SamplingClient",
        "RestClient",
        "APIFuture",
        "Config",
        "TinkexError",
        "types",
        "__version__",
    } <= set(tinkex.__all__)


def test_every_error_is_exported():
    import tinkex.errors

    ours = {
        name
        for name, value in vars(tinkex.errors).items()
        if isinstance(value, type) and issubclass(value, tinkex.errors.TinkexError)
    }
    assert ours <= set(dir(tinkex))


def test_star_import_works():
    namespace: dict = {}
    exec("from tinkex import *", namespace)
    assert namespace["ServiceClient"] is tinkex.ServiceClient


def test_the_version_is_that_of_the_metadata():
    try:
        installed = importlib.metadata.version("tinkex")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tinkex is not installed; the tests run from its source tree")
    assert tinkex.__version__ == installed


#: Files of use only in the source tree.
NOT_SHIPPED = {"regenerate.sh"}
DATA_FILES = [
    "__init__.pyi",
    "local/page/index.html",
    "local/page/page.js",
    "types/__init__.pyi",
    "py.typed",
    "wire/tinker_public.proto",
]


@pytest.mark.parametrize("name", DATA_FILES)
def test_data_files_are_shipped(name):
    assert (importlib.resources.files("tinkex") / name).is_file()


def test_every_file_that_is_not_python_is_declared_as_package_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]
    undeclared = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tinkex").rglob("*")
        if path.suffix not in (".py", ".pyc") and path.is_file() and path.name not in NOT_SHIPPED
        for package in [".".join(path.relative_to(ROOT).parts[:-1])]
        if not any(path.match(one) for one in patterns.get(package, "").split(", "))
    ]
    assert undeclared == []


def test_the_package_works_from_a_zip_file(tmp_path):
    package = Path(tinkex.__file__).parent
    archive = tmp_path / "tinkex.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in package.rglob("*"):
            if path.suffix in (".py", ".pyi"):
                file.write(path, path.relative_to(package.parent))
    script = (
        "import tinkex, tinkex.types\n"
        "assert '.zip' in tinkex.__file__\n"
        "for module in (tinkex, tinkex.types):\n"
        "    for name in module.__all__: getattr(module, name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(archive)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_name_is_an_attribute_error():
    for module in (tinkex, tinkex.types):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute"):
            module.NoSuchName  # noqa: B018


def test_dir_lists_the_public_names():
    assert {"ServiceClient", "auth", "types", "__version__"} <= set(dir(tinkex))
    assert "TrainingBillingEvent" in dir(tinkex.types)


def test_an_alias_is_the_same_object():
    assert tinkex.types.TrainingBillingEvent is tinkex.types.TrainingUsage


def test_values_pickle_by_the_module_that_defines_them():
    params = tinkex.SamplingParams(max_tokens=3)
    assert pickle.loads(pickle.dumps(params)) == params
    assert pickle.loads(pickle.dumps(tinkex.AdamParams)) is tinkex.AdamParams

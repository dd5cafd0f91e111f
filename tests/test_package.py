"""The package as a user meets it: its names, its version, what importing it costs."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import pytest

import tinkex
import tinkex.types

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
        "import tinkex.errors",
        "import tinkex.local.engines.engine",
    ],
)
def test_importing_brings_nothing_heavy(statement):
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


def test_the_spine_is_reachable_from_the_top():
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


def test_the_version_is_the_metadatas():
    try:
        installed = importlib.metadata.version("tinkex")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tinkex is not installed; the tests run from its source tree")
    assert tinkex.__version__ == installed


@pytest.mark.parametrize("name", ["py.typed", "wire/tinker_public.proto"])
def test_data_files_are_shipped(name):
    assert (importlib.resources.files("tinkex") / name).is_file()

"""The package's layers, and the rules every module keeps.  Reads the source; imports nothing.

A folder, or a module at the top, is a layer; docs/architecture.md describes them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple, Union

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tinkex"

#: From the bottom up: each imports only itself and earlier ones, late imports included.
LAYERS = [
    "_version",
    "errors",
    "_runtime",
    "types",
    "wire",
    "data",
    "loggers",
    "plot",
    "credentials",
    "retry",
    "usage",
    "config",
    "metrics",
    "_transport",
    "_api",
    "futures",
    "_results",
    "_sessions",
    "auth",
    "_sampling",
    "_training",
    "_downloads",
    "clients",
    "runs",
    "recipes",
    "lib",
    "as_tinker",
    "local",
    "export",
    "testing",
    "cli",
    "__main__",
]

#: The layers inside the embedded server, from the bottom up, under the same rule.
LOCAL_LAYERS = [
    "errors",
    "json_text",
    "proto_bounds",
    "fields",
    "settings",
    "engines",
    "losses",
    "state",
    "scheduling",
    "backend",
    "http",
    "routes",
    "openai",
    "page",
    "app",
    "server",
]

#: The layers that the embedded server shares with the client; the rest can be tested against each
#: other.
VALUES = {"_version", "errors", "_runtime", "types", "wire", "local"}

#: Deliberate upward imports, and their reasons.
EXCEPTIONS = {
    ("tinkex.clients.service", "tinkex.local"): "ServiceClient.local() starts the embedded server",
    ("tinkex.clients.service", "tinkex.runs"): "ServiceClient.open_run() opens a run folder",
}

#: The only module with coroutines, for programs that have an event loop of their own.
AWAITING = "tinkex._runtime.awaiting"

#: Imported where they are used, never at the top of a module that everyone imports.
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "gguf",
    "tokenizers",
    "flask",
    "werkzeug",
    "waitress",
    "zstandard",
    "pyrage",
    "matplotlib",
    "tensorboardX",
    "tensorboard",
    "wandb",
    "trackio",
    "opentelemetry",
    "rich",
    "click",
    "huggingface_hub",
}
#: Modules that are themselves imported late may import these libraries at module level.
HEAVY_ALLOWED = {
    "tinkex.local.app": {"flask", "werkzeug"},
    "tinkex.local.http": {"flask", "werkzeug", "waitress"},
    "tinkex.local.openai": {"flask", "werkzeug"},
    "tinkex.local.page": {"flask"},
    "tinkex.local.routes": {"flask", "werkzeug"},
    "tinkex.local.server": {"flask", "werkzeug", "waitress"},
    "tinkex.local.engines.torch_engine": {"torch", "transformers", "peft", "safetensors", "gguf"},
    "tinkex.cli": {"click", "rich"},
}


class Import(NamedTuple):
    """One imported name: its line, and whether importing the module executes the import."""

    module: str
    target: str
    line: int
    at_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES: Dict[str, ast.Module] = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.name.endswith("_pb2.py")
}


def layer(module: str) -> str:
    """Return the folder or module at the top that *module* belongs to; "" for the package."""
    return module.partition(".")[2].partition(".")[0]


def local_layer(module: str) -> str:
    """Return the layer of the embedded server that *module* belongs to; "" for any other."""
    prefix, _, inside = module.partition("tinkex.local.")
    return "" if prefix else inside.partition(".")[0]


def rank(module: str) -> int:
    """Return the place of *module* in LAYERS; the package itself re-exports the clients."""
    return LAYERS.index(layer(module) or "clients")


def imports(module: str, tree: ast.Module) -> Iterator[Import]:
    """Yield the imports in *tree*, including those inside functions and behind TYPE_CHECKING."""
    is_package = (PACKAGE.parent / module.replace(".", "/")).is_dir()
    for node, at_import in import_statements(tree, True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:kept], *([node.module] if node.module else [])])
            # "from tinkex import errors" imports tinkex.errors, if there is such a module.
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in SOURCES else base for name in names]
        for target in targets:
            yield Import(module, target, node.lineno, at_import)


def import_statements(
    node: ast.AST, at_import: bool
) -> Iterator[Tuple[Union[ast.Import, ast.ImportFrom], bool]]:
    """Yield the import statements inside *node*, and whether importing the module executes them."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, at_import
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ):
        at_import = False
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):  # they hold statements
        inside = getattr(node, field, None)
        for child in inside if isinstance(inside, list) else []:
            yield from import_statements(child, at_import)


ALL_IMPORTS: List[Import] = [
    found for module, tree in SOURCES.items() for found in imports(module, tree)
]
OWN_IMPORTS = [i for i in ALL_IMPORTS if i.target.split(".")[0] == "tinkex"]


def excused(found: Import) -> bool:
    return any(
        found.module == module and found.target.startswith(target) for module, target in EXCEPTIONS
    )


def test_the_layers_are_the_folders_and_modules_at_the_top():
    assert {layer(module) for module in SOURCES} - {""} == set(LAYERS)


def test_imports_go_downward():
    upward = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in OWN_IMPORTS
        if rank(i.target) > rank(i.module) and not excused(i)
    ]
    assert upward == []


def test_the_layers_of_the_server_are_the_folders_and_modules_in_its_folder():
    assert {local_layer(module) for module in SOURCES} - {""} == set(LOCAL_LAYERS)


def test_imports_inside_the_server_go_downward():
    upward = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in OWN_IMPORTS
        if local_layer(i.module)
        and local_layer(i.target)
        and LOCAL_LAYERS.index(local_layer(i.target)) > LOCAL_LAYERS.index(local_layer(i.module))
    ]
    assert upward == []


def test_every_exception_is_still_needed_and_is_late():
    for module, target in EXCEPTIONS:
        matching = [i for i in OWN_IMPORTS if i.module == module and i.target.startswith(target)]
        assert matching, f"{module} no longer imports {target}: drop the exception"
        assert not any(i.at_import for i in matching), f"{module} imports {target} at module level"


def test_the_server_shares_only_values_with_the_client():
    reach = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in OWN_IMPORTS
        if layer(i.module) == "local" and layer(i.target) not in VALUES
    ]
    assert reach == []


def test_no_import_cycle():
    graph: Dict[str, Set[str]] = {module: set() for module in SOURCES}
    for found in OWN_IMPORTS:
        if found.at_import and found.target != found.module:
            graph[found.module].add(found.target)
    done: Set[str] = set()

    def visit(module: str, path: List[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, [*path, module])
        done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {AWAITING}))
def test_only_one_module_uses_asyncio(module):
    tree = SOURCES[module]
    coroutines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith))
    ]
    assert coroutines == []
    targets = {i.target.split(".")[0] for i in ALL_IMPORTS if i.module == module}
    assert not targets & {"asyncio", "anyio", "trio", "httpx", "aiohttp"}


def test_asyncio_is_imported_only_when_something_is_awaited():
    found = [i for i in ALL_IMPORTS if i.module == AWAITING and i.target == "asyncio"]
    assert found
    assert not any(i.at_import for i in found)


def test_heavy_libraries_are_imported_late():
    def allowed(module: str) -> Set[str]:
        return {
            name
            for prefix, names in HEAVY_ALLOWED.items()
            if module == prefix or module.startswith(prefix + ".")
            for name in names
        }

    early = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in ALL_IMPORTS
        if i.at_import
        and i.target.split(".")[0] in HEAVY
        and i.target.split(".")[0] not in allowed(i.module)
    ]
    assert early == []


def test_no_test_sleeps():
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in sorted(Path(__file__).parent.rglob("test_*.py"))
    }
    sleeps = [
        f"{path.name}:{node.lineno}"
        for path, text in texts.items()
        if "sleep" in text  # parsing every file would take seconds
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]
    assert sleeps == [], "wait for an Event that the code really sets"


def test_no_code_waits_on_a_simple_queue_with_a_timeout():
    # Before Python 3.13 such a wait may last forever; see Inbox.
    users = {module for module in SOURCES if "SimpleQueue(" in ast.unparse(SOURCES[module])}
    assert users == {"tinkex._runtime.worker_pool"}


def test_every_module_says_what_it_is_for():
    silent = [module for module, tree in SOURCES.items() if not ast.get_docstring(tree)]
    assert silent == []


def thread_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that *tree* gives to threads and pools of threads."""
    for node in ast.walk(tree):
        found: List[ast.expr] = []
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("WorkerPool", "AdaptivePool", "make"):
                found = node.args[:2]
            elif called == "Thread":
                found = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(".name"):
            found = [node.value]
        for value in found:
            if isinstance(value, ast.JoinedStr):
                value = value.values[0]
            if isinstance(value, ast.Constant) and str(value.value).startswith("tinkex-"):
                yield str(value.value).rstrip("-")


def test_the_documentation_names_every_thread():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Threads")[2].partition("## ")[0]
    documented = {
        re.sub(r"-(i|<run>)$", "", name) for name in re.findall(r"tinkex-[a-z-]+(?:<run>)?", table)
    }
    started = {name for tree in SOURCES.values() for name in thread_names(tree)}
    assert len(started) >= 15
    assert documented == started

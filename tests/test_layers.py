"""The package's layers, and the rules every module keeps.  Reads the source; imports nothing.

The table is the one in docs/architecture.md: a module may import its own layer and those below.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tinkex"

#: From the bottom up; "room: modules" are those of a folder.
LAYERS = {
    "leaves": [
        "_version errors clock lifecycle single_flight late_import lazy_numpy descriptors numeric",
    ],
    "values": [
        "config types wire retry retry_config telemetry_events usage",
        "http: request redaction redirects gateways base_url",
        "keys: credentials",
        "sampling: sample_checks",
        "training: batch_checks likely_mistakes",
    ],
    "machinery": [
        "transport server_flags server_memory metrics",
        "http: channel private_channel framing content_coding connection_errors",
        "http: deprecations billing",
        "keys: credential_command tokens",
        "flow: rate_limiter backpressure pressure scheduler crew",
        "transfer: checkpoint_files compression downloads download_folder part_file extraction",
    ],
    "protocol": [
        "api auth dialect connection session session_manager poller futures telemetry",
        "sessions: session_table beat_queue session_link session_core heartbeat",
        "polling: poll_rules poll_loop pause_notices cancel_queue",
        "polling: batch_ledger batch_patience batch_watch batch_poll batch_poller",
        "sampling: sample_gate sample_work sampler sample_call",
        "training: training_run numbered_lane training_pass split_batch gradient new_run",
    ],
    "clients": [
        "service_client training_client sampling_client rest_client admin_client",
        "child_client lookup_client checkpoints tokenizers",
        "sampling: sample_stream sampler_handle",
        "training: loss_graph custom_loss custom_pass loss_registry run_factory pipeline",
        "training: run_checkpoints",
        "transfer: hub",
    ],
    "edges": ["__main__ cli local"],
}

#: Upward imports that are meant, and why.
EXCEPTIONS = {
    ("tinkex.service_client", "tinkex.local"): "ServiceClient.local() starts the embedded server",
}

#: Imported where it is used, never with a module that everyone imports.
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
    "matplotlib",
    "rich",
    "click",
    "huggingface_hub",
}
#: These may import at module level what they are there for, being imported late themselves.
HEAVY_ALLOWED = {
    "tinkex.local.app": {"flask", "werkzeug"},
    "tinkex.local.http": {"flask", "werkzeug"},
    "tinkex.local.http_errors": {"waitress"},
    "tinkex.local.http_threads": {"waitress"},
    "tinkex.local.profiles": {"werkzeug"},
    "tinkex.local.routes": {"flask", "werkzeug"},
    "tinkex.local.server": {"flask", "werkzeug", "waitress"},
    "tinkex.local.torch_engine": {"torch", "transformers", "peft", "safetensors", "gguf"},
    "tinkex.cli": {"click", "rich"},
}


class Import(NamedTuple):
    """One imported name: where it stands, and whether importing the module runs it."""

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
LAYER_NAMES = list(LAYERS)


def modules_of(line: str) -> List[str]:
    room, _, names = line.rpartition(": ")
    return [".".join(filter(None, ("tinkex", room, name))) for name in names.split()]


LAYER_OF = {
    module: number
    for number, lines in enumerate(LAYERS.values())
    for line in lines
    for module in modules_of(line)
}
#: Folders whose modules are of several layers.
ROOMS = {module.rpartition(".")[0] for module in LAYER_OF} - {"tinkex"}


def imports(module: str, tree: ast.Module) -> Iterator[Import]:
    """Yield what *tree* imports, inside functions and behind TYPE_CHECKING too."""
    is_package = (PACKAGE.parent / module.replace(".", "/")).is_dir()
    parents: Dict[ast.AST, ast.AST] = {
        child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)
    }
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        at_import = runs_at_import(node, parents)
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


def runs_at_import(node: ast.AST, parents: Dict[ast.AST, ast.AST]) -> bool:
    while node in parents:
        node = parents[node]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return False
    return True


def layer(module: str) -> int:
    """Return the layer of *module*; the package itself re-exports the clients."""
    if module == "tinkex":
        return LAYER_OF["tinkex.service_client"]
    if module in ROOMS:
        return 0  # a docstring
    return LAYER_OF[known(module)]


def known(module: str) -> str:
    """What of *module* the table should know: a whole package, or one module of a room."""
    parts = module.split(".")
    return ".".join(parts[: 3 if ".".join(parts[:2]) in ROOMS else 2])


ALL_IMPORTS: List[Import] = [
    found for module, tree in SOURCES.items() for found in imports(module, tree)
]
OWN_IMPORTS = [i for i in ALL_IMPORTS if i.target.split(".")[0] == "tinkex"]


def excused(found: Import) -> bool:
    return any(
        found.module == module and found.target.startswith(target) for module, target in EXCEPTIONS
    )


def test_every_module_has_a_layer():
    unknown = {
        known(module)
        for module in SOURCES
        if module not in ("tinkex", *ROOMS) and known(module) not in LAYER_OF
    }
    assert not unknown, "give them a layer in this file and in docs/architecture.md"
    gone = set(LAYER_OF) - set(SOURCES)
    assert not gone, "take them out of this file and of docs/architecture.md"


def test_a_room_has_nothing_but_its_modules():
    assert all(len(SOURCES[room].body) == 1 for room in ROOMS), "a docstring"


def test_imports_go_downward():
    upward = [
        f"{i.module}:{i.line} ({LAYER_NAMES[layer(i.module)]}) imports {i.target} "
        f"({LAYER_NAMES[layer(i.target)]})"
        for i in OWN_IMPORTS
        if layer(i.target) > layer(i.module) and not excused(i)
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
        if i.module.startswith("tinkex.local")
        and not i.target.startswith("tinkex.local")
        and layer(i.target) > 1
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


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_asyncio(module):
    tree = SOURCES[module]
    coroutines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith))
    ]
    assert coroutines == []
    targets = {i.target.split(".")[0] for i in ALL_IMPORTS if i.module == module}
    assert not targets & {"asyncio", "anyio", "trio", "httpx", "aiohttp"}


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
    sleeps = [
        f"{path.name}:{node.lineno}"
        for path in sorted(Path(__file__).parent.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]
    assert sleeps == [], "wait for an Event that the code really sets"


def test_every_module_says_what_it_is_for():
    silent = [module for module, tree in SOURCES.items() if not ast.get_docstring(tree)]
    assert silent == []

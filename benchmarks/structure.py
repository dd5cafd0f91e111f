"""The structure of the package, in figures: ``python benchmarks/structure.py [--no-calls]``.

Counts, for the source tree beside this file: entries at the top of the package, circular imports,
the longest chain of imports, lines, comments, lambdas and closures.  Then traces one
``forward_backward([datum]).result()`` and one ``sample(...).result()`` against an embedded server
in a separate process, and counts the files, classes, functions and closures of tinkex that ran.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Callable, Dict, Iterator, List, Mapping, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tinkex"
Graph = Mapping[str, Set[str]]


def sources() -> Dict[str, Path]:
    """Map each module's dotted name (without "tinkex") to its file, without generated code."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if not path.name.endswith("_pb2.py"):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def typing_only(tree: ast.Module) -> Set[ast.AST]:
    """Return the nodes under ``if TYPE_CHECKING``."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(tree: ast.Module, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that *tree* imports, including late imports."""
    left_out = typing_only(tree)
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinkex":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in modules else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("tinkex."):
                    yield alias.name.partition(".")[2]


def circles(graph: Graph) -> List[List[str]]:
    """Return the groups of nodes that reach each other (Tarjan's strongly connected components)."""
    index: Dict[str, int] = {}
    low: Dict[str, int] = {}
    stack: List[str] = []
    found: List[List[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def longest_chain(graph: Graph) -> int:
    """Return the number of modules on the longest chain; a circle counts as one step."""
    group_of = {node: f"circle of {group[0]}" for group in circles(graph) for node in group}
    merged: Dict[str, Set[str]] = defaultdict(set)
    for node, targets in graph.items():
        merged[group_of.get(node, node)] |= {group_of.get(target, target) for target in targets}
    depth: Dict[str, int] = {}

    def measure(node: str) -> int:
        if node not in depth:
            below = [measure(target) for target in merged.get(node, ()) if target != node]
            depth[node] = 1 + max(below, default=0)
        return depth[node]

    return max(map(measure, list(merged)))


def entry(module: str) -> str:
    """Return the entry at the top of the package that *module* belongs to."""
    return module.split(".")[0]


def closures(tree: ast.Module) -> int:
    """Count lambdas, and functions within functions."""
    return sum(
        isinstance(inner, (ast.Lambda, ast.FunctionDef)) and inner is not outer
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for inner in ast.walk(outer)
    )


def comment_lines(text: str) -> int:
    """Count lines that hold only a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and t.line.strip().startswith("#") for t in tokens)


def static_figures() -> Dict[str, Any]:
    """Return the figures that need no running code."""
    modules = sources()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    graph = {name: set(imports(tree, modules)) - {name, ""} for name, tree in trees.items() if name}
    tops: Dict[str, Set[str]] = defaultdict(set)
    for name, targets in graph.items():
        tops[entry(name)] |= {entry(target) for target in targets} - {entry(name)}
    for name in ("clients", "service_client"):  # ServiceClient.local(), a documented convenience
        tops.get(name, set()).discard("local")
    text = {name: path.read_text(encoding="utf-8") for name, path in modules.items()}
    lines = sum(len(value.splitlines()) for value in text.values())
    client = [name for name in text if not name.startswith(("local", "cli"))]
    client_lines = sum(len(text[name].splitlines()) for name in client)
    nested = sum(closures(trees[name]) for name in client)
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    return {
        "entries at the top of tinkex/": len(names),
        "entries in a circle": sum(map(len, circles(tops))),
        "circles of modules": len(circles(graph)),
        "longest chain of imports": longest_chain(graph),
        "modules / lines": f"{len(modules)} / {lines}",
        "lambdas and closures per 1000 lines (client)": round(1000 * nested / client_lines, 1),
        "comments per 1000 lines": round(1000 * sum(map(comment_lines, text.values())) / lines, 1),
    }


class Trace:
    """While active, collects the tinkex code that runs in any thread of this process."""

    def __init__(self) -> None:
        self.codes: Set[Tuple[CodeType, str]] = set()

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            owner = frame.f_locals.get("self")
            self.codes.add((code, type(owner).__name__ if owner is not None else ""))

    def __enter__(self) -> Trace:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def __str__(self) -> str:
        codes = {code for code, _ in self.codes if not code.co_name.startswith("<")}
        files = {code.co_filename for code in codes}
        owners = {owner for _, owner in self.codes if owner}
        inner = [code for code in codes if code.co_flags & 0x10]  # CO_NESTED
        return f"{len(files)} / {len(owners)} / {len(codes)} / {len(inner)}"


def traced(act: Callable[[], Any]) -> str:
    """Return "files / classes / functions / closures" of one call."""
    with Trace() as trace:
        act()
    return str(trace)


def call_figures() -> Dict[str, str]:
    """Trace the first training pass and the first sample, in all the threads that they start."""
    import tinkex
    from tinkex import types
    from tinkex._sessions.process_status import OFF_VARIABLE

    os.environ[OFF_VARIABLE] = "1"  # its thread starts during the calls, but is not part of them

    folder = tempfile.TemporaryDirectory()  # the default one may be in use by another server
    serve = [sys.executable, "-m", "tinkex", "serve", "--model", "deterministic", "--port", "0"]
    serve += ["--data-dir", folder.name]
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if "TINKER_BASE_URL=" in line)
        url = line.partition("TINKER_BASE_URL=")[2].split(";")[0].strip()
        tokens = types.ModelInput.from_ints([1, 2, 3])
        datum = types.Datum(tokens, {"target_tokens": [2, 3, 4]})
        params = types.SamplingParams(max_tokens=4)
        with tinkex.ServiceClient(base_url=url) as service:
            trainer = service.create_lora_training_client("deterministic")
            sampler = service.create_sampling_client(base_model="deterministic")

            def train() -> None:
                trainer.forward_backward([datum], "cross_entropy").result()

            def sample() -> None:
                sampler.sample(tokens, 1, params).result()

            return {
                f"{name} (files / classes / functions / closures)": traced(act)
                for name, act in (("forward_backward", train), ("sample", sample))
            }
    finally:
        process.terminate()
        process.wait(30)
        folder.cleanup()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-calls", action="store_true", help="skip the traced calls")
    options = parser.parse_args()
    figures = static_figures()
    if not options.no_calls:
        figures.update(call_figures())
    for name, value in figures.items():
        print(f"{name:60} {value}")


if __name__ == "__main__":
    main()

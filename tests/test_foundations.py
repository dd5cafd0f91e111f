"""The undocumented parts of other libraries that tinkex uses.

Each entry names the library, the name, and the module that relies on it.  If a new release removes
a name, the failure shows up here rather than in the middle of a training run.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple

import pytest

import tinkex


class Use(NamedTuple):
    """A name that we use, as ``module:attribute.path``, and the module that uses it."""

    name: str
    by: str


ATTRIBUTES = [
    # waitress documents its command line and serve() only; its server is meant to be subclassed.
    *(
        Use(f"waitress.{name}", "local/http/serving.py")
        for name in (
            "wasyncore:loop",
            "wasyncore:close_all",
            "adjustments:Adjustments",
            "server:TcpWSGIServer.accept",
            "server:TcpWSGIServer.handle_accept",
            "server:TcpWSGIServer.maintenance",
            "server:TcpWSGIServer.readable",
            "server:TcpWSGIServer.pull_trigger",
            "server:TcpWSGIServer.channel_class",
            "channel:HTTPChannel.parser_class",
            "channel:HTTPChannel.task_class",
            "channel:HTTPChannel.error_task_class",
            "channel:HTTPChannel.handle_write",
            "channel:HTTPChannel.total_outbufs_len",
            "parser:HTTPRequestParser.parse_header",
            "parser:ParsingError",
            "task:WSGITask.service",
            "task:ErrorTask.execute",
            "task:ErrorTask.set_close_on_finish",
        )
    ),
    Use("waitress.task:ThreadedTaskDispatcher.add_task", "local/http/threads.py"),
    Use("waitress.task:ThreadedTaskDispatcher.set_thread_count", "local/http/threads.py"),
    Use("waitress.task:ThreadedTaskDispatcher.shutdown", "local/http/threads.py"),
    Use("waitress.channel:ClientDisconnected", "testing/exchange.py"),
    Use("waitress.channel:HTTPChannel.check_client_disconnected", "testing/exchange.py"),
    # Optional: without it the server works, but starts more slowly.
    Use("werkzeug.routing:Rule._compile_builder", "local/app.py"),
    # requests and urllib3: we list their connections, so that we can abort them.
    Use("requests:Session.resolve_redirects", "_transport/channel.py"),
    Use("requests.adapters:HTTPAdapter.init_poolmanager", "_transport/channel.py"),
    Use("requests.adapters:HTTPAdapter.proxy_manager_for", "_transport/channel.py"),
    Use("urllib3.connection:HTTPConnection.connect", "_transport/channel.py"),
    Use("urllib3.connection:HTTPConnection.default_socket_options", "_transport/channel.py"),
    Use("urllib3.connectionpool:HTTPConnectionPool.ConnectionCls", "_transport/channel.py"),
    Use("urllib3.response:HTTPResponse.CONTENT_DECODERS", "_transport/channel.py"),
    Use("urllib3.util.wait:wait_for_read", "_transport/fast_connection.py"),
    # dataclasses-json: we read encoders and decoders from the fields' metadata.
    Use("dataclasses_json:DataClassJsonMixin.from_dict", "types/_wire.py"),
    Use("dataclasses_json:config", "types/_wire.py"),
    Use("google.protobuf.internal.builder:BuildTopDescriptorsAndMessages", "wire/*_pb2.py"),
]
ENGINE_ATTRIBUTES = [
    Use("torch:_foreach_mul_", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_lerp_", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_addcmul_", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_addcdiv_", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_sqrt", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_div_", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_add_", "engines/torch_engine/adam.py"),
    Use("torch:_foreach_norm", "engines/torch_engine/adam.py"),
    Use("torch.fx.node:_get_qualified_name", "_training/loss_tracing.py"),
    Use("transformers.pytorch_utils:Conv1D", "engines/torch_engine/adapters.py"),
    Use("transformers.cache_utils:DynamicLayer.update", "engines/torch_engine/decoding.py"),
    Use("transformers.cache_utils:DynamicLayer.get_seq_length", "engines/torch_engine/decoding.py"),
    Use("peft.tuners.lora:LoraLayer.set_adapter", "engines/torch_engine/adapters.py"),
    Use("peft.tuners.lora:LoraModel.delete_adapter", "engines/torch_engine/adapters.py"),
]


def resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("use", ATTRIBUTES, ids=lambda use: use.name)
def test_the_names_that_the_client_uses_exist(use: Use) -> None:
    assert resolve(use.name) is not None, f"used by tinkex/{use.by}"


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("use", ENGINE_ATTRIBUTES, ids=lambda use: use.name)
def test_the_names_that_the_engine_uses_exist(use: Use) -> None:
    assert resolve(use.name) is not None, f"used by tinkex/local/{use.by}"


def test_waitress_accepts_our_dispatcher_and_socket_map() -> None:
    from waitress.adjustments import Adjustments
    from waitress.server import TcpWSGIServer

    parameters = inspect.signature(TcpWSGIServer.__init__).parameters
    assert {"map", "_sock", "dispatcher", "adj", "bind_socket", "sockinfo"} <= parameters.keys()
    options = {name for name, _ in Adjustments._params}
    assert {"ident", "connection_limit", "asyncore_use_poll", "recv_bytes"} <= options


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_a_cache_can_be_made_of_our_layers() -> None:
    from transformers.cache_utils import Cache, DynamicCache

    assert "layers" in inspect.signature(Cache.__init__).parameters
    assert DynamicCache().layers == []


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel", "GPT2LMHeadModel"])
def test_the_forward_method_of_a_model_has_a_parameter_for_the_cache(architecture: str) -> None:
    import transformers

    parameters = inspect.signature(getattr(transformers, architecture).forward).parameters
    assert {"cache", "past_key_values"} & parameters.keys()


def declared() -> List[str]:
    """Return what setup.cfg says must be installed, extras included, without versions."""
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    extras = settings["options.extras_require"].values()
    lines = "\n".join([settings["options"]["install_requires"], *extras]).split()
    names = [re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") for line in lines]
    return sorted(set(names))


#: Packages whose modules have other names, and packages that a declared package documents as its
#: own.
PACKAGES = {"google": "protobuf", "werkzeug": "flask", "tokenizers": "transformers"}


def imported(file: Path) -> Iterator[str]:
    """Yield the top-level packages that *file* imports, except under TYPE_CHECKING."""
    nodes: List[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes.extend(node.orelse)
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is newer")
def test_everything_imported_is_declared() -> None:
    allowed = {*declared(), *sys.stdlib_module_names, "tinkex"}
    undeclared = {
        f"{file.name}: {name}"
        for file in Path(tinkex.__file__).parent.rglob("*.py")
        for name in imported(file)
        if name not in allowed and PACKAGES.get(name, name.replace("_", "-")) not in allowed
    }
    assert undeclared == set()

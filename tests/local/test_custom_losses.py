"""Custom losses computed by the server: the client's results, and no other code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
import pytest
from local.harness import Api, serving

from tinkex._training.loss_tracing import trace_loss
from tinkex.local.errors import HTTPError
from tinkex.local.losses import program as loss_graph
from tinkex.local.losses.program import read_program
from tinkex.local.settings import ClientFlags
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput
from tinkex.wire.proto_codec import PROTOBUF

torch = pytest.importorskip("torch")

SERVED = ClientFlags(custom_loss_server_side=True)


@pytest.fixture
def losses(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path, flags=SERVED) as running:
        yield running


def traced(fn: Callable[..., Any], **ranks: int) -> Dict[str, Any]:
    graph = trace_loss(fn, ranks)
    inputs = [{"name": one.name, "rank": one.rank} for one in graph.inputs]
    body = {"name": graph.name, "inputs": inputs, "graph": graph.graph}
    return dict(json.loads(json.dumps(body)))


def reinforce(logprobs: Any, advantages: Any, weights: Any) -> Any:
    mask = (weights > 0).to(torch.float32)
    per_token = -logprobs * advantages * mask
    loss = per_token.sum() / mask.sum().clamp(min=1.0)
    return loss, {"custom/tokens:sum": mask.sum(), "custom/mean_lp:mean": logprobs.mean()}


def datums() -> List[Datum]:
    return [
        Datum(
            ModelInput.from_ints([n, 2, 3]),
            {
                "target_tokens": [2, 3, 4],
                "advantages": np.array([0.5, -1.0, n], np.float32),
                "weights": [1.0, 1.0, 0.0],
            },
        )
        for n in (1, 5)
    ]


def create(api: Api, session: str, body: Dict[str, Any], number: int = 0) -> str:
    made = api.post("create_custom_loss", session_id=session, custom_loss_seq_id=number, **body)
    result = api.result(made)
    assert result["type"] == "create_custom_loss"
    return str(result["loss_id"])


def submit(
    api: Api, model: str, seq_id: int, loss_id: str, data: Any, expect: int = 200, **how: Any
) -> Any:
    asked = ForwardBackwardRequest(model, seq_id, data, "custom", {"loss_id": loss_id}, **how)
    answer = api.client.post(
        "/api/v1/forward_backward",
        data=PROTOBUF.encode_forward_backward(asked),
        content_type=PROTOBUF.content_type,
    )
    assert answer.status_code == expect, answer.text
    return answer.get_json()


def plain_logprobs(api: Api, model: str, seq_id: int) -> List[Any]:
    data = [Datum(d.model_input, {"target_tokens": [2, 3, 4]}) for d in datums()]
    outputs = api.result(api.submit_pass(model, seq_id, data))["loss_fn_outputs"]
    return [torch.tensor(one["logprobs"]["data"]) for one in outputs]


def test_a_custom_loss_has_the_value_of_its_function(losses: Api) -> None:
    api, session = losses, losses.session()
    model = api.model(session)
    body = traced(reinforce, logprobs=1, advantages=1, weights=1)
    loss_id = create(api, session, body)
    expected = [
        reinforce(row, datum.loss_fn_inputs["advantages"].to_torch(), torch.tensor([1.0, 1.0, 0.0]))
        for row, datum in zip(plain_logprobs(api, model, 1), datums())
    ]
    metrics = api.result(submit(api, model, 2, loss_id, datums()))["metrics"]
    assert metrics["loss:sum"] == pytest.approx(sum(float(loss) for loss, _ in expected), rel=1e-5)
    assert metrics["custom/tokens:sum"] == 4.0
    means = [float(one["custom/mean_lp:mean"]) for _, one in expected]
    assert metrics["custom/mean_lp:mean"] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_the_gradient_of_a_custom_loss_is_passed_to_the_engine(
    losses: Api, monkeypatch: Any
) -> None:
    api, session = losses, losses.session()
    model = api.model(session)
    loss_id = create(api, session, traced(reinforce, logprobs=1, advantages=1, weights=1))
    engine = api.backend.engine
    passes: List[Any] = []
    original = engine.forward_backward

    def watch(model_id: str, data: Any, loss_fn: str, config: Any, *, forward_only: bool = False):
        passes.append(
            (loss_fn, forward_only, [d.loss_fn_inputs["weights"].to_numpy() for d in data])
        )
        return original(model_id, data, loss_fn, config, forward_only=forward_only)

    monkeypatch.setattr(engine, "forward_backward", watch)
    output = api.result(submit(api, model, 1, loss_id, datums()))
    assert [one[:2] for one in passes] == [("cross_entropy", True), ("cross_entropy", False)]
    # d loss / d logprobs = -advantages * mask / 2, and the weights are its negative.
    assert passes[1][2][0].tolist() == [0.25, -0.5, 0.0]
    assert passes[1][2][1].tolist() == [0.25, -0.5, 0.0]
    assert len(output["loss_fn_outputs"][0]["logprobs"]["data"]) == 3
    assert api.result(api.step(model, 2))["metrics"]["grad_norm:mean"] == 1.0
    passes.clear()
    api.result(submit(api, model, 3, loss_id, datums(), forward_only=True))
    assert [one[1] for one in passes] == [True]


def quadratic(logprobs: Any, logprob_targets: Any, scale: Any) -> Any:
    gap = torch.where(logprobs > logprob_targets, logprobs - logprob_targets, 0.0)
    ratio = torch.exp(torch.clamp(logprobs - logprob_targets, -5, float("inf")))
    rows = torch.stack([gap**2, ratio], dim=0)
    top = rows.max(dim=0)
    first = logprobs[..., 0:2].sum() + logprobs[-1] * logprobs.shape[0]
    loss = scale * (top.values.mean() + 2 * first) + torch.nn.functional.softplus(logprobs).sum()
    return loss, {"custom/top:sum": top.values.sum(), "custom/n:mean": logprobs.size(0)}


def test_graphs_of_many_kinds_of_nodes_are_computed(losses: Api) -> None:
    from tinkex.local.losses.evaluation import loss_of_datum
    from tinkex.types import TensorData

    program = read_program(traced(quadratic, logprobs=1, logprob_targets=1, scale=0))
    lp = np.array([-1.0, -2.0, -0.5], np.float32)
    targets, scale = np.array([-1.5, -1.0, -1.0], np.float32), np.array(3.0, np.float32)
    inputs = {
        "logprob_targets": TensorData.from_numpy(targets),
        "scale": TensorData.from_numpy(scale.reshape(1)),
    }
    loss, gradient, metrics = loss_of_datum(program, lp, inputs, backward=True)
    leaf = torch.tensor(lp, requires_grad=True)
    expected, numbers = quadratic(leaf, torch.tensor(targets), torch.tensor(scale))
    (slope,) = torch.autograd.grad(expected, leaf)
    assert loss == pytest.approx(float(expected.detach()))
    assert gradient == pytest.approx(slope.numpy())
    assert metrics["custom/top:sum"] == pytest.approx(float(numbers["custom/top:sum"].detach()))
    assert metrics["custom/n:mean"] == 3.0
    still = loss_of_datum(program, lp, inputs, backward=False)
    assert still[0] == pytest.approx(loss)
    assert not still[1].any()


# What cannot be sent


GRAPH = traced(lambda logprobs: (logprobs.sum(), {}), logprobs=1)


def graph_with(*nodes: Dict[str, Any], output: Any = None) -> Dict[str, Any]:
    """A graph of one parameter ``logprobs`` and *nodes*; its output is the last of them."""
    listed: List[Dict[str, Any]] = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}}
    ]
    listed += [{"args": [], "kwargs": {}, **node} for node in nodes]
    last = listed[-1]["name"]
    returned = {"tuple": [{"ref": last}, {"dict": {}}]} if output is None else output
    listed.append({"op": "output", "name": "out", "target": "output", "args": [returned]})
    inputs = [{"name": "logprobs", "rank": 1}]
    return {"name": "f", "inputs": inputs, "graph": {"format": 1, "nodes": listed}}


def call(target: str, *args: Any, op: str = "call_function", name: str = "x") -> Dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args)}


LP = {"ref": "logprobs"}


@pytest.mark.parametrize(
    "node",
    [
        call("torch.load", "/etc/passwd"),
        call("torch.save", LP, "/tmp/x"),
        call("torch.hub.load", "x"),
        call("torch.ops.aten.add", LP),
        call("torch.nn.functional.conv1d", LP),
        call("torch.ones", [1 << 40]),
        call("os.system", "true"),
        call("builtins.eval", "1"),
        call("eval", "1"),
        call("operator.attrgetter", "__class__"),
        call("operator.methodcaller", "backward"),
        call("getattr", LP, "__class__"),
        call("getattr", LP, "grad_fn"),
        call("getattr", LP),
        call("getattr", LP, {"ref": "logprobs"}),
        call("backward", LP, op="call_method"),
        call("numpy", LP, op="call_method"),
        call("__reduce__", LP, op="call_method"),
        call("add_", LP, 1, op="call_method"),
        call("register_hook", LP, op="call_method"),
        call("weight", op="get_attr"),
        call("linear", LP, op="call_module"),
        call("torch.exp", {"ref": "later"}),
        call("torch.exp", {"ref": "x"}),
        call("torch.exp", {"callable": "os.system"}),
        call("torch.exp", {"ref": "logprobs", "tuple": []}),
        call("torch.exp", {"float": "1e400"}),
        call("torch.exp", {"slice": [1]}),
        call("torch.exp", LP, name="logprobs"),
    ],
    ids=lambda node: f"{node['target']}-{str(node['args'])[:30]}",
)
def test_unlisted_functions_are_refused_before_anything_runs(
    losses: Api, node: Dict[str, Any]
) -> None:
    body = graph_with(node, output={"tuple": [{"ref": "logprobs"}, {"dict": {}}]})
    session = losses.session()
    losses.post("create_custom_loss", 400, session_id=session, custom_loss_seq_id=0, **body)


def test_every_name_on_the_lists_is_an_existing_function() -> None:
    import math
    import operator

    for module, names in [
        (torch, loss_graph.TORCH),
        (torch.nn.functional, loss_graph.NEURAL),
        (torch.Tensor, loss_graph.METHODS),
        (operator, loss_graph.OPERATOR),
        (math, loss_graph.MATH),
    ]:
        assert [name for name in names if not callable(getattr(module, name, None))] == []


def test_the_nesting_of_arguments_is_bounded() -> None:
    value: Any = 1
    for _ in range(2000):
        value = [value]
    with pytest.raises(HTTPError, match="nested"):
        read_program(graph_with(call("torch.exp", value)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"graph": {"format": 2, "nodes": []}}, "format 2"),
        ({"graph": {"format": 1, "nodes": []}}, "0 nodes"),
        ({"graph": {"format": 1, "nodes": [{}] * 1001}}, "1001 nodes"),
        ({"graph": {"format": 1, "nodes": ["x"]}}, "must be objects"),
        ({"graph": {"format": 1, "nodes": GRAPH["graph"]["nodes"][:-1]}}, "output"),
        ({"inputs": []}, "logprobs"),
        ({"inputs": [{"name": "weights", "rank": 1}]}, "logprobs"),
        ({"inputs": [{"name": "logprobs", "rank": 0}]}, "rank"),
        ({"inputs": [{"name": "Log", "rank": 1}]}, "not a valid name"),
        ({"inputs": [{"name": "logprobs", "rank": 1}] * 2}, "twice"),
        (
            {"inputs": [{"name": "logprobs", "rank": 1}, {"name": "a", "rank": 1}]},
            "1 parameters for 2",
        ),
        ({"name": None}, "'name' is missing"),
    ],
)
def test_the_fault_of_a_graph_is_named(losses: Api, change: Dict[str, Any], says: str) -> None:
    body = {"session_id": losses.session(), "custom_loss_seq_id": 0, **GRAPH, **change}
    assert says in losses.post("create_custom_loss", 400, **body)["detail"]


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([call("torch.exp", LP)], "not a scalar"),
        ([call("torch.sum", LP), call("torch.log", {"ref": "x"}, name="y")], "is nan"),
        ([call("torch.reshape", LP, [7])], "failed at x (reshape)"),
        ([call("expand", LP, 1 << 40, 3, op="call_method")], "too large at x"),
        ([call("view", 3, 1, op="call_method")], "needs a tensor"),
        ([call("operator.mul", [1], 1 << 40)], "tensors and numbers only"),
        ([call("operator.pow", 10, 10_000_000)], "OverflowError"),
        ([call("operator.mul", 1 << 62, 4)], "too large a number"),
        ([call("math.sqrt", -1.0)], "ValueError"),
        (
            [
                call("torch.clamp", LP, 0, 0),
                call("torch.sqrt", {"ref": "x"}, name="y"),
                call("sum", {"ref": "y"}, op="call_method", name="z"),
                call("operator.mul", LP, {"float": "inf"}, name="w"),
                call("torch.sum", {"ref": "w"}, name="v"),
                call("operator.mul", {"ref": "v"}, 0, name="u"),
            ],
            "is nan",
        ),
        ([call("to", LP, {"dtype": "Tensor"}, op="call_method")], "not a dtype"),
    ],
)
def test_a_failing_graph_names_the_node_and_the_run_continues(
    losses: Api, nodes: List[Dict[str, Any]], says: str
) -> None:
    session = losses.session()
    model = losses.model(session)
    loss_id = create(losses, session, graph_with(*nodes))
    failure = losses.result(submit(losses, model, 1, loss_id, datums()))
    assert says in failure["error"]
    assert failure["error"].startswith("datum 0: ")
    assert failure["category"] == "user"
    assert losses.result(losses.step(model, 2))["metrics"]["grad_norm:mean"] == 0.0


def test_a_pairwise_loss_is_bounded_by_its_size(losses: Api) -> None:
    from tinkex.local.engines.engine import EngineError
    from tinkex.local.losses import evaluation as graph_loss

    def pairwise(logprobs: Any) -> Any:
        return (logprobs[:, None] * logprobs[None, :]).sum(), {}

    program = read_program(traced(pairwise, logprobs=1))
    small = np.full(100, -1.0, np.float32)
    assert graph_loss.loss_of_datum(program, small, {}, backward=True)[0] == 10_000.0
    large = np.full(20_000, -1.0, np.float32)
    with pytest.raises(EngineError, match="400000000 elements"):
        graph_loss.loss_of_datum(program, large, {}, backward=True)


# Ids, sessions, the flag


def test_a_loss_belongs_to_its_session_and_its_number(losses: Api) -> None:
    session, other = losses.session(), losses.session()
    loss_id = create(losses, session, GRAPH)
    assert create(losses, session, GRAPH) == loss_id  # the same request, repeated
    changed = {**GRAPH, "name": "another"}
    losses.post("create_custom_loss", 409, session_id=session, custom_loss_seq_id=0, **changed)
    assert create(losses, session, changed, 1) != loss_id
    stranger = losses.model(other)
    refused = submit(losses, stranger, 1, loss_id, datums(), expect=400)
    assert "not a custom loss of this session" in refused["detail"]
    losses.post(f"sessions/{session}/finish")
    assert losses.backend.losses.find(loss_id) is None
    losses.post("create_custom_loss", 410, session_id=session, custom_loss_seq_id=2, **GRAPH)


def test_a_missing_input_is_named(losses: Api) -> None:
    session = losses.session()
    model = losses.model(session)
    loss_id = create(losses, session, traced(reinforce, logprobs=1, advantages=1, weights=1))
    data = [Datum(ModelInput.from_ints([1]), {"target_tokens": [2]})]
    refused = submit(losses, model, 1, loss_id, data, expect=400)
    assert "needs the input 'advantages'" in refused["detail"]
    wrong = [
        Datum(
            ModelInput.from_ints([1]),
            {"target_tokens": [2], "weights": [1.0], "advantages": np.ones((1, 2), np.float32)},
        )
    ]
    failure = losses.result(submit(losses, model, 2, loss_id, wrong))
    assert "'advantages' has 2 dimensions" in failure["error"]


def test_without_torch_the_server_says_so(losses: Api, monkeypatch: Any) -> None:
    monkeypatch.setattr("tinkex.local.routes.training.has_torch", lambda: False)
    body = {"session_id": losses.session(), "custom_loss_seq_id": 0, **GRAPH}
    assert "torch" in losses.post("create_custom_loss", 501, **body)["detail"]


def test_without_the_flag_the_route_does_not_exist(api: Api) -> None:
    session = api.session()
    api.post("create_custom_loss", 404, session_id=session, custom_loss_seq_id=0, **GRAPH)
    refused = submit(api, api.model(session), 1, f"{session}:loss:0", datums(), expect=400)
    assert "'custom' is unknown" in refused["detail"]

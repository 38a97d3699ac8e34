"""`torch.compile(model, backend="ligerfx")`: the patterns searched for in the graphs that Dynamo captures.

Dynamo hands over flat graphs of torch calls, spelled as their authors wrote them, with fake results of every call: what
the matcher works on. So nothing is captured anew. The rewritten graph goes to Inductor, for which kernels are single
operators (`kernels/_operators.py`). Dynamo's own guards say when a graph serves.
"""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node

from .capture import Capture
from .cost import cost
from .deferred import deferred_logits
from .listing import listing
from .matcher import Matcher
from .matches import Match
from .module import Program, compile_graph
from .registry import patterns_for
from .report import Report
from .rewriter import rewrite
from .source import describe_error, file_name
from .symbols import FakeInputs
from .torch_calls import CONVERSIONS

KEPT = 64
"""Reports that are kept, of the graphs compiled last."""

_reports: deque[Report] = deque(maxlen=KEPT)


def compiled_reports() -> list[Report]:
    """Reports on the graphs that `torch.compile(..., backend="ligerfx")` has compiled in this process.

    Returns:
        The last 64, the oldest first. A graph is one program without modules, so all paths in it are "".

    Raises:
        Nothing: before a graph is compiled the list is empty.

    Examples:
        >>> import torch, ligerfx
        >>> norm = torch.nn.RMSNorm(16)
        >>> compiled = torch.compile(norm, backend="ligerfx", options={"backend": "eager"})
        >>> _ = compiled(torch.randn(2, 3, 16))
        >>> ligerfx.compiled_reports()[-1].idioms
        {'rms_norm': 1}
    """
    return list(_reports)


def ligerfx(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """The backend, by whose name `torch.compile` finds it.

    Args:
        gm: what Dynamo captured.
        example_inputs: its inputs.
        mode: of `torch.compile`, for Inductor.
        options: "patterns" and "low_memory" as for `optimize`; "backend" compiles the rewritten graph in the place of
            Inductor, to which all further options go.
    """
    options = dict(options or {})
    patterns, low_memory = options.pop("patterns", ()), options.pop("low_memory", False)
    inner = options.pop("backend", None)
    device = next((x.device for x in example_inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
    searched = patterns_for(patterns, True, low_memory, device)
    try:
        program = _rewritten(gm, searched)
        report = Report.of(gm, {}, {"": program})
    except Exception as error:  # what compiles without ligerfx must not fail with it
        warnings.warn(f"a graph is compiled as it is, without ligerfx: {describe_error(error)}", stacklevel=2)
    else:
        gm.graph = program.capture.graph
        _reports.append(report)
    if inner is not None:
        return lookup_backend(inner)(gm, example_inputs) if isinstance(inner, str) else inner(gm, example_inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches={**list_mode_options(mode), **options} if mode else options)


def _rewritten(gm: GraphModule, patterns: list) -> Program:
    """The rewritten graph, a copy, and what was done to it."""
    graph = Graph(owning_module=gm)
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copy in copies.items():
        if node.op == "placeholder":
            copy._dynamo_source = node._dynamo_source
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
        node.meta["source"], node.meta["line"] = _source(node)
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target in CONVERSIONS and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    modes = _modes(graph)
    fakes = FakeInputs(detect_fake_mode([n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]))
    with fakes.shape_env.suppress_guards():  # what a pattern asks about sizes, its replacement asks again
        matches, near = Matcher(graph, fakes).find(patterns, lambda match: _obstacle(match, modes))
    before, costs = listing(graph), [cost(match) for match in matches]
    changed = rewrite(graph, matches)
    capture = Capture("", (), graph)
    program = Program(capture, lambda module, leaves: True, matches, near, changed=changed, before=before, costs=costs)
    program.function, program.code = compile_graph(graph)
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    return program


def _changes_nothing(cast: Node) -> bool:
    """Whether a cast gives what it is given: it is then not a step of anything."""
    before, after = cast.args[0].meta.get("val"), cast.meta.get("val")
    if cast.kwargs or len(cast.args) > 2 or not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    return (before.dtype, before.device) == (after.dtype, after.device)


def _source(node: Node) -> tuple[str, str]:
    """`file:line` and text of the innermost line of the model's own code."""
    lines = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [line for line in lines if "/torch/" not in line[0]]
    if not own:
        return "?", ""
    path, number, text = own[-1]
    return f"{file_name(path)}:{number}", text.strip()


_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast


def _modes(graph: Graph) -> dict[Node, tuple]:
    """The grad mode and the autocast regions that each node is in: calls in the graph switch them."""
    grad: Any = None
    autocast: list[Node] = []
    found = {}
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad = node.args[0]
        elif node.target is _ENTER:
            autocast.append(node)
        elif node.target is _EXIT:
            autocast.remove(node.args[0])
        found[node] = grad, *autocast
    return found


def _obstacle(match: Match, modes: dict[Node, tuple]) -> str | None:
    """Why a match in such a graph must not be rewritten."""
    users = {
        user for node in match.outputs for user in node.users if user not in match.interior and user.op != "output"
    }
    if len({_mode(modes[node]) for node in match.interior | users}) > 1:
        return "the grad or autocast mode changes in between"
    if len(set(match.inputs.values())) < len(match.inputs):
        return "two of its inputs are one: a value would be computed twice"
    if not callable(match.pattern.replace) and deferred_logits in match.pattern.replace:
        logits = match.outputs[match.pattern.replace.index(deferred_logits)]
        if any(user not in match.interior for user in logits.users):
            return "the graph uses the logits, or returns them: they have to be there"
    return None


def _mode(mode: tuple) -> tuple:
    return (True if mode[0] is None else mode[0], *mode[1:])

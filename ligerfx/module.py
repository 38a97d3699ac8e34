"""The module that comes back: a GraphModule and the model's own class at once.

A call is compared with the signatures that were captured. Where one fits, its graph runs; a new signature is
captured once and remembered; what cannot be captured runs the original forward on this same object, whose
children are still optimised. So one capture never limits what the model can do.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from .capture import Capture, Lends, Read, StandsFor, structure
from .clone import COMPILED
from .compile_ahead import compile_ahead
from .cost import Cost, cost
from .deferred import deferred_logits, settled_if_sharded
from .dissolve import Borders, borders, dissolved, scopes, straddled
from .entry import MISS, entry_for
from .errors import CaptureError, PatternError
from .guard import guard_of, size_conditions
from .listing import Line, listing
from .matcher import Matcher
from .matches import Match
from .names import methods
from .near_misses import NearMiss
from .pattern import Pattern
from .registry import referenced, references
from .rewriter import rewrite
from .shadow import exposes_parameters
from .sharded import is_fully_sharded
from .signature import call_key
from .source import describe_error
from .symbols import FakeInputs
from .tracer import Tracer

MAX_SIGNATURES = 16
"""Signatures that one module remembers; further ones run the original forward."""

MAX_ENTRIES = 4
"""Kinds of calls that are tried before the signature is looked up: training, evaluation, a prompt, a token."""


@dataclass(eq=False)
class Program:
    """A rewritten capture, ready to run. `function`, of (module, leaves), is None where the original forward is as
    good."""

    capture: Capture
    guard: Callable[[nn.Module, list], bool]
    matches: list[Match] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    function: Callable | None = None
    code: str = ""
    dissolved: frozenset[str] = frozenset()  # paths of the modules whose calls were dissolved into this graph
    changed: bool = False  # whether the graph is another than the one that was captured
    before: tuple[Line, ...] = ()  # the code of the graph before it was rewritten
    costs: list[Cost] = field(default_factory=list)  # of each match
    conditions: list[str] = field(default_factory=list)  # of the guard, on the inputs
    checks: list[StandsFor | Read] = field(default_factory=list)  # of the guard, on the modules
    entries: dict[tuple, Callable | None] = field(default_factory=dict)  # by kind of call
    rehearsed: set[tuple] = field(default_factory=set)  # which leaves needed a gradient
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        self.defers_logits = _defers_logits(self.capture.graph)
        _by_number[self.number] = self

    def __deepcopy__(self, memo: dict) -> Program:
        return self  # immutable; holds nothing of the module that it runs on


_by_number: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()
"""All programs that there are. torch.compile takes a number for a constant, and a program not."""

ROUNDABOUT = 4
"""By how many operations a model may spell an idiom longer than its pattern does, and still be seen to go on in another
module."""


@dataclass(eq=False)
class Session:
    """What the modules of one optimised model share: the patterns, and programs that twins may take over."""

    patterns: list[Pattern]
    refuse: Callable[[Match], str | None] | None = None  # asked about each match; says why it must not be rewritten
    limit: int | None = None  # how many rewrites a program has at most
    programs: dict[tuple, list[Program]] = field(default_factory=dict)
    captured: dict[tuple, tuple[Capture, FakeInputs]] = field(default_factory=dict)  # in a caller, and not yet compiled
    twins: dict[int, weakref.WeakSet[OptimizedModule]] = field(default_factory=dict)  # by the number of their program
    lock: Any = field(default_factory=threading.RLock)

    def compile(self, capture: Capture, fakes: FakeInputs) -> Program:
        """Matches a capture and rewrites a copy of it. One that cannot be guarded, searched or rewritten gets an error,
        and its module runs its original forward.

        Raises:
            PatternError: one of the patterns is not usable.
        """
        try:
            if not capture.error:
                return self._compile(capture, fakes)
        except PatternError:
            raise
        except Exception as error:  # a model that runs must not fail because of a rewrite
            capture.error = describe_error(error)
        return Program(capture, lambda module, leaves: True)

    def _compile(self, capture: Capture, fakes: FakeInputs) -> Program:
        if candidates := scopes(capture):
            whole = dissolved(capture, candidates)
            steps = ROUNDABOUT + max((pattern.depth for pattern in self.patterns), default=0)
            matches = self._match(whole, fakes, borders(whole.graph, steps))[1]
            if chosen := straddled([match.reach for match in matches], candidates):
                with contextlib.suppress(CaptureError):  # which says that the callers' sizes do not tell those inside
                    return self._rewritten(*self._match(dissolved(capture, chosen), fakes), chosen)
        return self._rewritten(*self._match(dissolved(capture), fakes), set())

    def _match(
        self, capture: Capture, fakes: FakeInputs, within: Borders | None = None
    ) -> tuple[Capture, list[Match], list[NearMiss]]:
        with fakes.shape_env.suppress_guards():  # what a pattern asks about sizes, its replacement asks again
            return capture, *Matcher(capture.graph, fakes, within).find(self.patterns, self.refuse)

    def _rewritten(self, capture: Capture, matches: list[Match], near: list[NearMiss], chosen: set[str]) -> Program:
        matches = matches[: self.limit]
        layers = [n for m in matches for n in m.interior if n.op == "call_module"]
        for layer in layers:
            parameters = tuple(layer.meta["parameters"])
            if layer.meta.get("lends"):
                capture.reads.append(Lends(layer.target, "", parameters))
            else:
                capture.absorbed[layer.target] = nn.Linear, parameters
            capture.names |= methods(nn.Linear, "forward")
        conditions = size_conditions(capture, bool(chosen))
        checks = capture.module_checks()
        guard = guard_of(conditions, checks, list(capture.names.values()))
        before, costs = listing(capture.graph), [cost(match) for match in matches]
        changed = rewrite(capture.graph, matches)
        function, code = function_of(capture, capture.graph)
        chosen = frozenset(chosen)
        return Program(
            capture, guard, matches, near, function, code, chosen, changed, before, costs, conditions, checks
        )

    def program_for(self, module: nn.Module, key: tuple, leaves: list, args: tuple, kwargs: dict) -> Program:
        """The program for a call of `module` with a signature that it has not seen: a twin's, one that was captured
        with a caller's, or a new one."""
        kind = structure(module), key
        programs = self.programs.setdefault(kind, [])
        if kind in self.captured:
            programs.append(self._learnt(*self.captured.pop(kind)))
        for program in programs:
            if program.guard(module, leaves):
                return program
        # Who watches operations (counts them, say) is not to see those of fakes.
        watched = is_in_torch_dispatch_mode(include_infra_modes=False)
        with _disable_current_modes() if watched else contextlib.nullcontext():
            tracer = Tracer(module, original_class=original_class)
            capture = tracer.trace(args, kwargs)
            self._keep_those_inside(capture, module, tracer.fakes, {})
            program = self._learnt(capture, tracer.fakes)
        programs.append(program)
        return program

    def add_twin(self, module: OptimizedModule) -> None:
        self.twins.setdefault(module._ligerfx_program.number, weakref.WeakSet()).add(module)

    def twins_of(self, module: OptimizedModule) -> list[OptimizedModule]:
        """The modules that began with this one's program and are like it still, itself included."""
        kind = structure(module)
        return [m for m in self.twins.get(module._ligerfx_program.number, ()) if structure(m) == kind]

    def _learnt(self, capture: Capture, fakes: FakeInputs) -> Program:
        program = self.compile(capture, fakes)
        if not program.changed:
            program.function = None
        return program

    def _keep_those_inside(self, capture: Capture, module: nn.Module, fakes: FakeInputs, memo: dict) -> None:
        """Keeps what was captured of the modules inside, for calls of theirs if this one's forward runs as it is. A
        failure counts where nothing about the inputs was guessed."""
        for path, sub in capture.children:
            inner = module.get_submodule(path)
            if not sub.error or not (capture.error or any(map(fakes.is_measured, sub.leaf_values))):
                self.captured[structure(inner, memo), sub.key] = sub, fakes
            self._keep_those_inside(sub, inner, fakes, memo)

    def __deepcopy__(self, memo: dict) -> Session:
        return Session(self.patterns, self.refuse, self.limit)


_NOT_COPIED = ("_graph", COMPILED)


class OptimizedModule(GraphModule):
    """Base of all rewritten modules. Made by `ligerfx.optimize`, never by hand: calling the class, as its
    `from_pretrained` does, makes a module of the original class."""

    _original_class: type
    _ligerfx_edited = False  # whether its caller must call it
    _lineno_map = None  # where torch.compile looks for the nodes behind the lines of a GraphModule's code

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        return cls._original_class(*args, **kwargs) if args or kwargs else object.__new__(cls)

    @property
    def graph(self) -> Graph:
        """The graph of this module's forward, for the signature that `optimize` captured."""
        if torch.compiler.is_exporting():  # it runs the graph of a GraphModule, whatever call that is the graph of
            raise RuntimeError(
                f"torch.export does not call a GraphModule such as this {type(self).__name__}, but runs its graph, "
                "which serves one kind of call. Export the original model, which has the same parameters, or an "
                "nn.Module whose forward calls this one."
            )
        if "_graph" not in self.__dict__:
            shared = self._ligerfx_program.capture.graph
            own = Graph(owning_module=self)
            output = own.graph_copy(shared, {})
            own.output(output)
            self.__dict__["_graph"] = own
        return self.__dict__["_graph"]

    @graph.setter
    def graph(self, graph: Graph) -> None:
        self.__dict__["_graph"] = graph
        graph.owning_module = self
        self.recompile()

    @property
    def _code(self) -> str:
        return self._ligerfx_program.code

    def recompile(self) -> Any:
        """Makes changes of `self.graph` effective, for this module alone."""
        if "_graph" in self.__dict__:
            old = self._ligerfx_program
            new = Program(old.capture, old.guard, old.matches, old.near_misses, dissolved=old.dissolved)
            new.before, new.costs = old.before, old.costs
            new.function, new.code = function_of(old.capture, self.graph)
            self.__dict__["_ligerfx_program"] = new
            self.__dict__["_ligerfx_entries"] = ()
            self.__dict__["_ligerfx_edited"] = True
            programs = [new if p is old else p for p in self._ligerfx_programs.values()]
            self._ligerfx_programs.clear()
            self._ligerfx_programs.update({p.number: p for p in programs})
        return self.graph.python_code("self")

    def only_returns_deferred_logits(self) -> bool:
        """Whether graphs of this module's forward defer logits, and use none of them but as an output."""
        graphs = [program.capture.graph for program in self._ligerfx_programs.values()]
        deferred = [n for graph in graphs for n in graph.nodes if n.target is deferred_logits]
        return bool(deferred) and all(map(_is_only_returned, deferred))

    def _repr_html_(self) -> str | None:
        """The report, in a notebook; a part of the model shows itself as modules do."""
        return self.__dict__["report"]._repr_html_() if "report" in self.__dict__ else None

    @property
    def itself(self) -> OptimizedModule:
        """This module: what a graph hands to functions that want it."""
        return self

    def __deepcopy__(self, memo: dict) -> OptimizedModule:
        new = memo[id(self)] = object.__new__(type(self))
        state = {k: v for k, v in self.__dict__.items() if k not in _NOT_COPIED}
        new.__dict__.update(copy.deepcopy(state, memo))
        new._ligerfx_session.add_twin(new)
        return new

    def __copy__(self) -> OptimizedModule:
        new = object.__new__(type(self))
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _NOT_COPIED})
        return new

    def _replicate_for_data_parallel(self) -> nn.Module:
        """What DataParallel asks of each module in each step: here one of the original class, with its forward."""
        if "report" in self.__dict__:
            _warn_once(
                self,
                f"nn.DataParallel runs the original forward of {type(self).__name__} on each GPU, without what ligerfx "
                "rewrote. DistributedDataParallel (torchrun, accelerate launch) keeps it, or one GPU does "
                "(CUDA_VISIBLE_DEVICES=0).",
            )
        replica = nn.Module._replicate_for_data_parallel(self)
        replica.__class__ = self._original_class
        return replica

    def __reduce__(self) -> tuple:
        state = {
            k: v for k, v in self.__dict__.items()
            if not k.startswith("_ligerfx") and k != "report" and k not in _NOT_COPIED
        }  # fmt: skip
        session = self._ligerfx_session
        return _rebuild, (self._original_class, state, references(session.patterns), session.refuse is not None)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.__reduce__()


def original_class(module: nn.Module) -> type:
    """The class whose forward defines what the module computes."""
    return module._original_class if isinstance(module, OptimizedModule) else type(module)


@functools.cache
def optimized_class(cls: type) -> type:
    """A subclass of `cls` and GraphModule, with the name and the forward signature of `cls`."""

    @functools.wraps(cls.forward)
    def forward(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if not torch.is_grad_enabled() and not self.__dict__["_ligerfx_defers_logits"]:
                # There is nothing to save for a backward, and a compiler fuses the plain operations with those around
                # them: a token that `generate` decodes on an H100 takes 1.15 times as long with kernels, which it
                # cannot. Nor is a program looked up: what is checked for that, compiled code checks in every call.
                return cls.forward(self, *args, **kwargs)
            from .compiled import learn  # imports the compiler, which `import ligerfx` must not

            learn()
            function, leaves = find_function(self, args, kwargs)
        else:
            for entry in self.__dict__["_ligerfx_entries"]:
                out = entry(self, args, kwargs)
                if out is not MISS:
                    return out
            program, leaves = find_program(self, args, kwargs)
            function = None
            if program is not None:
                function = program.function
                _compile_ahead(program, self, leaves)
                _remember(self, program, cls.forward, args, kwargs)
        return cls.forward(self, *args, **kwargs) if function is None else function(self, leaves)

    # Code of its own, as the original's is: a compiler keeps so many variants of one code object, and then compiles it
    # no more, whatever module runs it.
    forward.__code__ = forward.__code__.replace()
    body = {
        "forward": forward,
        "_original_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (OptimizedModule, cls), body)


def install(module: OptimizedModule, session: Session, program: Program) -> None:
    """Gives a fresh optimised module its first program."""
    module.__dict__["_ligerfx_session"] = session
    module.__dict__["_ligerfx_program"] = program
    module.__dict__["_ligerfx_programs"] = {program.number: program} if program.function else {}
    module.__dict__["_ligerfx_entries"] = ()
    module.__dict__["_ligerfx_defers_logits"] = program.defers_logits
    session.add_twin(module)


def find_program(module: OptimizedModule, args: tuple, kwargs: dict) -> tuple[Program | None, list]:
    """The program that serves this call, learnt now if need be; None for the original forward."""
    key, leaves = call_key(args, kwargs)
    if program := _known(module, key, leaves):
        return program, leaves
    if len(module._ligerfx_programs) >= MAX_SIGNATURES:
        _warn_once(
            module,
            f"{type(module).__name__} was called in more than {MAX_SIGNATURES} ways (dtypes, kinds of arguments, "
            "values of attributes and of global names); further ones run its original forward",
        )
        return None, leaves
    session = module._ligerfx_session
    with session.lock:
        program = session.program_for(module, key, leaves, args, kwargs)
        _learn(module, program)
        # Those like it would come to the same. Layers that are compiled one by one share their compiled code as long as
        # they know the same.
        for twin in session.twins_of(module):
            has_room = len(twin._ligerfx_programs) < MAX_SIGNATURES
            if has_room and not _known(twin, key, leaves) and program.guard(twin, leaves):
                _learn(twin, program)
    warn_of_full_logits(module, program)
    # A capture that does not even serve the call that it was made for must not run.
    return (program if program.guard(module, leaves) else None), leaves


def _known(module: OptimizedModule, key: tuple, leaves: list) -> Program | None:
    programs = list(module._ligerfx_programs.values())  # another thread may learn one
    return next((p for p in programs if p.capture.key == key and p.guard(module, leaves)), None)


def _learn(module: OptimizedModule, program: Program) -> None:
    module._ligerfx_programs[program.number] = program
    if program.defers_logits:
        module.__dict__["_ligerfx_defers_logits"] = True


def find_function(module: OptimizedModule, args: tuple, kwargs: dict) -> tuple[Callable | None, list]:
    """For torch.compile: the function of the program that serves this call; None for the original forward.

    In each call compiled code checks all that was looked at here: of programs, which never change, only their numbers
    and functions."""
    key, leaves = call_key(args, kwargs)
    programs = module._ligerfx_programs
    for number, runs in _candidates(tuple(programs), key, torch.is_grad_enabled()):
        program = programs[number]
        if program.guard(module, leaves):
            return program.function if runs else None, leaves
    from .compiled import warn_of_unknown_call

    warn_of_unknown_call(type(module).__name__)  # the compiler cannot stop to capture anything
    return None, leaves


def _candidates(numbers: tuple[int, ...], key: tuple, grad_enabled: bool) -> list[tuple[int, bool]]:
    """Which of these programs may serve a call, and whether a compiler is to get what was rewritten."""
    return [
        (program.number, program.function is not None and (grad_enabled or program.defers_logits))
        for program in map(_by_number.__getitem__, numbers)
        if program.capture.key == key
    ]


_candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see names._holds_now


def _compile_ahead(program: Program, module: OptimizedModule, leaves: list) -> None:
    """Before a program runs first, and where other inputs need a gradient."""
    needs_grad = torch.is_grad_enabled(), *(getattr(leaf, "requires_grad", False) for leaf in leaves)
    if needs_grad not in program.rehearsed:
        program.rehearsed.add(needs_grad)
        compile_ahead(program.capture, module, leaves)


def _remember(module: OptimizedModule, program: Program, forward: Callable, args: tuple, kwargs: dict) -> None:
    """Lets the next call like this one take the short way."""
    if module._ligerfx_edited:
        return
    kind = structure(module), call_key(args, kwargs)[0], len(args)
    if kind not in program.entries:
        program.entries[kind] = entry = entry_for(program, module, forward, args, kwargs)
        if entry:
            entry.program = program
    if entry := program.entries[kind]:
        known = [e for e in module.__dict__["_ligerfx_entries"] if e is not entry]
        place = max((place + 1 for place, e in enumerate(known) if _fuses_more(e.program, program)), default=0)
        known.insert(place, entry)
        module.__dict__["_ligerfx_entries"] = tuple(known[:MAX_ENTRIES])


def _fuses_more(program: Program, other: Program) -> bool:
    """Whether a program serves calls of the same kind as another, which calls modules that this one has absorbed: it
    may hold again when a hook or an adapter is gone, and the other holds all the same."""
    if program.capture.key != other.capture.key or program.function is None:
        return False
    absorbed = {check.path for check in program.checks if isinstance(check, (StandsFor, Lends))}
    called = {node.target for node in other.capture.graph.nodes if node.op == "call_module"}
    return other.function is None or not called.isdisjoint(absorbed)


def _defers_logits(graph: Graph) -> bool:
    return any(node.target is deferred_logits for node in graph.nodes)


def _is_only_returned(node: Node) -> bool:
    """Whether nothing happens to a node's value but that it is returned, perhaps in an object of some class."""
    return all(u.op == "output" or (isinstance(u.target, type) and _is_only_returned(u)) for u in node.users)


def _warn_once(module: OptimizedModule, message: str) -> None:
    warned = module.__dict__.setdefault("_ligerfx_warned", set())
    if message not in warned:
        warned.add(message)
        warnings.warn(message, stacklevel=4)


def warn_of_full_logits(module: OptimizedModule, program: Program) -> None:
    """Says that a head with an adapter, say, is called, so that the logits exist and only their loss is a kernel."""
    for match in program.matches:
        node = match.inputs.get("logits") if "cross_entropy" in match.pattern.idioms else None
        while isinstance(node, Node) and node.op in ("call_function", "call_method") and node.args:
            node = node.args[0]  # a cast, a soft cap
        if isinstance(node, Node) and node.op == "call_module":
            head = module.get_submodule(node.target)
            if not exposes_parameters(head):
                what = (
                    f"a {type(head).__name__} with an adapter, a hook, quantised weights or another forward, and not a "
                    "plain nn.Linear"
                )
                cure = "As a plain nn.Linear (after merge_and_unload(), say), it is fused with the loss"
                if is_fully_sharded(head):
                    what = "a unit of FSDP of its own, or with a norm, which may free its weights after the forward"
                    cure = (
                        "In a unit with reshard_after_forward=False and without other hooks, or left to the unit of "
                        "the whole model, it is fused with the loss"
                    )
                elif any(hasattr(parameter, "ds_shape") for parameter in head.parameters(recurse=False)):
                    what = "sharded by DeepSpeed ZeRO-3, and has other hooks than those that gather its weights"
                    cure = "Without these, or with ZeRO-2, it is fused with the loss"
                _warn_once(
                    module,
                    f"{type(module).__name__}: {node.target} is {what}. It is called as it is, so the logits are "
                    f"computed in full and only their loss runs as a kernel. {cure}.",
                )


def compile_graph(graph: Graph) -> tuple[Callable, str]:
    """The Python function of a graph, and its source."""
    source = graph.python_code("self")
    namespace = dict(source.globals)
    exec(compile(source.src, "<ligerfx graph>", "exec"), namespace)
    return namespace["forward"], source.src


def function_of(capture: Capture, graph: Graph) -> tuple[Callable, str]:
    """A function of (module, leaves) that runs `graph` for calls such as the captured one, and the graph's source."""
    run, code = compile_graph(graph)
    body = [f"out = run({', '.join(['m', *(f'x[{index}]' for index in capture.leaves)])})"]
    if capture.grad_enabled is not None:
        body = [f"with set_grad_enabled({capture.grad_enabled}):", f"    {body[0]}"]
    body.append("return settled_if_sharded(m, out)" if _defers_logits(graph) else "return out")
    names = {"run": run, "set_grad_enabled": torch.set_grad_enabled, "settled_if_sharded": settled_if_sharded}
    exec(compile("\n    ".join(["def function(m, x):", *body]), "<ligerfx function>", "exec"), names)
    return names["function"], code


def _rebuild(cls: type, state: dict[str, Any], patterns: list[tuple], verify: bool) -> OptimizedModule:
    """Unpickles an optimised module. It learns its programs again, with the patterns that are found."""
    from .verify import Verifier

    module = object.__new__(optimized_class(cls))
    module.__dict__.update(state)
    capture = Capture("", (), Graph(), error="unpickled: not captured yet")
    session = Session(referenced(patterns), Verifier().refuse if verify else None)
    install(module, session, Program(capture, lambda m, x: False))
    return module

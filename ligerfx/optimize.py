"""`optimize`: the stages in order."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import draws
from .capture import Capture, structure
from .clone import COMPILED, clone_tree
from .compile_ahead import prepare
from .errors import OptimizeError
from .inputs import normalized_inputs
from .module import (
    OptimizedModule,
    Program,
    Session,
    install,
    optimized_class,
    original_class,
    warn_of_full_logits,
)
from .pattern import Pattern
from .registry import patterns_for
from .report import Report, inside_callers
from .sharded import data_parallel_wrapper
from .tracer import Tracer
from .verify import Verifier


def optimize(
    model: nn.Module,
    example_inputs: dict[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    *,
    patterns: Sequence[Pattern] = (),
    defaults: bool = True,
    low_memory: bool = False,
    verify: bool = False,
    max_rewrites: int | None = None,
) -> OptimizedModule:
    """A copy of `model` whose RMSNorm, GLU, RoPE and logits-plus-loss run as fused Triton kernels.

    The copy shares the model's parameters and computes the same: forward, loss and gradients. The model that is
    passed in is not changed. Parts that cannot be captured stay as they are, and `result.report` says why.

    Args:
        model: any `nn.Module`; transformers models need no `example_inputs`.
        example_inputs: one call of the model: a dict of keyword arguments, a sequence of positional ones, or a
            tensor. Only shapes, dtypes and devices matter; other batch and sequence sizes work afterwards.
            Default: token ids, attention mask and labels made from `model.config`.
        patterns: what to look for besides, and first; see `ligerfx.pattern`. Each is checked once.
        defaults: whether to look for the registered patterns (`ligerfx.register`) and those of the library
            (`ligerfx.patterns.default_patterns`); with False, for nothing but `patterns`.
        low_memory: whether act(gate) * up, which only the down projection reads, is written again by the backward's
            kernel instead of being kept (one activation of the intermediate size a layer, for one write of it), and
            the loss works on smaller chunks. The results are equally exact. Without effect on `patterns`.
        verify: whether to run each distinct rewrite, now and in later captures, on random inputs with the shapes,
            dtypes and device of its place, against the operations that it replaces, forward and gradients. The
            differences are in `report.rewrites`; what differs by more than rounding explains is not rewritten, and is
            in `report.near_misses`.
        max_rewrites: how many rewrites are applied, in the order of `report.rewrites`; calls unlike `example_inputs`
            then run as in the original. For finding the one that does harm, as `ligerfx.bisect` does.

    Returns:
        A `torch.fx.GraphModule` that is also an instance of the model's class, with a `report`.

    Raises:
        OptimizeError: `model` is not a module, the inputs do not fit it, or its forward fails on them.
        PatternError: one of `patterns` cannot be matched, or its replacement does not compute what its function does.

    Examples:
        >>> import torch, ligerfx
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model = ligerfx.optimize(LlamaForCausalLM(config))
        >>> model.report.idioms
        {'rms_norm': 5, 'rope': 2, 'glu': 2, 'linear_cross_entropy': 1}
    """
    if not isinstance(model, nn.Module):
        raise OptimizeError(f"optimize expects a torch.nn.Module, not {type(model).__name__}: pass the model itself")
    if wrapper := data_parallel_wrapper(model):
        raise OptimizeError(
            f"the model has been wrapped by {wrapper}, which is bound to these very modules: call ligerfx.optimize "
            "first, and wrap the model that it returns"
        )
    if max_rewrites is not None and max_rewrites < 0:
        raise OptimizeError(f"max_rewrites must not be negative, got {max_rewrites}")
    args, kwargs = normalized_inputs(model, example_inputs)
    device = _device(args, kwargs)
    prepare(device)
    searched = patterns_for(patterns, defaults, low_memory, device)
    session, replaced = Session(searched, Verifier().refuse if verify else None), _replaced(model)
    with _collector_paused():
        result = _optimized(model, args, kwargs, session, replaced, max_rewrites)
    _warn_of_what_stays(result.report, replaced)
    if any(vars(module).get(COMPILED) for module in model.modules()):
        warnings.warn(
            f"{type(model).__name__}, or a module inside, was compiled with compile(). The result is not: call "
            "compile() on it, or on those inside",
            stacklevel=2,
        )
    return result


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's collector of cycles looks at all objects of the process each time, those of torch and transformers too:
    0.3 s, several times in the second in which a large model is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _optimized(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    session: Session,
    replaced: dict[str, str],
    max_rewrites: int | None,
) -> OptimizedModule:
    tracer = Tracer(model, original_class=original_class)
    capture = tracer.trace(args, kwargs)
    if capture.error is not None:
        _check_that_it_runs(model, args, kwargs)
    if "" in replaced:
        capture.error = replaced[""]
    programs = _compile(capture, session, tracer)
    if max_rewrites is not None:
        programs = _limited(capture, session, tracer, programs, max_rewrites)
    result = _assemble(model, session, programs)
    opaque = replaced | {path: sub.error for path, sub in capture.subtree() if sub.error}
    report = Report.of(result, opaque, programs)
    result.__dict__["report"] = report
    return result


def _device(args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """Where the model's inputs are."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _check_that_it_runs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises OptimizeError if the model itself fails on the example inputs, rather than its capture."""
    state = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(), draws.put_back():
            model(*args, **kwargs)
    except Exception as error:
        raise OptimizeError(
            f"{type(model).__name__} fails on example_inputs ({type(error).__name__}: {str(error).rstrip('.')}): "
            "pass example_inputs with which model(...) runs"
        ) from error
    finally:
        for buffer, value in state:
            buffer.copy_(value)


def _replaced(model: nn.Module) -> dict[str, str]:
    """Why a module whose forward is another than its class's runs as it is, by module path. Of torch's own modules
    and of what is inside another such module nothing needs to be said."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in found if outer)
        ours = not inside and type(module).__module__.split(".")[0] != "torch"
        if "forward" in vars(module) and (ours or path == ""):
            found[path] = "its forward was replaced on the instance (accelerate does that for offloading and autocast)"
    return found


def _warn_of_what_stays(report: Report, replaced: dict[str, str]) -> None:
    if report.opaque and not report.rewrites:
        path, reason = next(iter(report.opaque.items()))
        warnings.warn(
            f"nothing in {report.model} was rewritten, and it runs as before: {path or 'the model'} could not be "
            f"captured ({reason}). result.report says more; other example_inputs, or optimising the model before it is "
            "wrapped or changed, may help",
            stacklevel=3,
        )
    elif "" in replaced:
        warnings.warn(
            f"only modules inside {report.model} were rewritten: {replaced['']}. Its own part, with the loss, is "
            "rewritten too if ligerfx.optimize comes first",
            stacklevel=3,
        )


def _compile(capture: Capture, session: Session, tracer: Tracer) -> dict[str, Program]:
    """A program for the captured call of each module, by module path. Twins share theirs."""
    made: dict[int, Program] = {}
    programs: dict[str, Program] = {}
    for path, sub in capture.subtree():
        if id(sub) not in made:
            made[id(sub)] = session.compile(sub, tracer.fakes)
        programs.setdefault(path, made[id(sub)])
    return programs


def _limited(
    capture: Capture, session: Session, tracer: Tracer, programs: dict[str, Program], left: int
) -> dict[str, Program]:
    """The programs again, with no more than so many rewrites in all. Modules that are dissolved into their callers
    have theirs there; calls that have no program yet get none."""
    elsewhere = inside_callers(programs)
    limited: dict[str, Program] = {}
    made: dict[tuple[int, int], Program] = {}
    for path, sub in capture.subtree():
        if path in limited:
            continue
        applied = 0 if path in elsewhere else min(left, len(programs[path].matches))
        if (id(sub), applied) not in made:
            made[id(sub), applied] = replace(session, limit=applied).compile(sub, tracer.fakes)
        limited[path] = made[id(sub), applied]
        left -= applied
    session.patterns = []
    return limited


def _assemble(model: nn.Module, session: Session, programs: dict[str, Program]) -> OptimizedModule:
    """The copy of the model in which every module with a rewrite, and the root, runs its program."""
    paths = {id(module): path for path, module in model.named_modules()}

    def class_of(module: nn.Module) -> type:
        path = paths[id(module)]
        rewritten = path == "" or (path in programs and programs[path].changed)
        cls = original_class(module)
        return optimized_class(cls) if rewritten else cls

    memo: dict[int, nn.Module] = {}
    result = clone_tree(model, class_of, memo)
    for original_id, path in paths.items():
        clone = memo[original_id]
        clone.__dict__.pop(COMPILED, None)
        if isinstance(clone, OptimizedModule):
            clone.__dict__.pop("_graph", None)
            install(clone, session, programs[path])
            warn_of_full_logits(clone, programs[path])
    structures: dict[int, tuple] = {}
    for original_id, path in paths.items():  # once all are installed: what is inside a module is part of its structure
        clone = memo[original_id]
        if isinstance(clone, OptimizedModule):
            key = structure(clone, structures), programs[path].capture.key
            session.programs.setdefault(key, []).append(programs[path])
    return result

"""One layer forward and backward on a tape."""

from __future__ import annotations

import functools

from lmforge.predict.job import Shape
from lmforge.predict.tensors import compiled
from lmforge.predict.tensors.decoder import Layer
from lmforge.predict.tensors.families import through
from lmforge.predict.tensors.run import Run
from lmforge.predict.tensors.storage import Held, Storage, Tensor
from lmforge.predict.tensors.tape import Tape
from lmforge.predict.tensors.walked import Walked


@functools.lru_cache(maxsize=4096)
def layer(shape: Shape, run: Run, input_grad: bool) -> Walked:
    """A layer of the model. Whatever its place, its bytes are the same; only the first may have an input without gradient."""
    if run.compiled:
        return compiled.walked(shape, run)
    tape = Tape(accumulated=run.accumulated)
    x = tape.leaf(run.tokens * shape.hidden, run.param, input_grad)
    made = Layer(tape, shape, run)
    out = through(made, x) if run.checkpointing == "none" else checkpointed(tape, made, x, run.checkpointing == "selective")
    casts = sum(one.nbytes for one in tape.casts if one.holders == 1)
    leave_autocast(tape)
    tape.drop(x)
    assert x.storage is not None
    lets_go = not x.storage.holders
    stays, forward = tape.now - x.nbytes, tape.peak
    tape.drop(out)
    out.gradient = tape.allocate(out.nbytes)
    tape.peak = Held(tape.now)
    tape.backward()
    return Walked(stays, forward, tape.peak, tape.grads, casts, lets_go)


@functools.lru_cache(maxsize=256)
def without_gradient(shape: Shape, run: Run) -> int:
    """Bytes at a layer's fullest, its input with them, where nothing is learned from it."""
    tape = Tape()
    through(Layer(tape, shape, run), tape.leaf(run.tokens * shape.hidden, run.param))
    return tape.peak.total


def leave_autocast(tape: Tape) -> None:
    for one in tape.casts:
        tape.release(one)
    tape.casts = []


def checkpointed(tape: Tape, made: Layer, x: Tensor, selective: bool) -> Tensor:
    """torch.utils.checkpoint without re-entry: forward keeps x (and, selective, outputs of products and attention), backward runs the layer once more."""
    tape.recording, tape.keep, tape.saves = False, [] if selective else None, 0
    needs_grad, x.needs_grad = x.needs_grad, True
    out = through(made, x)
    x.needs_grad = needs_grad
    kept, tape.keep, tape.recording, saves = tape.keep or [], None, True, tape.saves
    assert x.storage is not None
    x.storage.holders += 1
    out.needs_grad = True
    tape.calls(out, lambda gradient: _again(tape, made, x, gradient, kept, saves))
    return out


def _again(tape: Tape, made: Layer, x: Tensor, gradient: Storage, kept: list[Storage], saves: int) -> None:
    """Backward of a checkpointed layer.

    Nodes behind the last one that saved something run before anything is recomputed, for the first saved tensor asked for starts that. Recomputing ends
    at the last tensor that is saved.
    """
    casts, tape.casts, base = tape.casts, [], len(tape.nodes)
    tape.ghost = True
    twin = through(made, x)
    tape.ghost, twin.gradient, shadows = False, gradient, list(tape.nodes)
    while len(tape.nodes) > base and not tape.nodes[-1].saves:
        tape.backward(len(tape.nodes) - 1)
    reached = len(tape.nodes)
    for node in tape.nodes[base:]:
        for one in node.held:
            tape.release(one)
    del tape.nodes[base:]
    tape.casts, tape.saves, tape.stop_at, tape.given = [], 0, saves, list(kept)
    output = through(made, x)
    left, tape.given, tape.stop_at, tape.ghost = tape.given, [], None, False
    leave_autocast(tape)
    tape.casts = casts
    for old, new in zip(shadows[base:], tape.nodes[base:], strict=True):
        for was, now in zip(old.tensors(), new.tensors(), strict=True):
            if was is not now and was.gradient is not None:
                now.gradient, was.gradient = was.gradient, None
    del tape.nodes[reached:]
    tape.drop(output)
    tape.backward(base)
    assert x.storage is not None
    tape.release(x.storage)
    for one in left:  # what the early stop left
        tape.release(one)

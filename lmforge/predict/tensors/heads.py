"""What lies behind the layers, forward and backward on a tape: final norm, output product, loss; or a head of one number."""

from __future__ import annotations

import functools

from lmforge.predict.job import Shape
from lmforge.predict.tensors.decoder import Layer
from lmforge.predict.tensors.run import Run
from lmforge.predict.tensors.storage import OUT, Held, Tensor
from lmforge.predict.tensors.tape import Tape
from lmforge.predict.tensors.walk import leave_autocast
from lmforge.predict.tensors.walked import Headed, Predicted

CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}  # float32 logits alive at once (lmforge.training.losses.tokens, which a test holds equal: that module needs torch)


@functools.lru_cache(maxsize=1024)
def head(shape: Shape, run: Run, predicted: Predicted) -> Headed:
    """Final norm, output product, and the chunked cross entropy (lmforge.training.losses.tokens)."""
    tape, h, normed = _final_norm(shape, run)
    h = _some(tape, h, predicted.tokens * shape.hidden) if predicted.tokens != run.tokens else h
    logits = _logits(Layer(tape, shape, run), h)
    if predicted.picked:
        # Its backward has zeros of all, and puts the gradient into a copy of them.
        copy = tape.operation(logits.count, logits.width, (logits,), temporary=logits.nbytes, gradients={id(logits): logits.nbytes})
        tape.drop(logits)
        tape.marks_logits(copy)
        logits = copy
    chunk = min(predicted.tokens, max(1, predicted.chunk_bytes // (4 * shape.vocab)))
    part, each = chunk * shape.vocab * 4, predicted.tokens * 4
    following, copied = min(chunk, predicted.tokens - chunk) * shape.vocab * 4, int(logits.width != 4)
    tape.temporary((part + following) * copied + 4 * each, logits=True)  # the old part lives while the next one is cast
    # In backward a float32 copy, its difference with the log-sum-exp, and the part before.
    behind = part + max(part * copied, following * (1 + copied)) + 6 * each
    terms = [_term(tape, logits, each // 4, behind)]
    if predicted.picked:  # the entropy is told, whether or not it is in the loss: log-probs, probabilities and their product
        tape.temporary(part * 3 + each, logits=True)
    if predicted.entropy:
        terms.append(_term(tape, logits, each // 4, part * 3 + 2 * each))
    return _finished(tape, normed, logits, terms)


def _logits(made: Layer, h: Tensor) -> Tensor:
    """The output product; Gemma 2 caps it: cap * tanh(logits / cap)."""
    tape, shape = made.tape, made.shape
    logits = made.output(h)
    tape.drop(h)
    tape.marks_logits(logits)
    if shape.kind != "gemma2":
        return logits
    for saves in ((), (OUT,), ()):
        following = tape.operation(logits.count, logits.width, (logits,), saves)
        tape.drop(logits)
        tape.marks_logits(following)
        logits = following
    return logits


def _term(tape: Tape, logits: Tensor, tokens: int, behind: int) -> Tensor:
    """A term of the loss, a number a token."""
    return tape.operation(tokens, 4, (logits,), (logits,), temporary=behind, gradients={id(logits): logits.nbytes})


def _finished(tape: Tape, normed: Held, last: Tensor, terms: list[Tensor]) -> Headed:
    """What a head has been, its backward run."""
    forward = tape.peak
    tape.drop(last)
    leave_autocast(tape)
    stays = Held(tape.now, tape.logits)
    for one in terms:
        one.gradient = tape.allocate(one.nbytes)
        tape.drop(one)
    tape.backward()
    return Headed(normed, forward, tape.peak, stays, tape.grads)


@functools.lru_cache(maxsize=1024)
def scalar_head(shape: Shape, run: Run, tokens: int) -> Headed:
    """Final norm, and a head of one number at `tokens`."""
    tape, h, normed = _final_norm(shape, run)
    some = _some(tape, h, tokens * shape.hidden)
    score = Layer(tape, shape, run).product(some, shape.hidden, 1, True)
    return _finished(tape, normed, some, [score])


def _some(tape: Tape, h: Tensor, count: int) -> Tensor:
    """Some positions of a residual stream."""
    some = tape.operation(count, h.width, (h,), gradients={id(h): h.nbytes})
    tape.drop(h)
    return some


def _final_norm(shape: Shape, run: Run) -> tuple[Tape, Tensor, Held]:
    tape = Tape(accumulated=run.accumulated)
    x = tape.leaf(run.tokens * shape.hidden, run.param, True)
    h = Layer(tape, shape, run).norm(x)
    tape.drop(x)
    return tape, h, tape.peak

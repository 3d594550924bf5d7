"""Peak bytes of a step that opens a whole model on one device and learns nothing: evaluation, reference log-probs, answers that are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lmforge.hardware.nodes import Machine
from lmforge.model.weights import weights
from lmforge.precision.nodes import dtype_bytes
from lmforge.predict.constants import reserve
from lmforge.predict.job import Shape, shape
from lmforge.predict.memory import Peak
from lmforge.predict.moments import Moment, plus
from lmforge.predict.tensors import walk
from lmforge.predict.tensors.families import ORDER
from lmforge.predict.tensors.heads import CHUNK_BYTES
from lmforge.predict.tensors.run import Kernel, Run
from lmforge.stage.base import parameters
from lmforge.step import Reading

FLOAT32 = 4
DRAWN = 44  # bytes a logit while a token is drawn from the likeliest ones: log-probs sorted with their places, probabilities and their sums in float64


def peak(config: Mapping[str, Any], reading: Reading, saved: str, machine: Machine) -> Peak:
    """The fullest moment of it; `saved` is the dtype of its weights on disk. Only the weights where nobody has followed the model's operations."""
    width = dtype_bytes(reading.dtype or saved)
    elements = parameters(weights(config))
    resting = {"params": elements * width, "beside": elements * FLOAT32 * reading.beside, "reserve": reserve(machine, 1)}
    moments = list(_moments(shape(config), reading, width, machine))
    told = f", if there are {reading.rows} of {reading.length:,} tokens" if reading.shorter else ""
    return max((Peak(parts=plus(resting, parts), moment=f"{name}{told}") for name, parts in moments), key=lambda one: one.total)


def _moments(model: Shape, reading: Reading, width: int, machine: Machine) -> Iterator[Moment]:
    if model.kind not in ORDER:
        yield "forward", {}
        return
    kernel: Kernel = "eager" if model.kind == "gemma2" else "cpu" if machine.accelerator == "cpu" else "efficient"
    run = Run(rows=reading.rows, length=reading.length, param=width, compute=width, kernel=kernel, masked=True, frozen=True)
    mask = run.rows * run.length**2 * (2 * width if model.kind == "gemma2" else 1)
    stream = run.tokens * model.hidden * width
    layer = walk.without_gradient(model, run) + frames(model) * stream + 2 * run.tokens * model.rotary_dim * width + mask
    if not reading.new:
        yield "forward", {"activations": layer}
        words = run.tokens * model.vocab
        yield "logits", {"logits": words * width, "activations": 2 * stream}
        yield "log-probs", {"logits": _scored(reading, words, width, machine)}
        return
    cached = 2 * run.rows * model.keys * width  # bytes a token and layer
    yield "reading prompts", {"activations": layer, "cache": model.layers * cached * run.length}
    # transformers' DynamicCache joins old and new keys of a layer, then values, into new tensors.
    whole = (model.layers * cached + cached // 2) * (run.length + reading.new)
    yield "drawing answers", {"cache": whole, "logits": run.rows * model.vocab * (width + DRAWN)}


def frames(model: Shape) -> int:
    """Tensors as large as the residual stream that functions above a layer's operations still name, which backward would keep anyway: the embedding's
    output; in GPT-2 its positions, attention's output and the norm's too; with experts the routed input and its flat copy."""
    return 4 if model.kind == "gpt2" else 3 if model.experts else 1


def _scored(reading: Reading, words: int, width: int, machine: Machine) -> int:
    """Bytes of logits and their log-softmax in float32: of all, which are cast before and let go of as they were, or of a chunk at a time beside them."""
    if not reading.chunked:
        return words * FLOAT32 * 2
    return words * width + min(words * FLOAT32, CHUNK_BYTES[machine.accelerator]) * (1 + (width != FLOAT32))

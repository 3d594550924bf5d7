"""A training step's moments: what is alive at each, in bytes by part.

Forward runs through the embedding and equal layers, logits and loss; backward through them in reverse. What is alive at layer i is linear in i, so that the
fullest moment is at an end: the head, the last layer's backward or the one before, the first's, or that of the first whose weights are all gathered ahead.
Parts are those of `Peak`; `Static` lies below all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmforge.predict.around import Around
from lmforge.predict.job import Shape
from lmforge.predict.tensors import heads, walk
from lmforge.predict.tensors.run import Run
from lmforge.predict.tensors.storage import Held
from lmforge.predict.tensors.walked import Headed, Predicted, Walked

Parts = Mapping[str, int]
Moment = tuple[str, Parts]


def plus(*several: Parts) -> dict[str, int]:
    """Parts added up."""
    found: dict[str, int] = {}
    for one in several:
        for name, size in one.items():
            found[name] = found.get(name, 0) + size
    return found


def parts(held: Held, grads: str = "grads") -> dict[str, int]:
    """A tape's bytes by part; where gradients go to their owners at once, whole ones are buffers."""
    return {"activations": held.total - held.logits - held.grads, "logits": held.logits, grads: held.grads}


@dataclass(frozen=True)
class Graph:
    """Forward and backward of one network, or of a pipeline's stage of it, over a micro-batch."""

    shape: Shape
    run: Run
    around: Around
    layers: int  # that run here
    predicted: int  # tokens with logits, or with a number
    scalar: bool
    chunk_bytes: int
    input_grad: bool  # whether a gradient flows to the first layer's input
    table: int  # bytes of the embedding's gradient; 0 where it is not trained here
    tied: bool  # to the head
    headed: bool = True  # False: the head is another stage's
    entropy: bool = False  # the loss has an entropy term
    picked: bool = False  # logits are copied to the answers' tokens before the loss (lmforge.training.rl.tokens)

    @property
    def first(self) -> Walked:
        return walk.layer(self.shape, self.run, self.input_grad)

    @property
    def rest(self) -> Walked:
        return walk.layer(self.shape, self.run, True)

    @property
    def head(self) -> Headed:
        if self.scalar:
            return heads.scalar_head(self.shape, self.run, self.predicted)
        return heads.head(self.shape, self.run, Predicted(self.predicted, self.chunk_bytes, self.entropy, self.picked))

    @property
    def hidden(self) -> int:
        """Bytes of a residual stream."""
        return self.run.tokens * self.shape.hidden * self.run.param

    @property
    def tables(self) -> int:
        """Of rotary positions."""
        return 2 * self.run.tokens * self.shape.rotary_dim * self.run.param

    @property
    def mask(self) -> int:
        """The model's own attention mask while its forward runs: a byte an element, or two masks of numbers for Gemma 2's eager attention."""
        if self.shape.kind == "gemma2":
            return 2 * self.run.rows * self.run.length**2 * self.run.param
        return self.run.rows * (self.run.length**2 if self.run.masked else max((one.masked for one in self.run.attended), default=0))

    @property
    def standing(self) -> int:
        """Rotary tables; and under checkpointing the mask, which every layer was given and will be given again."""
        return self.tables + (0 if self.run.checkpointing == "none" else self.mask)

    @property
    def casts(self) -> int:
        """Autocast's copies of weights that nothing saves, alive while it is on."""
        return self.layers * self.rest.casts if self.run.autocast else 0

    def before(self, layer: int) -> int:
        """Alive without the input of a layer."""
        return self.standing + (self.first.stays + (layer - 1) * self.rest.stays if layer else 0)

    def saved(self) -> Parts:
        """Alive after forward, for backward: another network's, or other micro-batches', may run meanwhile."""
        return plus({"activations": self.before(self.layers)}, parts(self.head.stays) if self.headed else {"activations": self.hidden})

    def forward(self) -> Iterator[Moment]:
        held = self.hidden if self.first.lets_go else 0  # the embedding's output is a local of the model's forward
        last = self.rest if self.layers > 1 else self.first
        beside = {"activations": self.casts + (self.mask if self.run.checkpointing == "none" else 0), "buffers": self.around.forward}
        yield "forward", plus(parts(last.forward), beside, {"activations": self.before(self.layers - 1) + (held if self.layers > 1 else 0)})
        if self.headed:
            top = {"activations": self.before(self.layers)}
            yield "final norm", plus(top, parts(self.head.normed), beside, {"activations": held})
            yield "loss, forward", plus(top, parts(self.head.forward), {"activations": self.casts, "buffers": self.around.scored})

    def backward(self) -> Iterator[Moment]:
        around, whole = self.around, "buffers" if self.around.reduces else "grads"
        left = {whole: self.head.grads if self.headed and around.waits else 0}
        if self.headed:
            yield "loss, backward", plus({"activations": self.before(self.layers), "buffers": around.scored}, parts(self.head.backward, whole))
        # A tied table's head gradient waits under accumulation, and as a view, so that the embedding's is added out of place.
        left = plus(left, {whole: self.table if self.tied and self.run.accumulated else 0})
        for layer in sorted({at for at in (self.layers - 1, self.layers - 2, around.ahead, 1, 0) if 0 <= at < self.layers}, reverse=True):
            name, one = f"layer {layer + 1} of {self.layers}", self.rest if layer else self.first
            below = plus({"activations": self.before(layer)}, left, self._done(self.layers - 1 - layer))
            yield f"{name}, backward", plus(below, parts(one.backward, whole), {"buffers": around.backward(layer, self.layers)})
            if around.reduces:
                yield f"{name}, gradients reduced", plus(below, {"activations": self.hidden, "buffers": around.reducing(layer)})
        if self.table:
            twice = {whole: self.table * (2 if self.tied else 1)}
            below = plus({"activations": self.standing + self.hidden, "buffers": around.embedding}, left, self._done(self.layers))
            yield "embedding, backward", plus(below, twice)
        if around.reduces:
            yield "gradients reduced", plus(self._done(self.layers), {"buffers": around.ending})

    def left(self) -> int:
        """Bytes of gradients after backward; none more where they were there before."""
        if self.run.accumulated:
            return 0
        done = sum(self._done(self.layers).values())
        return done if self.around.reduces else done + (self.head.grads if self.headed else 0) + (0 if self.tied else self.table)

    def _done(self, layers: int) -> Parts:
        """Gradients of the last so many layers, as they are kept."""
        if self.around.reduces:
            return {"grads": layers * self.around.kept_grads}
        if not layers:
            return {}
        first = self.first.grads if layers == self.layers else self.rest.grads
        return {"grads": (layers - 1) * self.rest.grads + first}

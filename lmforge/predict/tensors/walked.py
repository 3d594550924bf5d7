"""What a walk through a layer, or through what lies behind the layers, finds."""

from __future__ import annotations

from dataclasses import dataclass

from lmforge.predict.tensors.storage import Held


@dataclass(frozen=True)
class Walked:
    """A layer, above what lay below it (its input counts as below)."""

    stays: int  # bytes that forward leaves, the output with them
    forward: Held  # at its fullest
    backward: Held
    grads: int  # bytes of parameters' gradients that backward leaves
    casts: int  # autocast's copies of weights that live until autocast is left, beyond those that are saved
    lets_go: bool  # nothing in it keeps its input


@dataclass(frozen=True)
class Predicted:
    """Tokens with logits, and what their loss does with them."""

    tokens: int
    chunk_bytes: int  # of float32 logits at once
    entropy: bool = False  # an entropy term with a gradient
    picked: bool = False  # the logits are a copy of some of those that the model makes (lmforge.training.rl.tokens)


@dataclass(frozen=True)
class Headed:
    """What lies behind the layers, above what lay below it; the last layer's output counts as below."""

    normed: Held  # at the final norm's fullest
    forward: Held
    backward: Held
    stays: Held  # between forward and backward
    grads: int

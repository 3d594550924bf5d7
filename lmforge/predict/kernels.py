"""Seconds of one kernel on one rank: a roofline by kernel class. What a machine gets of its datasheet is in `Rates`; what is here is fixed."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from lmforge.predict.flops import FLASH_BACKWARD, STORED_BACKWARD
from lmforge.predict.job import Shape
from lmforge.predict.rates import Rates

Scores = Literal["causal", "masked", "stored"]
# Tiles that cuBLAS chooses from, and what the smaller ones lose for reading more (NVIDIA, "Matrix Multiplication Background User's Guide", tile efficiency).
TILES = ((256, 128, 1.0), (128, 128, 1.08), (128, 64, 1.2), (64, 64, 1.4))
EXPONENTIALS = 8.0  # of head_dim, that softmax costs: the A100 curves of Dao 2023 (arXiv 2307.08691) at 64 and 128
STORED_BYTES = 16.0  # a score, 16-bit: mask added (2, 2), softmax to float32 (2, 4), cast (4, 2); what the two products read and write is theirs


class Seconds(NamedTuple):
    """Of a forward and of a backward pass."""

    forward: float
    backward: float

    def __add__(self, other: object) -> Seconds:
        assert isinstance(other, Seconds)
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> Seconds:
        return Seconds(self.forward * count, self.backward * count)


NONE = Seconds(0.0, 0.0)


def product(m: float, k: float, n: float, rates: Rates, width: int) -> float:
    """[m, k] x [k, n] in elements of `width` bytes: computing, plus moving each matrix once.

    A GPU computes tiles in waves over its units, the last wave as long as the others (NVIDIA's guide, wave quantization), and a tile costs K and a prologue.
    Compute and bytes are added, not the larger taken: with that no constant for small K was needed on llm-foundry's rows.
    """
    if min(m, k, n) <= 0:
        return 0.0
    if rates.gpu and rates.units:
        units = rates.units
        covered = min(math.ceil(math.ceil(m / a) * math.ceil(n / b) / units) * units * a * b * loss for a, b, loss in TILES)
    else:
        covered = m * n
    return 2 * covered * (k + rates.prologue) / rates.matmul + width * (m * k + k * n + m * n) / rates.memory


def trained_product(m: float, k: float, n: float, rates: Rates, width: int, *, weight_gradient: bool) -> Seconds:
    """A product with its gradients: of its input [m, n] x [n, k], and of the weight [k, m] x [m, n] where that learns."""
    learned = product(k, m, n, rates, width) if weight_gradient else 0.0
    return Seconds(product(m, k, n, rates, width), product(m, n, k, rates, width) + learned)


def attention(rows: float, length: int, heads: float, head_dim: int, rates: Rates, width: int, scores: Scores) -> Seconds:
    """One layer's softmax(QK^T)V over whole sequences.

    `causal`: half of the square, with the blocks of 128 on the diagonal whole. `masked`: packed documents are kept apart by a mask, under which torch's
    fused kernels compute whole squares. `stored`: no fused kernel, scores go through memory.
    """
    if scores == "stored":
        products = 2 * rows * heads * product(length, head_dim, length, rates, width)
        forward = products + rows * heads * length * length * STORED_BYTES * (width / 2) / rates.memory
        return Seconds(forward, STORED_BACKWARD * forward)
    causal = scores == "causal"
    squares = rows * heads * (length * (length + 128) / 2 if causal and rates.gpu else length * length * (0.5 if causal else 1.0))
    rate, slower = (rates.attention, rates.attention_backward) if causal else (rates.masked, rates.masked_backward)
    wide = (head_dim + EXPONENTIALS) * 128 / (128 + EXPONENTIALS) if rates.gpu else head_dim
    forward = 4 * squares * wide / rate
    moved = 4 * rows * length * heads * head_dim * width / rates.memory
    return Seconds(max(forward, moved), max(forward * FLASH_BACKWARD / slower, 2 * moved))


class Moved(NamedTuple):
    """Bytes a token that a layer's other kernels read and write, forward and backward: those that tensor parallel leaves whole, and those it splits."""

    whole: Seconds
    split: Seconds


def elementwise(shape: Shape, stream: int, width: int, *, fused: bool, sparse: bool = False) -> Moved:
    """Counted kernel by kernel in transformers 5's modeling files; `stream` bytes an element of the residual stream, `width` of the products'.

    `fused` (torch.compile): what Inductor leaves, one pass a norm, one a rotary embedding, one a gated activation.
    """
    inner = shape.expert_width * shape.top_experts if sparse else shape.intermediate
    turned = shape.queries + shape.keys if shape.rotary_dim else 0
    if fused:
        return Moved(Seconds(6 * stream, 10 * stream).times(shape.hidden), Seconds(2 * turned + 3 * inner, 2 * turned + 5 * inner).times(width))
    norms = _norms(shape, stream)
    # Two sums of the residual stream (an output of `width` into `stream`), and a cast of what products take where the dtypes differ.
    sums = Seconds(2 * (2 * stream + width), 2 * stream).times(shape.hidden)
    casts = Seconds(stream + width, stream + width).times(shape.hidden * _readers(shape)) if stream != width else NONE
    routed = Seconds(5 * width, 5 * width).times(shape.hidden * shape.top_experts) if sparse else NONE  # gathered to experts, and added up again
    rotary = Seconds(10 * width, 10 * width).times(turned)
    biases = Seconds(0.0, width).times(_biased(shape))  # forward's are in the products, backward sums a gradient
    return Moved(norms + sums + casts + routed, rotary + _activation(shape).times(inner * width) + biases)


def _norms(shape: Shape, stream: int) -> Seconds:
    """RMSNorm in transformers is float32 and six kernels (to float32, square, mean, scale, back, weight): 34 bytes a 16-bit channel, 28 a float32 one;
    backward twice that. LayerNorm is one kernel."""
    if shape.kind in ("gpt2", "gpt_neox"):
        return Seconds(2 * 2 * stream, 2 * 5 * stream).times(shape.hidden)
    one = 34.0 if stream == 2 else 28.0
    channels = shape.hidden * (4 if shape.kind == "gemma2" else 2) + (shape.queries + shape.keys if shape.head_norm != "none" else 0)
    return Seconds(one, 2 * one).times(channels)


def _activation(shape: Shape) -> Seconds:
    """In elements moved: SiLU or GELU and the gate's product (2 + 3, backward 8); GELU by itself (2, 3); GPT-2's tanh GELU, eight kernels (18, 24)."""
    if shape.gated:
        return Seconds(5.0, 8.0)
    return Seconds(18.0, 24.0) if shape.kind == "gpt2" else Seconds(2.0, 3.0)


def _readers(shape: Shape) -> int:
    """Linear layers of a layer that take the residual stream."""
    return 2 if not shape.gated else 5


def _biased(shape: Shape) -> int:
    """Outputs of a layer that have a bias."""
    found = (shape.queries + 2 * shape.keys) * shape.qkv_bias + shape.hidden * shape.out_bias
    return found + (shape.intermediate * (2 if shape.gated else 1) + shape.hidden) * shape.mlp_bias


def cross_entropy(logits: float, rates: Rates, width: int) -> Seconds:
    """training/losses/tokens.py: logits in chunks of float32. Forward a cast, a maximum, a sum of exponentials; backward a cast, four kernels in place, and
    the gradient in the logits' dtype."""
    cast = 6 if width == 2 else 0
    return Seconds((cast + 12) * logits / rates.memory, (cast + 32 + width) * logits / rates.memory)


KERNELS = {"eager": 50, "compiled": 15, "mixed": 14}  # that the host starts in a layer's forward pass: operations in transformers' Llama, what Inductor
# leaves, and casts of weights and inputs under autocast


def launches(compiled: bool, autocast: bool) -> int:
    """Kernels of one layer's forward pass; backward has twice as many."""
    return KERNELS["compiled" if compiled else "eager"] + (KERNELS["mixed"] if autocast else 0)

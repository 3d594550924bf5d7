"""One number gives a whole Llama: `params` -> depth, width, heads, feed-forward width.

The rule. A head is 32 wide below width 256, 64 below 2048 and 128 from there; width is a multiple of it. Depth follows
width: width / depth is clamp(2 sqrt(width), 64, 128), which is 64 up to width 1024 (nanochat, GPT-2) and 128 from 4096
on (Llama 7B); Kaplan et al. 2020 (section 3.1) found loss flat over that range. The feed-forward width is a multiple of 8
near 8/3 of the width (Shazeer 2020), and closes the gap to `params`.
Of all shapes that reach `params`, the one that strays least from these ratios is taken.

Counted is every parameter: embeddings (twice where the head is not tied), blocks and norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

NARROWEST, INNER_STEP = 32, 8
INNER_RATIO, INNER_LEAST, INNER_MOST = 8 / 3, 1, 5  # feed-forward width over width: aim and bounds


@dataclass(frozen=True)
class Shape:
    """What `params` was turned into."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


def total(width: int, depth: int, inner: int, vocab_size: int, tied: bool) -> int:
    """Parameters of a Llama without biases and with as many key-value heads as heads."""
    embeddings = vocab_size * width * (1 if tied else 2)
    return embeddings + depth * _block(width, inner) + width  # and the final norm


def smallest(vocab_size: int, tied: bool) -> int:
    """The fewest parameters the rule can reach with this vocabulary: one layer of width 32."""
    return total(NARROWEST, 1, INNER_LEAST * NARROWEST, vocab_size, tied)


def shape(params: float, vocab_size: int, tied: bool) -> Shape:
    """The shape that `params` stands for; ValueError below `smallest`.

    Its total is within 12 x width x depth of `params` (half a step of the feed-forward width), or, where the embedding of
    one width more is all that fits between two shapes, the nearest there is.
    """
    least = smallest(vocab_size, tied)
    if params < least:
        raise ValueError(f"{params:g} parameters are fewer than {least}")

    def preference(one: tuple[int, int, int]) -> tuple[float, float]:
        width, depth, inner = one
        missed = abs(total(width, depth, inner, vocab_size, tied) - params)
        return max(0.0, missed - 12 * width * depth), _strain(width, depth, inner)

    width, depth, inner = min(_candidates(params, vocab_size, tied), key=preference)
    return Shape(width, depth, width // _head_dim(width), inner)


def _candidates(params: float, vocab_size: int, tied: bool) -> Iterator[tuple[int, int, int]]:
    """For every width whose least shape fits in `params`, and the next, the (width, depth, inner) that come nearest."""
    width, fits = NARROWEST, True
    while fits:
        thin, wide = INNER_LEAST * width, INNER_MOST * width
        fits = total(width, 1, thin, vocab_size, tied) <= params
        aim, rest = width / _aspect(width), params - total(width, 0, 0, vocab_size, tied)
        low, high = max(1, math.floor(aim / 4)), max(8, math.ceil(aim * 4))
        flattest, deepest = (_clip(math.floor(rest / _block(width, inner)), low, high) for inner in (wide, thin))
        for depth in range(flattest, deepest + 1):
            spare = rest / depth - _block(width, 0)  # for the three matrices of one feed-forward
            yield width, depth, _clip(INNER_STEP * round(spare / (3 * width * INNER_STEP)), thin, wide)
        width += _head_dim(width)


def _block(width: int, inner: int) -> int:
    return 4 * width**2 + 3 * width * inner + 2 * width  # attention, SwiGLU, two RMSNorms


def _clip(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _aspect(width: int) -> float:
    return min(max(2 * math.sqrt(width), 64.0), 128.0)


def _strain(width: int, depth: int, inner: int) -> float:
    """How far a shape is from the rule's two ratios, in squared log units."""
    return math.log(width / depth / _aspect(width)) ** 2 + math.log(inner / width / INNER_RATIO) ** 2


def _head_dim(width: int) -> int:
    return 32 if width < 256 else 64 if width < 2048 else 128

"""How a pass over a micro-batch runs on one device: what an operation's bytes depend on besides the model's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmforge.model.families import Split

Kernel = Literal["cpu", "flash", "efficient", "eager"]


@dataclass(frozen=True)
class LowRank:
    """LoRA on some matrices, by their names within a layer (self_attn.q_proj)."""

    rank: int
    targets: frozenset[str]
    dropout: float = 0.0
    four_bit: bool = False
    magnitude: bool = False  # DoRA's


@dataclass(frozen=True)
class Attended:
    """One call of the attention kernel on a shared prompt's row: the prompt by itself, or an answer after it (lmforge.training.shared_prompt)."""

    queries: int
    keys: int
    masked: int = 0  # elements of its mask a row; 0 is causal, without one


@dataclass(frozen=True)
class Run:
    """`rows` sequences of `length` tokens. Widths are bytes an element."""

    rows: int
    length: int
    param: int = 4  # of weights as a layer sees them
    compute: int = 4  # of matrix products
    kernel: Kernel = "cpu"
    masked: bool = False  # packed documents, which transformers keep apart by a mask
    checkpointing: str = "none"
    compiled: bool = False
    frozen: bool = False  # no weight of a layer is trained, but for an adapter's
    adapter: LowRank | None = None
    accumulated: bool = False  # gradients of an earlier micro-batch are there
    attended: tuple[Attended, ...] = ()  # a shared prompt's calls; none: one over the whole row
    recasts: bool = False  # products save what they were given, and cast it again in backward
    tp: int = 1
    splits: tuple[tuple[str, Split], ...] = ()  # how tensor parallel splits matrices of a layer

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def style(self, name: str) -> Split | None:
        """How tensor parallel splits a matrix of a layer."""
        return next((style for module, style in self.splits if module == name), None) if self.tp > 1 else None

    @property
    def by_heads(self) -> bool:
        """Whether each rank has some heads' attention."""
        return self.style("self_attn.q_proj") == "column"

    @property
    def autocast(self) -> bool:
        return self.param != self.compute

"""What models of round sizes take, from formulae alone: 20 N tokens (Hoffmann et al. 2022, table 3), 6ND FLOPs, and device-hours at a device's peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmforge.predict.law import TOKENS_PER_PARAMETER

SIZES: Mapping[str, float] = {"400m": 400e6, "1b": 1e9, "7b": 7e9, "70b": 70e9, "gpt3_175b": 175e9}  # options of `model` by the size in their name


@dataclass(frozen=True)
class Row:
    """One size; 7e9 parameters on 140e9 tokens are 5.88e21 FLOPs."""

    option: str
    parameters: float

    @property
    def tokens(self) -> float:
        """The compute-optimal number by Hoffmann et al.'s rule."""
        return TOKENS_PER_PARAMETER * self.parameters

    @property
    def flops(self) -> float:
        """2ND forward and 4ND backward, attention left out, as tables of training runs count them."""
        return 6 * self.parameters * self.tokens

    def hours_at(self, flops_per_s: float) -> float:
        """Device-hours at so many FLOP/s on each device."""
        return self.flops / flops_per_s / 3600


def rows() -> list[Row]:
    """All sizes, the smallest first."""
    return [Row(option, parameters) for option, parameters in SIZES.items()]

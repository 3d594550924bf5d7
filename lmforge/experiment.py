"""The root schema: what a composed config means, with nothing derived yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lmforge.data.nodes import Data
from lmforge.eval.nodes import Eval
from lmforge.hardware.nodes import Hardware
from lmforge.model.nodes import Model
from lmforge.quantize.nodes import Quantize
from lmforge.registry import Key
from lmforge.stage.nodes import Stage
from lmforge.track.nodes import Track


@dataclass(frozen=True, kw_only=True)
class NamedStage:
    """A stage with its name in this experiment: its type, or an alias."""

    name: str
    stage: Stage


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a user said. Stage-level groups are already merged into the stages."""

    name: Annotated[str, Key("what the runs are grouped under; null = the experiment file, or the stages")]
    output: Annotated[str, Key("folder of steps/ and runs/", identity=False)]
    law: Annotated[
        str | None, Key("JSON file of a fitted scaling law, for a plan's expected loss and best sizes; null = Hoffmann's 20 tokens a parameter", identity=False)
    ]
    model: Model
    data: Data
    stages: tuple[NamedStage, ...]
    eval: Eval
    quantize: Quantize
    hardware: Hardware
    track: Track

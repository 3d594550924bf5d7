"""What `reward=` may name."""  # first sketch by the lead, so that the tree imports: the reward helper writes the real one over it

from __future__ import annotations

from lmforge.registry import Node, register


class Reward(Node):
    """What an answer is worth."""

    group = "reward"

    def takes(self) -> tuple[str, ...]:
        """Artifact kinds it needs."""
        return ()


@register("reward", "model")
class Model(Reward):
    """A trained reward model."""

    def takes(self) -> tuple[str, ...]:
        """The trained reward model."""
        return ("reward_model",)


@register("reward", "python_parses")
class PythonParses(Reward):
    """1 where it parses."""

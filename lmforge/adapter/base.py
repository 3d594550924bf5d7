"""What every adapter is: torch-free to plan with, and a torch side that takes and gives transformers and PEFT models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from lmforge.adapter.targets import WeightLike
from lmforge.errors import Problem
from lmforge.registry import Node, node


@node
class Adapter(Node):
    """Which weights a stage trains. The torch side takes and gives transformers and PEFT models."""

    group: ClassVar[str] = "adapter"
    trains_all: ClassVar[bool] = False  # True: no adapter, every weight of the model is trained
    packs: ClassVar[bool] = True  # whether packed rows can be trained on; not under a soft prompt

    def problems(self, weights: Iterable[WeightLike], where: str) -> Iterator[Problem]:
        """What does not fit a model with these weights (`lmforge.model.weights.weights(config)`)."""
        yield from ()

    def trainable(self, weights: Iterable[WeightLike]) -> list[Any]:
        """The tensors that are trained, each with `name`, `shape` and `count`: exactly those whose gradient and optimizer state are kept."""
        raise NotImplementedError(f"{type(self).__name__} has no trainable()")

    def frozen_bytes(self, weights: Iterable[WeightLike], width: int) -> int:
        """Bytes of the weights that are not trained, `width` each where they are not quantized."""
        return sum(numel(one) for one in weights) * width

    @property
    def reads_base(self) -> bool:
        """Whether what it begins with is made of the base's values; where it is not, `attach` takes a base on the meta device too."""
        return False

    @property
    def positions(self) -> int:
        """How many positions of the model's context it takes from every sequence."""
        return 0

    @property
    def four_bit(self) -> dict[str, Any] | None:
        """How the base is rounded to 4 bits, or None."""
        return None

    def attach(self, model: Any, seed: int | None = None) -> Any:
        """The model to train, in place: what is frozen needs no gradient, and the output is the base's (QLoRA: in 4 bits) until something is learned.

        What begins at random is drawn from `seed`, which leaves the caller's random state alone; None draws from that state.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attach()")

    def off(self, model: Any) -> AbstractContextManager[None]:
        """A block in which the attached model is its base (QLoRA: the base in 4 bits), as the reference of preference losses and KL penalties."""
        from lmforge.adapter.attach import without

        return without(model)

    def save(self, model: Any, tokenizer_folder: Path, out: Path, base: Path) -> None:
        """Write a PEFT folder with the tokenizer and base.json, which says what `base`, the checkpoint it was trained on, is."""
        from lmforge.adapter.attach import save

        save(model, tokenizer_folder, out, base, self.four_bit)

    def open(self, base_model: Any, folder: Path) -> Any:
        """The adapter in `folder` on its base, in eval mode; CheckpointError where it was trained on another one."""
        from lmforge.inference.adapters import open_adapter

        return open_adapter(base_model, folder)

    def merged(self, model: Any) -> Any:
        """The attached model as a plain transformers model with the same output; uses `model` up."""
        from lmforge.adapter.attach import merged

        return merged(model)

    def merged_in_turn(self, bones: Any, read: Callable[[Sequence[str]], Mapping[str, Any]]) -> tuple[Any, Callable[[Sequence[str]], Mapping[str, Any]]]:
        """`merged` of an attached model whose base has no memory, its weights read by their names in it: the base, and a way to read what it becomes.

        Where `read` gives nothing, as on other ranks than the first, that gives nothing too. Uses `bones` up.
        """
        from lmforge.adapter.attach import merged_in_turn

        return merged_in_turn(bones, read)


def numel(weight: WeightLike) -> int:
    """Elements of a weight in all its layers."""
    count = weight.count
    for size in weight.shape:
        count *= size
    return count

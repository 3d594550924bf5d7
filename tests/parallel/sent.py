"""What a rank sends, by the collectives that torch issues."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lmforge.parallel.traffic import Traffic
from lmforge.training.module import TrainingModule


class Sent(TorchDispatchMode):
    """Bytes a rank sends where rings run the collectives that torch issues."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    @property
    def bytes(self) -> Traffic:
        return {kind: size for kind, size in self.sent.items() if size}

    @contextlib.contextmanager
    def of_steps(self) -> Iterator[None]:
        """Counts what training's forward and backward passes send, without those of the first step, in which a pipeline asks for shapes."""
        inner, seen = TrainingModule._backward, 0

        def watched(module: TrainingModule, batch: Any) -> Any:
            nonlocal seen
            seen += 1
            with self if seen > 1 else contextlib.nullcontext():
                return inner(module, batch)

        TrainingModule._backward = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            TrainingModule._backward = inner  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith(("c10d.", "_c10d_functional.")):
            self.count(name, args)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, args: Any) -> None:
        tensor = args[0][0] if isinstance(args[0], list) else args[0]
        bytes_ = tensor.numel() * tensor.element_size()
        if "allgather" in name or "all_gather" in name:
            ranks = args[1] if "functional" in name else args[0].numel() // args[1].numel()
            self.sent["all_gather"] += (ranks - 1) * (bytes_ if "functional" in name else args[1].numel() * args[1].element_size())
        elif "reduce_scatter" in name:
            self.sent["reduce_scatter"] += args[1].numel() * args[1].element_size() - bytes_
        elif "all_reduce" in name or "allreduce" in name:
            group = dist.distributed_c10d._resolve_process_group(args[2]) if "functional" in name else dist.ProcessGroup.unbox(args[1])
            self.sent["all_reduce"] += 2 * (group.size() - 1) * bytes_ // group.size()
        elif name.startswith("c10d.send"):
            self.sent["send"] += bytes_
        elif name.startswith("c10d.recv"):
            pass
        elif "wait" not in name and "wrap" not in name and "barrier" not in name:
            raise AssertionError(name)

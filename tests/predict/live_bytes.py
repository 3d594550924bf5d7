"""Bytes of live tensors, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Bytes of storages that operations were given or made, and that still live.

    torch's own MemTracker (torch.distributed._tools) says the same where it runs: it refuses frozen weights, and a second step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.made = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look((args, kwargs), "given to", func)
        out = func(*args, **(kwargs or {}))
        self.look(out, "made by", func)
        return out

    def look(self, tree: Any, how: str, func: Any) -> None:
        for one in tree_iter(tree):
            if isinstance(one, torch.Tensor):
                # A DTensor has no bytes of its own, but says that it has those of the whole.
                real = (
                    [part for name in one.__tensor_flatten__()[0] if isinstance(part := getattr(one, name), torch.Tensor)]
                    if is_traceable_wrapper_subclass(one)
                    else [one]
                )
                for tensor in real:
                    self.see(tensor.untyped_storage(), f"{how} {func} {tuple(one.shape)} {str(one.dtype)[6:]}")

    def see(self, storage: torch.UntypedStorage, made: str) -> None:
        if storage.device.type == "meta":
            return
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self.forget, key)
        self.now += size - self.sizes[key]  # FSDP2 gives storages back and takes them again
        self.sizes[key] = size
        if self.now > self.peak:
            self.peak, self.made = self.now, made

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Sees storages that change their size without an operation."""
        real = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            found = real(storage, size)
            self.see(storage, "resized")
            return found

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = real  # type: ignore[method-assign]

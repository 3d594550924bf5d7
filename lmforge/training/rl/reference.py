"""The policy that training started from, which the KL is taken to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

Reference = Callable[[Any], AbstractContextManager[Any]]  # of the policy as it is now; gives the reference within a block


def frozen(model: Any) -> Reference:
    """A copy of its own; it follows the policy to its device."""
    model.requires_grad_(False).eval()

    def of(policy: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext(model.to(policy.device))

    return of


def adapter_off(off: Callable[[Any], AbstractContextManager[Any]]) -> Reference:
    """The policy with its adapter switched off: no second copy."""

    @contextlib.contextmanager
    def of(policy: Any) -> Iterator[Any]:
        with off(policy):
            yield policy

    return of

"""A tree of tensors and plain values as JSON and named tensors, and back.

A tensor's path is the tuple of keys that lead to it, `("weights", "model.norm.weight")`; its name on disk is the same as a JSON pointer without
the first slash (RFC 6901: `~` is `~0`, `/` is `~1`), so that no key is forbidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Path = tuple[str | int, ...]
Skeleton = Any  # JSON: a plain value, or one of {"tensor": name}, {"dict": [[key, skeleton], ...]}, {"list": [...]}, {"tuple": [...]}, {"float": "nan"}
ABSENT = object()  # stands for a tensor that was not asked for


def name_of(path: Path) -> str:
    return "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)


def flatten(tree: Any) -> tuple[Skeleton, dict[str, Tensor]]:
    """The tree without its tensors, and those by name. TypeError for a value that is neither a tensor nor plain."""
    tensors: dict[str, Tensor] = {}
    return _flatten(tree, (), tensors), tensors


def _flatten(tree: Any, path: Path, tensors: dict[str, Tensor]) -> Skeleton:
    if isinstance(tree, Tensor):
        name = name_of(path)
        if name in tensors:
            raise TypeError(f"{name}: two keys of a training state read the same")
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[_key(key, path), _flatten(value, (*path, key), tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_flatten(value, (*path, index), tensors) for index, value in enumerate(tree)]}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": repr(float(tree))}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{name_of(path)}: a training state cannot hold a {type(tree).__name__}")


def _key(key: Any, path: Path) -> str | int:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise TypeError(f"{name_of(path)}: a key of a training state is text or a whole number, not {key!r}")
    return key


def merge(skeletons: Sequence[Skeleton]) -> Skeleton:
    """One tree of what the ranks hold: keys of all of them; where two hold a value, that of the lowest rank."""
    merged = skeletons[0]
    for one in skeletons[1:]:
        merged = _merge(merged, one)
    return merged


def _merge(low: Skeleton, high: Skeleton) -> Skeleton:
    kind = _kind(low)
    if kind not in ("dict", "list", "tuple") or kind != _kind(high) or low == high:
        return low
    if kind == "dict":
        ours, theirs = dict(low["dict"]), dict(high["dict"])
        both = {key: _merge(value, theirs[key]) if key in theirs else value for key, value in ours.items()}
        return {"dict": [[key, value] for key, value in (theirs | both).items()]}
    if len(low[kind]) != len(high[kind]):
        raise TypeError(f"ranks hold lists of {len(low[kind])} and {len(high[kind])} values under one key of the training state")
    return {kind: [_merge(a, b) for a, b in zip(low[kind], high[kind], strict=True)]}


def _kind(skeleton: Skeleton) -> str:
    return next(iter(skeleton)) if isinstance(skeleton, dict) else ""


def paths(skeleton: Skeleton, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Where each tensor is in the tree, and its name."""
    kind = _kind(skeleton)
    if kind == "tensor":
        yield path, skeleton["tensor"]
    elif kind == "dict":
        for key, value in skeleton["dict"]:
            yield from paths(value, (*path, key))
    elif kind in ("list", "tuple"):
        for index, value in enumerate(skeleton[kind]):
            yield from paths(value, (*path, index))


def tensors(tree: Any) -> dict[Path, Tensor]:
    """Its tensors by their paths: what `Saved.tree` may read into."""
    skeleton, named = flatten(tree)
    return {path: named[name] for path, name in paths(skeleton)}


def unflatten(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> Any:
    """The tree again. A tensor that `tensors` lacks is left out of a dict, and None in a list."""
    tree = _unflatten(skeleton, tensors)
    return None if tree is ABSENT else tree


def _unflatten(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> Any:
    kind = _kind(skeleton)
    if kind == "tensor":
        return tensors.get(skeleton["tensor"], ABSENT)
    if kind == "float":
        return float(skeleton["float"])
    if kind == "dict":
        found = {key: _unflatten(value, tensors) for key, value in skeleton["dict"]}
        return {key: value for key, value in found.items() if value is not ABSENT}
    if kind in ("list", "tuple"):
        values = [None if value is ABSENT else value for value in (_unflatten(one, tensors) for one in skeleton[kind])]
        return values if kind == "list" else tuple(values)
    return skeleton

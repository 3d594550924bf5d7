"""larger: the hardware options whose devices would hold what this machine's do not."""

from __future__ import annotations

from typing import Any

from lmforge.compose.catalog import Catalog
from lmforge.explain.words import gib


def larger(need: int, devices: int) -> str:
    """The smallest hardware of as many devices whose devices hold so many bytes, by option, else what a device would have to have."""
    catalog = Catalog.of()
    known = {name: whole(catalog, "hardware", name) for name in sorted(catalog.options["hardware"])}
    enough = [
        (one["memory_bytes"], one["devices"], name)
        for name, one in known.items()
        if one.get("accelerator") == "cuda" and one["devices"] >= devices and one["memory_bytes"] >= need
    ]
    if enough:
        return f"plan for hardware={min(enough)[2]}"
    return f"{'each device' if devices > 1 else 'the device'} would have to have {gib(need)}, or model= or seq_len= be smaller"


def whole(catalog: Catalog, group: str, option: str) -> dict[str, Any]:
    """An option with the options of its own group that its defaults list names, as Hydra puts them together at the top level."""
    own = catalog.load(group, option)
    names = [one for one in own.pop("defaults", []) if isinstance(one, str) and one != "_self_"]
    found: dict[str, Any] = {}
    for name in names:
        found |= whole(catalog, group, name)
    return found | own

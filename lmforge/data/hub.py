"""Rows of a data set on the Hugging Face hub, or of a local data set folder, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lmforge.data.files import Raw
from lmforge.errors import DataError

TIMEOUT_S = 10.0


def rows(name: str, config: str | None, revision: str | None, split: str, max_rows: int | None) -> Iterator[Raw]:
    """The first `max_rows` rows (null: all) of a split, in the data set's order; one DataError for whatever keeps it from loading."""
    label = f"{Path(name).name if Path(name).is_dir() else name}[{split}]"  # where a local folder lies is nobody's business
    number = 0
    try:
        for number, value in enumerate(islice(_open(name, config, revision, split), max_rows), 1):
            yield Raw(label, number, {key: one for key, one in value.items() if one is not None})
    except Exception as error:  # the hub's client, its HTTP library and every file format raise their own kinds
        what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = f"{name}[{split}], after row {number}" if number else f"{name}[{split}]"
        raise DataError(where, f"cannot be read: {what}", "check data.name, data.config, data.split and the network, or give a local folder") from error


def _open(name: str, config: str | None, revision: str | None, split: str) -> Any:
    import datasets
    import huggingface_hub

    if not Path(name).is_dir():  # one request without retries, so that no network, no such name and no access show within seconds
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S)
    return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)

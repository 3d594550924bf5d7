"""A fingerprint is of the weights, whoever wrote them and in however many files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmforge.errors import CheckpointError
from lmforge.inference.base import BLOCK_BYTES, check_base, identify, read_base, write_base


def folder(path: Path, *files: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.mkdir()
    for index, tensors in enumerate(files):
        save_file(tensors, path / f"model-{index}.safetensors", metadata=metadata)
    return path


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"b": torch.randn(3, 4, generator=generator), "a": torch.randn(300, 400, generator=generator)}


def test_neither_shards_nor_metadata_matter(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    one = identify(folder(tmp_path / "one", tensors))
    assert identify(folder(tmp_path / "two", {"a": tensors["a"]}, {"b": tensors["b"]}, metadata={"format": "pt"})) == one


@pytest.mark.parametrize("whole_bytes", [2**32, 100])
def test_any_trained_tensor_shows(tensors: dict[str, torch.Tensor], tmp_path: Path, whole_bytes: int) -> None:
    before = identify(folder(tmp_path / "one", tensors), whole_bytes)
    for number, name in enumerate(tensors):
        other = {**tensors, name: tensors[name] + 1e-6}
        after = identify(folder(tmp_path / f"other{number}", other), whole_bytes)
        assert after[0] != before[0]
        assert after[1] == before[1]
    assert before[0].startswith("sampled-") is (whole_bytes == 100)


def test_a_sample_reads_three_blocks_of_a_tensor(tmp_path: Path) -> None:
    large = torch.zeros(4 * BLOCK_BYTES // 4)
    before = identify(folder(tmp_path / "one", {"a": large}), 100)[0]
    for place, shows in ((0, True), (len(large) // 2, True), (len(large) - 1, True), (BLOCK_BYTES // 4 + 10, False)):
        changed = large.clone()
        changed[place] = 1
        path = folder(tmp_path / f"at{place}", {"a": changed})
        assert (identify(path, 100)[0] != before) is shows
        assert identify(path)[0] != identify(tmp_path / "one")[0]


@pytest.mark.parametrize("other", [{"a": torch.zeros(2, 3)}, {"b": torch.zeros(3, 2)}, {"a": torch.zeros(3, 2).half()}])
def test_another_architecture_shows(other: dict[str, torch.Tensor], tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", {"a": torch.zeros(3, 2)}), folder(tmp_path / "two", other)
    assert identify(one)[1] != identify(two)[1]
    write_base(one, one, None)
    with pytest.raises(CheckpointError, match="other names, shapes or dtypes"):
        check_base(one, two)


def test_an_adapter_without_base_json_is_taken_at_its_word(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    one = folder(tmp_path / "one", tensors)
    check_base(tmp_path, one)


def test_the_same_weights_pass(checkpoint: Path, tmp_path: Path) -> None:
    write_base(tmp_path, checkpoint, {"quant_type": "nf4", "double_quant": True})
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"anything": 1}))
    check_base(tmp_path, copy)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="was trained on another base: ") as caught:
        check_base(tmp_path, copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "four_bit",
    [
        {"quant_type": "int4", "double_quant": True},
        {"quant_type": ["nf4"], "double_quant": True},
        {"quant_type": "nf4", "double_quant": 1},
        {"quant_type": "nf4", "double_quant": True, "blocksize": 64},
        {"quant_type": "nf4"},
        {},
        "nf4",
        ["quant_type", "double_quant"],
        False,
    ],
)
def test_what_4_bits_are_is_checked(four_bit: Any, checkpoint: Path, tmp_path: Path) -> None:
    write_base(tmp_path, checkpoint, four_bit)
    with pytest.raises(CheckpointError, match="four_bit is not null or quant_type nf4 or fp4") as caught:
        read_base(tmp_path)
    assert "\n" not in str(caught.value)
    for fine in (None, {"quant_type": "fp4", "double_quant": False}):
        write_base(tmp_path, checkpoint, fine)
        said = read_base(tmp_path)
        assert said is not None
        assert said.four_bit == fine


@pytest.mark.parametrize("spoil", ["cut", "header", "none"])
def test_what_is_no_safetensors_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path, spoil: str) -> None:
    one = folder(tmp_path / "one", tensors)
    path = one / "model-0.safetensors"
    data = path.read_bytes()
    if spoil == "none":
        path.unlink()
    else:
        path.write_bytes(data[:5] if spoil == "header" else data[:-100])
    with pytest.raises(CheckpointError):
        identify(one)

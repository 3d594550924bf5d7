"""`merge ADAPTER OUT`: the base is found, and the folder is what adapter and base mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmforge.__main__ import main
from lmforge.inference.adapters import open_adapter
from lmforge.inference.checkpoint import open_model
from lmforge.inference.forward import logits
from tests.adapter import tiny

GIVEN = tiny.batch(vocabulary=300)


@torch.no_grad()
def says(model: Any) -> torch.Tensor:
    return logits(model, GIVEN)


def expected(output: Path, step: str = "sft-bbbb2222") -> torch.Tensor:
    return says(open_adapter(open_model(output / "steps" / "pretrain-aaaa1111" / "checkpoint"), output / "steps" / step / "adapter"))


@pytest.mark.parametrize("reference", ["20260101-000000-sft", "sft-bbbb2222", "bbbb"])
def test_a_run_a_step_or_a_digest(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str) -> None:
    assert main(["merge", reference, str(tmp_path / "out"), f"output={output}"]) == 0
    assert (says(open_model(tmp_path / "out")) - expected(output)).abs().max() < 2e-5
    said = capsys.readouterr().out
    assert "merged into its base" in said
    assert said.count("\n") == 1


def test_a_peft_folder_finds_its_base(output: Path, tmp_path: Path) -> None:
    assert main(["merge", str(output / "steps" / "sft-bbbb2222" / "adapter"), str(tmp_path / "out")]) == 0
    assert (says(open_model(tmp_path / "out")) - expected(output)).abs().max() < 2e-5


def test_an_output_folder_that_moved(output: Path, tmp_path: Path) -> None:
    """The folder that adapter_config.json names is gone; the step's inputs still say which step it was."""
    moved = shutil.copytree(output, tmp_path / "moved")
    adapter = moved / "steps" / "sft-bbbb2222" / "adapter"
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace(str(output), "/nowhere"))
    decoy = shutil.copytree(moved / "steps" / "pretrain-aaaa1111", moved / "steps" / "pretrain-00000000")
    tiny.checkpoint_folder(decoy / "checkpoint", adapter, seed=9)  # a step of the same name and other weights
    assert main(["merge", "bbbb", str(tmp_path / "out"), "--output", str(moved)]) == 0
    assert (says(open_model(tmp_path / "out")) - expected(output)).abs().max() < 2e-5


def test_a_soft_prompt_goes_along(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "cccc", str(tmp_path / "out"), f"output={output}"]) == 0
    assert "cannot be merged" in capsys.readouterr().out
    assert (says(open_model(tmp_path / "out")) - expected(output, "sft-cccc3333")).abs().max() < 2e-5


def test_the_base_can_be_given(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = shutil.copytree(output / "steps" / "sft-bbbb2222" / "adapter", tmp_path / "adapter")
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace(str(output), "/nowhere"))
    assert main(["merge", str(adapter), str(tmp_path / "one"), f"output={output}"]) == 2
    assert "type --base" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(tmp_path / "one"), "--base", "aaaa", f"output={output}"]) == 0
    other = tiny.checkpoint_folder(tmp_path / "other", adapter, seed=3)
    assert main(["merge", str(adapter), str(tmp_path / "two"), "--base", str(other)]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["aaaa", "OUT"], "made no adapter"),
        (["zzzz", "OUT"], "no such run, step or digest"),
        (["HERE", "OUT"], "not an adapter folder"),
        (["bbbb", "HERE"], "is there already"),
        (["bbbb"], "required"),
        (["bbbb", "OUT", "--bse", "x"], "unrecognized"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    (tmp_path / "here").mkdir()
    named = {"OUT": str(tmp_path / "out"), "HERE": str(tmp_path / "here")}
    assert main(["merge", *(named.get(word, word) for word in words), f"output={output}"]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.strip().count("\n") == 0
    assert said.out == ""


def test_help_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["merge", "--help"])
    assert ended.value.code == 0
    assert "--base" in capsys.readouterr().out

"""`plan --table`: sizes from 400m to gpt3_175b from formulae, on the hardware typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cli = Callable[..., Any]


def test_the_table_on_a_node(cli: Cli) -> None:
    answer = cli("plan", "--table", "hardware=h100x8")
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    lines = answer.out.splitlines()
    assert lines[0].startswith("NVIDIA H100 80GB HBM3: 8 x cuda; hardware=h100x8 precision=bf16 parallel=")
    cells = {line.split()[0]: line.split() for line in lines[2:7]}
    assert cells["400m"][1:4] == ["400M", "8B", "1.92e+19"]
    assert cells["1b"][1:4] == ["1B", "20B", "1.2e+20"]
    assert cells["7b"][1:4] == ["7B", "140B", "5.88e+21"]
    assert cells["70b"][1:4] == ["70B", "1.4T", "5.88e+23"]
    assert cells["gpt3_175b"][1:4] == ["175B", "3.5T", "3.67e+24"]
    assert cells["7b"][4] == "1,651"  # 5.88e21 / 989.4e12 / 3600
    assert cells["7b"][-1] == "7,298,617,344"


def test_what_does_not_fit_says_so_and_keeps_its_formulae(cli: Cli) -> None:
    answer = cli("plan", "--table", "hardware=h100x1", "parallel=single")
    assert answer.code == 0
    assert any(line.startswith("70b: needs ") for line in answer.out.splitlines())
    assert "5.88e+23" in answer.out


def test_what_it_does_not_read_is_refused(cli: Cli) -> None:
    answer = cli("plan", "--table", "hardware=h100x8", "model=7b")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "model=7b: is not read by --table" in answer.err
    assert cli("plan", "--table", "--json", "hardware=h100x8").code == 2
    assert cli("plan", "--table", "--launch", "hardware=h100x8").code == 2

"""Scaling laws: Hoffmann et al.'s published figures, the optimum by search, and files that are no law."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import ConfigError
from lmforge.predict.law import Law, read, rule, said
from lmforge.predict.table import Row, rows

HOFFMANN = {"form": "chinchilla", "E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def law(**changes: Any) -> Law:
    return Law(**{**{name: value for name, value in HOFFMANN.items() if name != "form"}, **changes})


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: Any) -> str:
        path = tmp_path / "law.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


def test_the_published_constants_give_the_published_exponents_and_loss() -> None:
    """Hoffmann et al. 2022, table 2: a = 0.46 and b = 0.54 by approach 3; equation 10's loss of Chinchilla (70B on 1.4T) by hand: 1.69 + 0.0836 + 0.1631."""
    small, large = law().best(1e21), law().best(1e23)
    assert math.log(large.parameters / small.parameters) / math.log(100) == pytest.approx(0.4516, abs=5e-4)
    assert math.log(large.tokens / small.tokens) / math.log(100) == pytest.approx(0.5484, abs=5e-4)
    assert law().loss(70e9, 1.4e12) == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28, rel=1e-12)
    assert law().loss(70e9, 1.4e12) == pytest.approx(1.9367, abs=1e-4)


@pytest.mark.parametrize("constants", [{}, {"alpha": 0.5, "beta": 0.5}, {"A": 1e4, "beta": 0.1}, {"E": 0.0, "alpha": 1.2}])
@pytest.mark.parametrize("flops", [1e15, 5.88e21, 1e26])
def test_the_optimum_spends_the_flops_and_no_other_size_is_better(constants: dict[str, float], flops: float) -> None:
    fitted = law(**constants)
    best = fitted.best(flops)
    assert 6 * best.parameters * best.tokens == pytest.approx(flops, rel=1e-9)
    least = fitted.loss(best.parameters, best.tokens)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert fitted.loss(best.parameters * factor, best.tokens / factor) >= least


def test_the_rule_is_twenty_tokens_a_parameter() -> None:
    best = rule(5.88e21)
    assert (best.parameters, best.tokens) == (pytest.approx(7e9), pytest.approx(140e9))


def test_the_table_of_round_sizes() -> None:
    """By hand: 6 x 7e9 x 140e9 = 5.88e21; an H100's 989.4e12 FLOP/s take 1,651 hours for it."""
    by_name = {row.option: row for row in rows()}
    assert list(by_name) == ["400m", "1b", "7b", "70b", "gpt3_175b"]
    assert (by_name["7b"].tokens, by_name["7b"].flops) == (140e9, pytest.approx(5.88e21, rel=1e-12))
    assert by_name["gpt3_175b"].flops == pytest.approx(6 * 175e9 * 3.5e12)
    assert Row("7b", 7e9).hours_at(989.4e12) == pytest.approx(1650.8, abs=0.1)


def test_a_file_is_read_with_its_bounds_and_source(file: Any) -> None:
    found = read(file({**HOFFMANN, "bounds": {"N": [7e7, 1.6e10]}, "source": "arXiv 2203.15556", "residuals": [0.1]}))
    assert (found.E, found.alpha, found.bounds, found.source) == (1.69, 0.34, {"N": (7e7, 1.6e10)}, "arXiv 2203.15556")
    assert found.beyond(1e9, 1e20) == ""
    assert found.beyond(1e6, 1e9) == "fitted on N of 7e+07 to 1.6e+10"


NO_LAWS = {
    "no JSON": ("form: chinchilla", "no JSON"),
    "no object": ([1, 2], "no JSON object"),
    "another form": ({**HOFFMANN, "form": "kaplan"}, "its form is 'kaplan'"),
    "no form": ({"E": 1.0}, "its form is None"),
    "a key missing": ({name: value for name, value in HOFFMANN.items() if name != "beta"}, "it has no 'beta'"),
    "a key mistyped": ({**{name: value for name, value in HOFFMANN.items() if name != "beta"}, "betta": 0.3}, "did you mean 'betta'?"),
    "text": ({**HOFFMANN, "A": "406"}, "A is '406', not a positive number"),
    "true": ({**HOFFMANN, "A": True}, "A is True"),
    "zero": ({**HOFFMANN, "alpha": 0}, "alpha is 0, not a positive number"),
    "negative": ({**HOFFMANN, "E": -1}, "E is -1, not a number of at least 0"),
    "NaN": ('{"form": "chinchilla", "E": NaN, "A": 1, "B": 1, "alpha": 1, "beta": 1}', "E is nan"),
    "infinite": ('{"form": "chinchilla", "E": 1, "A": 1e999, "B": 1, "alpha": 1, "beta": 1}', "A is inf"),
    "a huge integer": ({**HOFFMANN, "A": 10**400}, "A is 1000"),
    "no optimum": ({**HOFFMANN, "alpha": 1e-6, "beta": 1e-6}, "no finite compute-optimal size"),
    "bad bounds": ({**HOFFMANN, "bounds": {"N": [2, 1]}}, "bounds are"),
    "unknown bounds": ({**HOFFMANN, "bounds": {"C": [1, 2]}}, "bounds are"),
    "nested too deep": ("[" * 100_000, "no JSON"),
    "too large": (" " * (2**20 + 1), "larger than 1 MiB"),
}


@pytest.mark.parametrize(("content", "what"), NO_LAWS.values(), ids=NO_LAWS.keys())
def test_a_file_that_is_no_law_is_one_line(content: Any, what: str, file: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        read(file(content))
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_no_file_is_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(str(tmp_path / path))


def test_what_is_said_without_a_law_and_with_one() -> None:
    plain = list(said(None, 7_000_000_000, 7_000_000_000, 140_000_000_000))
    assert plain == [
        "20 tokens a parameter",
        "compute-optimal for 6ND = 5.88e+21 FLOPs: 7e+09 parameters on 1.4e+11 tokens, by Hoffmann et al.'s rule of 20 tokens a parameter",
    ]
    lines = list(said(law(bounds={"D": (1.0, 1e9)}), 7_000_000_000, 7_000_000_000, 140_000_000_000))
    assert lines[1].endswith("by the law")
    assert lines[2].startswith(f"expected loss {law().loss(7e9, 140e9):.4g} nats a token")
    assert lines[2].endswith("beyond what it was fitted on D of 1 to 1e+09")


def test_earlier_tokens_count_and_unknown_ones_are_said() -> None:
    assert next(said(None, 100, 100, 200, before=1800)) == "2 tokens a parameter, 20 with those before"
    assert list(said(law(), 100, 100, 200, before=None)) == ["2 tokens a parameter; how many its weights have seen before is not known"]

"""The short ways of composing come to what Hydra's own way comes to, and end where files change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lmforge.compose import App, Composed, app
from lmforge.compose.catalog import Catalog
from lmforge.compose.merge import merged
from lmforge.compose.overrides import PLAINEST, parsed
from lmforge.errors import ConfigError

WORDS = [
    ["stage=dpo", "model=7b", "parallel=fsdp", "hardware=h100x8"],
    ["stage=[sft,dpo]", "stage.dpo.optimizer=muon", "stage.dpo.optimizer.lr=2e-6", "seed=7"],
    ["stage=ppo", "stage.ppo.reward=length", "optimizer/schedule=wsd"],
    ["stage=sft", "name=7b", "model.tokenizer=bpe", "model.tokenizer.vocab_size=512"],
    *([f"experiment={option}", "seed=3"] for option in sorted(Catalog.of().options["experiment"])),
]
HYDRAS = [["stage=sft", "hydra.verbose=true"], ["stage=sft", "stage.sft.budget={steps: 3}"], ["stage=sft", "name=b", "output='a/${name}'"]]
TEXTS = """
a.b=1 a/b=7b a=1e-4 a=1e4 a=1.5 a=.5 a=01 a=-3 a=-1e-5 a=1_000 a=fsdp a=true a=None a=Null a=nan a=inf a=-inf a=a-b a=a_b a=1. a=400m a=1e5b a=INF
a=0.1 a=00.1 ++a.b=3 +a=3 a=7b_x a=0 a=-0 a=0e1 a=h100x8 a=123abc456 a=1e400 a=True a=nulls a=1e a=0x1 a= a=[1] a=3.0e+2 a=_x a=1b2e3 a=7nan a=2.5m
""".split()  # noqa: SIM905


def hydras(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Composed:
    with monkeypatch.context() as patch:
        patch.setattr(app, "merged", lambda catalog, typed: None)
        return App(words).compose()


def own(choices: dict[str, Any]) -> dict[str, Any]:
    return {group: option for group, option in choices.items() if not group.startswith("hydra/")}


@pytest.mark.parametrize("words", [*WORDS, *HYDRAS], ids=" ".join)
def test_both_ways_compose_the_same(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = App(words).compose(), hydras(words, monkeypatch)
    assert repr(ours.config) == repr(theirs.config)  # the order of keys too
    assert own(ours.choices) == own(theirs.choices)
    again = App(words)
    assert (merged(again.catalog, again.typed) is not None) == (words in WORDS)


def test_a_composition_is_its_callers_own() -> None:
    words = WORDS[0]
    before = repr(App(words).compose().config)
    App(words).compose().config["stage"]["dpo"].clear()
    assert repr(App(words).compose().config) == before


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    for text in ("seed: 1", "seed: 23"):
        file.write_text(f"# @package _global_\ndefaults:\n  - override /stage: [sft]\n{text}\n")
        assert App(["experiment=mine"], str(tmp_path)).compose().config["seed"] == int(text.split()[1])
    file.unlink()
    with pytest.raises(ConfigError, match="unknown option 'mine'"):
        App(["experiment=mine"], str(tmp_path))


@pytest.mark.parametrize("text", TEXTS)
def test_a_plain_override_is_parsed_as_hydra_parses_it(text: str) -> None:
    ours, theirs = parsed(text), OverridesParser.create().parse_override(text)
    ours.config_loader = theirs.config_loader = None
    assert repr(ours) == repr(theirs)


def test_most_words_are_plain() -> None:
    assert all(PLAINEST.fullmatch(one) for one in ("model=7b", "stage=dpo", "optimizer.lr=1e-4", "seed=3", "optimizer/schedule=wsd", "hardware=h100x8"))

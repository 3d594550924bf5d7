"""Pairs, majority, agreement: against numbers computed by hand, and scikit-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lmforge.data import dialects
from lmforge.formats.samples import Sampled
from lmforge.ranking import pairs
from lmforge.ranking.pairs import FIRST, SECOND, TIE
from lmforge.ranking.ratings import Rating, Ratings

from .conftest import HOSTILE, SAMPLES, halted, sampled

Rank = Callable[..., None]


def test_a_ranking_says_of_every_pair_which_is_better() -> None:
    rating = Rating("train-0", "ann", ((2,), (0, 3), (1,)), "ranked")
    assert pairs.verdicts(rating) == {(0, 1): FIRST, (0, 2): SECOND, (0, 3): TIE, (1, 2): SECOND, (1, 3): SECOND, (2, 3): FIRST}
    assert pairs.verdicts(Rating("train-0", "ann", ((2,),), "open")) == pairs.verdicts(Rating("train-0", "ann", (), "skipped")) == pairs.verdicts(None) == {}


def test_rows_go_through_the_reader_of_preference_data(ratings: Ratings, ranked: Rank, tmp_path: Path) -> None:
    """What is exported is what `data=text` takes: every row parses, with the same texts."""
    ranked("ann", "train-0", [[0], [1, 2]])
    ranked("ann", "train-3", [[2], [0], [1]])
    ranked("ann", "train-6", [[1], [0]])
    found = pairs.preferences(SAMPLES, ratings, ["ann"])
    assert (len(found.rows), found.ties, found.judged) == (6, 1, 7)
    pairs.write(found.rows, tmp_path / "deep" / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "deep" / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    parsed = [dialects.parse(row, "text", None) for row in rows]
    assert {view for view, _ in parsed} == {"preference"}
    assert [(row["chosen"], row["rejected"]) for _, row in parsed][:2] == [("    return a + b\n", "    return a - b\n"), ("    return a + b\n", "    pass\n")]
    assert parsed[-1][1] | {"source": "train-6:0-1"} == {"prompt": SAMPLES[2].prompt, "chosen": "a safe one", "rejected": HOSTILE, "source": "train-6:0-1"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]


def test_a_majority_decides_and_what_has_none_is_dropped_and_counted(ratings: Ratings, ranked: Rank) -> None:
    for rater, order in {"ann": [[0], [1], [2]], "bob": [[0], [2], [1]], "cid": [[2], [0], [1]]}.items():
        ranked(rater, "train-0", order)
    ranked("ann", "train-3", [[0], [1, 2]])
    ranked("bob", "train-3", [[1], [0], [2]])
    ratings.append(Rating("train-6", "ann", (), "skipped"))
    found = pairs.preferences(SAMPLES, ratings, ["ann", "bob", "cid"])
    # train-0: 0 over 1 by all, 0 over 2 by two of three, 2 over 1 by two of three. train-3: 0-1 one each, 0-2 by both, 1-2 a tie against 1.
    assert [row["source"] for row in found.rows] == ["train-0:0-1", "train-0:0-2", "train-0:1-2", "train-3:0-2"]
    assert found.rows[2]["chosen"] == "    pass\n"
    assert (found.judged, found.ties, found.disagreements, found.empty) == (6, 0, 2, 0)
    assert str(found) == "4 preference rows of 6 pairs judged; left out: 2 disagreements"
    assert [row["source"] for row in pairs.preferences(SAMPLES, ratings, ["bob"]).rows][-3:] == ["train-3:0-1", "train-3:0-2", "train-3:1-2"]


def test_an_answer_of_white_space_makes_no_row(tmp_path: Path) -> None:
    samples = [sampled("a", "x", "one", " \n")]
    ratings = Ratings(tmp_path / "r.jsonl", samples)
    ratings.append(Rating("a", "ann", ((0,), (1,)), "ranked"))
    found = pairs.preferences(samples, ratings, ["ann"])
    assert (found.rows, found.judged, found.empty) == ([], 1, 1)


def test_a_cut_answer_makes_no_row_though_people_may_rank_it(ratings: Ratings, ranked: Rank) -> None:
    """A row's answers get an end token in training, which this one never had."""
    samples = [halted(SAMPLES[0], 1), SAMPLES[1]]
    ranked("ann", "train-0", [[1], [0], [2]])
    ranked("ann", "train-3", [[0], [1, 2]])
    found = pairs.preferences(samples, ratings, ["ann"])
    assert [row["source"] for row in found.rows] == ["train-0:0-2", "train-3:0-1", "train-3:0-2"]
    assert samples[0].answers[1].text not in {row[side] for row in found.rows for side in ("chosen", "rejected")}
    assert (found.judged, found.ties, found.cut) == (6, 1, 2)
    assert str(found) == "3 preference rows of 6 pairs judged; left out: 1 ties, 2 with an answer that was cut off"


def test_kappa_is_the_textbooks() -> None:
    """50 verdicts: 20 both first, 15 both second, 5 and 10 crossed. p = 0.7, e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.4."""
    raw, kappa = pairs.raw_and_kappa(Counter({(FIRST, FIRST): 20, (FIRST, SECOND): 5, (SECOND, FIRST): 10, (SECOND, SECOND): 15}))
    assert raw == pytest.approx(0.7)
    assert kappa == pytest.approx(0.4)
    # With ties, by hand: p = 6/10; left 5 first 3 tie 2 second, right 4 first 2 tie 4 second; e = (5*4 + 3*2 + 2*4) / 100 = 0.34
    table = Counter({(FIRST, FIRST): 3, (FIRST, SECOND): 2, (TIE, TIE): 1, (TIE, FIRST): 1, (TIE, SECOND): 1, (SECOND, SECOND): 2})
    assert sum(table.values()) == 10
    table = Counter({(FIRST, FIRST): 3, (FIRST, SECOND): 1, (FIRST, TIE): 1, (TIE, TIE): 1, (TIE, FIRST): 1, (TIE, SECOND): 1, (SECOND, SECOND): 2})
    raw, kappa = pairs.raw_and_kappa(table)
    assert raw == pytest.approx(0.6)
    assert kappa == pytest.approx((0.6 - 0.34) / (1 - 0.34))
    assert pairs.raw_and_kappa(Counter({(FIRST, FIRST): 7})) == (1.0, None)


def test_agreement_counts_only_pairs_that_both_judged(ratings: Ratings, ranked: Rank) -> None:
    ranked("ann", "train-0", [[0], [1], [2]])
    ranked("bob", "train-0", [[0], [2], [1]])
    ranked("ann", "train-3", [[0], [1], [2]])
    ratings.append(Rating("train-3", "bob", ((0,),), "open"))
    [found] = pairs.agreements(SAMPLES, ratings)
    # ann: first first first; bob: first first second. p = 2/3, e = 1 * 2/3, so kappa = 0.
    assert (found.first, found.second, found.pairs, found.prompts) == ("ann", "bob", 3, 1)
    assert found.raw == pytest.approx(2 / 3)
    assert found.kappa == pytest.approx(0)
    assert str(found) == "ann and bob: 67% of 3 pairs (1 prompts) judged alike, Cohen's kappa 0.00"


def test_people_count_before_methods(ratings: Ratings, ranked: Rank) -> None:
    ranked("reward:length", "train-3", [[0], [1], [2]])
    assert pairs.heard(ratings) == ["reward:length"]
    ranked("zoe", "train-3", [[0], [1], [2]])
    assert pairs.heard(ratings) == ["zoe"]
    assert ratings.raters == ["zoe", "reward:length"]


def test_samples_come_back_as_written(step: Path) -> None:
    from lmforge.formats import samples as format_

    found: list[Sampled] = format_.read(step / "samples")
    assert found == SAMPLES
    assert found[1].messages == [{"role": "user", "content": "Say hello"}]

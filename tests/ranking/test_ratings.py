"""ratings.jsonl: append-only, on disk when it says so, resumed, shared by processes, mended after a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmforge.errors import DataError, RunError
from lmforge.ranking.ratings import Rating, Ratings, name_complaint

from .conftest import SAMPLES

MANY = """
import sys
from pathlib import Path
from lmforge.formats.samples import Answer, Sampled
from lmforge.ranking.ratings import Rating, Ratings
samples = [Sampled("a", "x", tuple(Answer(str(n), 1, True, 0.0) for n in range(3)))]
ratings = Ratings(Path(sys.argv[1]), samples)
for number in range(60):
    ratings.append(Rating("a", sys.argv[2], ((number % 3,),), "open"))
"""


def test_what_was_said_is_there_again(ratings: Ratings) -> None:
    ratings.append(Rating("train-0", "ann", ((2,),), "open"))
    ratings.append(Rating("train-0", "ann", ((2,), (0,), (1,)), "ranked"))
    ratings.append(Rating("train-3", "ann", (), "skipped"))
    again = Ratings(ratings.file, SAMPLES)
    assert again.of("ann")["train-0"].places == ((2,), (0,), (1,))
    assert again.of("ann")["train-3"].state == "skipped"
    assert again.of("bob") == {}
    assert again.raters == ["ann"]
    assert len(ratings.file.read_text().splitlines()) == 3
    assert all(json.loads(line)["at"].endswith("+00:00") for line in ratings.file.read_text().splitlines())


def test_undo_goes_back_click_by_click_also_after_a_restart(ratings: Ratings) -> None:
    ratings.append(Rating("train-0", "ann", ((2,),), "open"))
    ratings.append(Rating("train-0", "ann", ((2,), (1,), (0,)), "ranked"))
    ratings.append(Rating("train-3", "bob", (), "skipped"))
    assert [one.places for one in ratings.before("ann")] == [(), ((2,),)]
    ratings.append(Rating("train-0", "ann", ((2,),), "open", undo=True))
    again = Ratings(ratings.file, SAMPLES)
    assert [one.places for one in again.before("ann")] == [()]
    assert again.of("ann")["train-0"].state == "open"
    assert again.raters == []


def test_two_processes_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "ratings.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", MANY, str(file), name]) for name in ("ann", "bob")]
    assert [one.wait(60) for one in running] == [0, 0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {name: [row["places"] for row in rows if row["rater"] == name] for name in ("ann", "bob")} == {
        name: [[[number % 3]] for number in range(60)] for name in ("ann", "bob")
    }


def test_one_that_is_open_sees_what_another_appends(ratings: Ratings) -> None:
    other = Ratings(ratings.file, SAMPLES)
    ratings.append(Rating("train-3", "ann", ((0,), (1,), (2,)), "ranked"))
    assert other.raters == []
    other.refresh()
    assert other.raters == ["ann"]
    other.append(Rating("train-3", "bob", ((0,), (1,), (2,)), "ranked"))
    ratings.append(Rating("train-6", "ann", (), "skipped"))
    assert ratings.raters == ["ann", "bob"]


def test_a_line_cut_by_a_crash_is_cut_off(ratings: Ratings) -> None:
    ratings.append(Rating("train-3", "ann", (), "skipped"))
    whole = ratings.file.read_bytes()
    ratings.file.write_bytes(whole + b'{"id": "train-0", "rat')
    again = Ratings(ratings.file, SAMPLES)
    assert set(again.of("ann")) == {"train-3"}
    again.append(Rating("train-6", "ann", (), "skipped"))
    assert ratings.file.read_bytes().startswith(whole)
    assert len(ratings.file.read_text().splitlines()) == 2
    assert set(Ratings(ratings.file, SAMPLES).of("ann")) == {"train-3", "train-6"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": "train-3"', "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"id": "gone", "rater": "a", "places": [], "state": "open", "at": ""}', "no prompt has the id 'gone'"),
        ('{"id": "train-3", "rater": "a", "places": [[7]], "state": "open", "at": ""}', "do not name answers of 3 once each"),
        ('{"id": "train-3", "rater": "a", "places": [[1], [1]], "state": "open", "at": ""}', "once each"),
        ('{"id": "train-3", "rater": "a", "places": [], "state": "later", "at": ""}', "not one of open, ranked, skipped"),
    ],
)
def test_a_line_that_is_no_rating_is_named(ratings: Ratings, line: str, why: str) -> None:
    ratings.append(Rating("train-3", "ann", (), "skipped"))
    with ratings.file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as caught:
        Ratings(ratings.file, SAMPLES)
    assert f"{ratings.file}:2" in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rating_that_makes_no_sense_is_not_written(ratings: Ratings) -> None:
    with pytest.raises(ValueError, match="a skipped prompt has no places"):
        ratings.append(Rating("train-3", "ann", ((0,),), "skipped"))
    assert not ratings.file.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Ratings(tmp_path / "file" / "ratings.jsonl", SAMPLES).append(Rating("train-3", "ann", (), "skipped"))


def test_names() -> None:
    assert [name for name in ("Ann B.", "Bö", "", " a", "reward:length", "x" * 41, "a\nb") if not name_complaint(name)] == ["Ann B.", "Bö"]

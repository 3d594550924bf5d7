"""metrics.jsonl through a kill, a resume, a full disk and what is not a number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest

from lmforge.errors import DataError, RunError
from lmforge.track.jsonl import Metrics, read


def test_what_is_logged_is_read_back_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "step" / "metrics.jsonl")
    metrics.log(10, {"loss": 2.5, "lr": 1e-3})
    (row,) = read(tmp_path / "step" / "metrics.jsonl")  # not closed yet: every line is flushed
    assert (row["step"], row["loss"], row["lr"]) == (10, 2.5, 1e-3)
    assert row["time"] > 1.7e9
    metrics.close()


def test_every_line_is_strict_json_and_keeps_what_is_not_finite(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "metrics.jsonl"
    Metrics(path).log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": numpy.float32(0.5), "e": 7})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"], row["e"]) == (math.inf, -math.inf, 0.5, 7)


def test_a_torn_last_line_is_left_out_and_never_grown_upon(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).log(1, {"loss": 3.0})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert [row["step"] for row in read(path)] == [1]
        metrics = Metrics(path)
        metrics.log(2, {"loss": 2.0})
        metrics.close()
        assert [row["step"] for row in read(path)] == [1, 2]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": float(step)})
    resumed = Metrics(path)
    resumed.rewind(25)
    resumed.log(30, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read(path)] == [(10, 10.0), (20, 20.0), (30, 0.5)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_broken_line_inside_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for broken in ("{oops", "[]", '{"loss": 1}', '{"step": null}'):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a line of metrics"):
            read(path)


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(RunError, match="/dev/full: cannot be written: No space left on device; free some space"):
        Metrics(Path("/dev/full")).log(1, {"loss": 1.0})


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []


def samples(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_tables_are_lines_at_the_step_logged_last_and_rewind_with_it(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.table("answers", ["prompt", "reward"], [["before", 0]])
    for step in (10, 20):
        metrics.log(step, {"loss": 1.0})
        metrics.table("answers", ["prompt", "reward"], [[f"a\nb{step}", numpy.float32(0.5)], ["c", math.inf]])
    metrics.close()
    rows = [{"prompt": "a\nb20", "reward": 0.5}, {"prompt": "c", "reward": "inf"}]
    assert samples(tmp_path)[2] == {"step": 20, "title": "answers", "rows": rows}
    resumed = Metrics(tmp_path / "metrics.jsonl")
    resumed.rewind(15)
    resumed.table("resumed", ["prompt"], [["p"]])
    assert [(one["step"], one["title"]) for one in samples(tmp_path)] == [(0, "answers"), (10, "answers"), (15, "resumed")]
    resumed.close()
    afresh = Metrics(tmp_path / "metrics.jsonl")
    afresh.rewind(0)
    assert samples(tmp_path) == []


def test_ranks_tables_reach_the_disk_and_the_tracker(tmp_path: Path) -> None:
    from rich.console import Console

    from lmforge.runtime.events import FileReport, Lines
    from lmforge.runtime.progress import LiveReport
    from lmforge.track.guard import Silent

    class Kept(Silent):
        tables: ClassVar[list[object]] = []

        def table(self, *given: object) -> None:
            self.tables.append(given)

    (tmp_path / "events").touch()
    rank = FileReport(tmp_path / "events")
    rank.log(7, {"loss": 1.0})
    rank.table("answers", ("prompt", "reward"), [("p", 0.5)])
    live = LiveReport("ppo", Console(quiet=True), Metrics(tmp_path / "metrics.jsonl"), Kept())
    with (tmp_path / "events").open() as events:
        Lines(events, live).pass_on()
    assert samples(tmp_path) == [{"step": 7, "title": "answers", "rows": [{"prompt": "p", "reward": 0.5}]}]
    assert Kept.tables == [("answers", ["prompt", "reward"], [["p", 0.5]])]

"""What tests of the whole program share: the command line in this process, a small corpus, and the shared reference data."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmforge.__main__ import main
from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.experiment import Experiment
from lmforge.plan import Plan

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub; without this an unknown name waits for it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that wait for each other are slow
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what it puts in the background so, and what tests start would be deaf to Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


@dataclass(frozen=True)
class Answer:
    """What one command line did."""

    code: int
    out: str
    err: str
    cpu_s: float
    written: list[str]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`cli("plan", "stage=dpo")`: the command line in an empty folder, in this process."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*words: str) -> Answer:
        capsys.readouterr()
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        started = time.process_time()
        try:
            code = main(list(words))
        finally:
            root.handlers[:], root.level = handlers, level  # Hydra's --info writes its log to the stderr of this test
        out, err = capsys.readouterr()
        return Answer(code, out, err, time.process_time() - started, sorted(path.name for path in folder.iterdir()))

    return run


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """`plan_of("stage=pretrain", until="place")`: the compiled plan of some overrides, composed in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, until: str = "estimate", config_dir: str | None = None) -> Plan:
        return compile(compose(*overrides, config_dir=config_dir), until=until)

    return make


@pytest.fixture
def experiment_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    """`experiment_of("stage=pretrain")`: the typed experiment of some overrides, composed in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return compose


def compose(*overrides: str, config_dir: str | None = None) -> Experiment:
    """Overrides to an experiment, as the verbs do it."""
    return experiment(App(list(overrides), config_dir).compose())


@pytest.fixture(scope="session")
def rows() -> Path:
    """Committed rows with all three views, so that plans do not depend on the Python version."""
    return FIXTURES / "corpus"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data that lies beside the repository; tests that read it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder

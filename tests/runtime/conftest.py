"""A corpus of three views cut from the standard library, small enough to run whole pipelines on in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

MODULES = ("argparse", "ast", "calendar", "configparser", "csv", "difflib", "fractions", "heapq", "inspect", "json/decoder", "textwrap", "zipfile")
# A tenth of a million parameters and a few steps: what is tested is the machinery, not the model.
SMALL = (
    "model=nano",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.vocab_size=512",
    "model.max_position_embeddings=64",
)
FEW = ("eval.max_tokens=2000", "eval.max_pairs=20", "eval.sample_tokens=8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text, chats and preference pairs."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    sources = [(library / f"{name}.py") if (library / f"{name}.py").is_file() else library / name / "__init__.py" for name in MODULES]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": text[start : start + 4000]}) + "\n" for text in texts for start in range(0, len(text), 4000))
    )
    lines = [line.strip() for text in texts for line in text.splitlines() if 20 < len(line.strip()) < 50][:400]
    pairs = list(zip(lines[0::2], lines[1::2], strict=True))
    chats = [{"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]} for ask, answer in pairs]
    (folder / "chat.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))
    preferences = [{"prompt": ask, "chosen": answer, "rejected": answer[::-1]} for ask, answer in pairs if answer != answer[::-1]]
    (folder / "preference.jsonl").write_text("".join(json.dumps(one) + "\n" for one in preferences))
    return folder


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def lmforge() -> Run:
    """`python -m lmforge` in a process of its own, without a network."""

    def run(*words: str, cwd: Path, check: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        alone = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}  # a test before may have left its service there
        env = alone | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "COLUMNS": "160", "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run([sys.executable, "-m", "lmforge", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
        assert check is None or done.returncode == check, f"{words}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def pipeline(corpus: Path) -> tuple[str, ...]:
    """Overrides of a whole pipeline on the small corpus."""
    stages = [f"stage.{name}.budget.steps=4" for name in ("pretrain", "sft", "dpo")]
    batches = [f"stage.{name}.optimizer.global_batch_tokens=1024" for name in ("pretrain", "sft", "dpo")]
    logs = [f"stage.{name}.log_every=1" for name in ("pretrain", "sft", "dpo")]
    return ("stage=[pretrain,sft,dpo]", "data=text", f"data.path={corpus}", *SMALL, *FEW, *stages, *batches, *logs, "quantize=int8")


@pytest.fixture(scope="session")
def finished(lmforge: Run, pipeline: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the pipeline ran once, and what that printed."""
    cwd = tmp_path_factory.mktemp("finished")
    return cwd, lmforge(*pipeline, cwd=cwd).stdout

"""The main job, whole: a config becomes a plan, the plan runs, and typed again it is done."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.conftest import Run


def steps(cwd: Path) -> dict[str, Path]:
    return {folder.name.rpartition("-")[0]: folder for folder in (cwd / "outputs/steps").iterdir() if (folder / "step.json").is_file()}


def record(folder: Path) -> dict[str, object]:
    return json.loads((folder / "step.json").read_text())


def test_prints_the_plan_first_then_one_table_a_sample_and_where_the_files_are(finished: tuple[Path, str]) -> None:
    _, printed = finished
    order = [printed.index(text) for text in ("FLOPs: 6N + 6LdT", "held-out perplexity", "untrained", "writes after", "files", "try")]
    assert order == sorted(order)
    for line in ("interpolated bigram model's", "preference accuracy by", "int8:", "held-out pairs"):
        assert line in printed


def test_every_checkpoint_opens_in_transformers_and_knows_its_chat_template(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cwd, _ = finished
    for name in ("pretrain", "sft", "dpo", "quantize"):
        folder = steps(cwd)[name] / "checkpoint"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
        assert torch.isfinite(logits).all()
        assert tokenizer.eos_token_id is not None


def test_each_step_records_its_plan_metrics_and_versions(finished: tuple[Path, str]) -> None:
    cwd, _ = finished
    written = record(steps(cwd)["dpo"])
    assert written["predicted"]["params_total"] == sum(value.numel() for value in load_file(steps(cwd)["dpo"] / "checkpoint/model.safetensors").values())
    assert written["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (steps(cwd)["dpo"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "rewards/margins"} <= lines[0].keys()
    # At the first step policy and reference are the same model: the loss is log 2 and the margin nothing.
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_no_resumable_state_is_left_behind(finished: tuple[Path, str]) -> None:
    cwd, _ = finished
    assert not list(cwd.glob("outputs/steps/*/state"))
    assert sorted(path.name for path in cwd.iterdir()) == ["outputs"]  # Hydra leaves nothing of its own


def test_typed_again_it_says_that_every_step_is_done_in_under_five_seconds(finished: tuple[Path, str], pipeline: tuple[str, ...], lmforge: Run) -> None:
    cwd, _ = finished
    before = {path: path.stat().st_mtime_ns for path in cwd.glob("outputs/steps/**/*") if path.is_file()}
    started = time.monotonic()
    printed = lmforge(*pipeline, cwd=cwd).stdout
    assert time.monotonic() - started < 5
    assert "every step is done already" in printed
    assert "held-out perplexity" in printed  # the table again, from what was recorded
    assert {path: path.stat().st_mtime_ns for path in cwd.glob("outputs/steps/**/*") if path.is_file()} == before


def test_another_beta_reruns_dpo_and_what_follows_and_nothing_before(finished: tuple[Path, str], pipeline: tuple[str, ...], lmforge: Run) -> None:
    cwd, _ = finished
    printed = lmforge("plan", "--json", *pipeline, "stage.dpo.beta=0.3", cwd=cwd).stdout
    statuses = {step["name"]: step["status"] for step in json.loads(printed)["steps"]}
    changed = {name for name, status in statuses.items() if status != "done"}
    assert changed == {"dpo", "eval.dpo", "quantize", "eval.quantize"}
    assert statuses["dpo"] == "stale"


def test_a_run_compares_with_another_and_diff_names_the_steps(finished: tuple[Path, str], pipeline: tuple[str, ...], lmforge: Run) -> None:
    cwd, _ = finished
    run = next((cwd / "outputs/runs").iterdir()).name
    shown = json.loads(lmforge("compare", run, steps(cwd)["pretrain"].name, "--json", cwd=cwd).stdout)
    assert run in shown["runs"]
    assert shown["metrics"]["eval.dpo.perplexity"][run] > 1
    printed = lmforge("diff", run, "--", *pipeline, "stage.dpo.beta=0.3", cwd=cwd).stdout
    assert "beta: 0.1 -> 0.3" in printed
    assert "~ dpo: runs again (beta)" in printed
    assert "pretrain: runs again" not in printed


def test_generate_takes_a_run_a_step_or_a_digest(finished: tuple[Path, str], lmforge: Run) -> None:
    cwd, _ = finished
    run, step = next((cwd / "outputs/runs").iterdir()).name, steps(cwd)["dpo"].name
    texts = {lmforge("generate", reference, "import ", "--max-new-tokens", "8", cwd=cwd).stdout for reference in (run, step, step.rpartition("-")[2][:8])}
    assert len(texts) == 1  # the run's last checkpoint is DPO's, and the seed is fixed


def test_a_stage_starts_from_a_run_and_keeps_its_shape(finished: tuple[Path, str], corpus: Path, lmforge: Run) -> None:
    cwd, _ = finished
    step = steps(cwd)["pretrain"].name
    words = ("stage=sft", f"stage.sft.init_from={step}", "stage.sft.budget.steps=1", "data=text", f"data.path={corpus}", "eval=none", "track=none")
    lmforge(*words, "stage.sft.optimizer.global_batch_tokens=1024", cwd=cwd)
    made = [folder for folder in (cwd / "outputs/steps").glob("sft-*") if (folder / "step.json").is_file()]
    shapes = {tuple(sorted((name, tuple(value.shape)) for name, value in load_file(one / "checkpoint/model.safetensors").items())) for one in made}
    assert len(made) == 2
    assert len(shapes) == 1


def test_truncated_weights_are_one_line(finished: tuple[Path, str], corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    cwd, _ = finished
    folder = tmp_path / "cut"
    shutil.copytree(steps(cwd)["pretrain"] / "checkpoint", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = lmforge("stage=sft", f"stage.sft.init_from={folder}", "data=text", f"data.path={corpus}", "eval=none", "track=none", cwd=tmp_path, check=2,
                   OMP_NUM_THREADS="1")  # fmt: skip
    assert done.stderr.startswith("plan error: ")  # before anything runs
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wandb_offline_files_hold_the_plan_the_group_and_the_job_type(finished: tuple[Path, str]) -> None:
    cwd, _ = finished
    files = {folder.parent.parent.parent.name.rpartition("-")[0]: folder for folder in cwd.glob("outputs/steps/*/wandb/offline-run-*/*.wandb")}
    assert {"pretrain", "sft", "dpo", "eval.dpo", "quantize"} <= set(files)
    text = files["dpo"].read_bytes().decode("latin-1")
    for said in ("pretrain-sft-dpo", "dpo", "beta", "global_batch_tokens"):
        assert said in text


def test_chats_of_ones_own_fine_tune_a_run_with_the_default_evaluation(finished: tuple[Path, str], corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    cwd, _ = finished
    words = ("stage=sft", f"stage.sft.init_from={steps(cwd)['pretrain']}", "data=text", f"data.path={corpus / 'chat.jsonl'}", "stage.sft.budget.steps=1")
    printed = lmforge(*words, "stage.sft.optimizer.global_batch_tokens=1024", "track=none", "eval.sample_tokens=8", cwd=tmp_path).stdout
    assert "answer perplexity" in printed
    assert record(steps(tmp_path)["eval.sft"])["metrics"]["answer_perplexity"] > 1
    assert record(steps(tmp_path)["eval.weights"])["metrics"]["answer_perplexity"] > 1  # and before, to compare

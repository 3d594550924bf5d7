"""Every layout gives the figures of one rank, undisturbed and across resumes under others. One spawn of 4 ranks and one of 2; 8 by benchmarks/parity.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny_mesh
from safetensors.torch import load_file
from tiny_mesh import TOLERANCE, Case, apart, figures

from lmforge.model.weights import sizes, splits, weights
from lmforge.parallel import traffic
from lmforge.parallel.layout import ONE
from lmforge.parallel.shards import Cut
from lmforge.parallel.traffic import Moved

pytestmark = pytest.mark.timeout(1500)  # the first test waits for all runs
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
LAYOUTS = {
    2: ("ddp", "fsdp", "fsdp_zero2", "hsdp", "tp", "pp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"),
    4: ("fsdp", "hsdp", "tp", "pp", "fsdp_tp", "fsdp_pp"),
}
# 97 divides by no number of ranks. Tensor parallel on more ranks than cores is slow, so that benchmarks/parity.py alone has it on 4 with both.
WHOLE = [(Case(f"{layout}-{ranks}-{vocabulary}", layout, vocabulary=vocabulary), ranks) for ranks, layouts in LAYOUTS.items() for layout in layouts
         for vocabulary in ((97,) if ranks == 4 and "tp" in layout else (64, 97))]  # fmt: skip
# 10 steps are enough where the layout itself has been seen.
SHORT = [
    Case("olmo2-tp", "tp", "olmo2", 97, 10),  # a norm over all heads
    Case("qwen2-tp", "tp", "qwen2", 97, 10),  # biases
    Case("qwen3-tp", "tp", "qwen3", 97, 10),  # a norm a head, a shared embedding
    Case("qwen3-fsdp", "fsdp", "qwen3", 97, 10),
    Case("fsdp-offloaded", "fsdp", steps=10, changes={"cpu_offload": True, "prefetch": 1}),
    Case("fsdp-recomputing", "fsdp", steps=10, changes={"activation_checkpointing": "selective", "data_workers": 1}),
    Case("tp-recomputing", "tp", steps=10, changes={"activation_checkpointing": "full"}),
    Case("pp-gpipe", "pp", steps=10, changes={"pp_schedule": "gpipe", "activation_checkpointing": "full"}),
    Case("deepspeed_zero3-recomputing", "deepspeed_zero3", steps=10, changes={"activation_checkpointing": "full"}),
]
# What ranks open a part at a time: drawn, or of bfloat16 files; with a shared embedding; cut unevenly (97); under an adapter.
OPENED = [
    Case(f"{start}-{layout}-{family}", layout, family, 97, 10, start=start, changes=changes)
    for start, layout, family, changes in (
        ("scratch", "fsdp", "llama", {}), ("scratch", "tp", "qwen3", {}), ("scratch", "pp", "llama", {}), ("folder", "fsdp", "qwen3", {"cpu_offload": True}),
        ("folder", "tp", "qwen2", {}), ("folder", "pp", "llama", {}), ("lora", "fsdp", "llama", {}),
    )
]  # fmt: skip
OPENED_BY_4 = [
    Case("folder-fsdp_tp-qwen3", "fsdp_tp", "qwen3", 97, 10, start="folder"),
    Case("scratch-fsdp_pp", "fsdp_pp", vocabulary=97, steps=10, start="scratch", counts=True),
    Case("scratch-fsdp_pp-kept", "fsdp_pp", vocabulary=97, steps=10, start="scratch", changes={"reshard_after_forward": False}, counts=True),
]
COMPUTE, REDUCE = {"compute_dtype": "bfloat16"}, {"reduce_dtype": "bfloat16"}
# The sums first: once DeepSpeed has been told of autocast in a process, it takes their dtype from there.
LOW = [Case(f"{layout}-bf16-sums", layout, steps=10, precision=REDUCE) for layout in ("ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero3")]
LOW += [Case(f"{layout}-bf16", layout, steps=10, precision=COMPUTE) for layout in ("ddp", "fsdp", "tp", "pp", "deepspeed_zero2", "deepspeed_zero3")]


def legs(name: str, **stops: int) -> list[Case]:
    """Parts of one run: each layout and the step at which it is told to stop (several ranks do so after the next one); -1 = go on to the end."""
    return [Case(name, layout, vocabulary=97, stop=stop) for layout, stop in stops.items()]


# In turn on 1, 4, 2 and 1 ranks.
BEGUN = legs("through-all", single=7)
FOUR = legs("fewer-and-fewer", fsdp=12, fsdp_tp=24)
TWO = [
    *legs("fewer-and-fewer", hsdp=36),
    *legs("through-all", fsdp=14, tp=20, pp=27, fsdp_zero2=35, ddp=42),
    *(Case("opened-in-parts", layout, vocabulary=97, steps=10, stop=stop, start="scratch") for layout, stop in (("fsdp", 3), ("tp", 6), ("pp", -1))),
    *legs("through-deepspeed", pp=8, deepspeed_zero3=16, fsdp=24, deepspeed_zero1=32, tp=40, deepspeed_zero2=-1),
]
ENDED = legs("through-all", single=-1) + legs("fewer-and-fewer", single=-1)
CHAINS = {"opened-in-parts": 3, "through-all": 7, "fewer-and-fewer": 4, "through-deepspeed": 6}


def reference(case: Case) -> Case:
    """The same run on one rank, undisturbed."""
    return Case(f"one-{case.family}-{case.vocabulary}-{case.steps}{case.start}", "single", case.family, case.vocabulary, case.steps, start=case.start)


def ours(cases: list[Case]) -> list[Case]:
    """Those that run here: DeepSpeed is an extra."""
    return [case for case in cases if DEEPSPEED or "deepspeed" not in case.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, done."""
    folder = tmp_path_factory.mktemp("meshes")
    references = {case.name: case for case in map(reference, [case for case, _ in WHOLE] + SHORT + OPENED + OPENED_BY_4)}
    for case in [*references.values(), *BEGUN]:
        tiny_mesh.run(case, folder)
    tiny_mesh.launch(folder, [*(case for case, ranks in WHOLE if ranks == 4), *FOUR, *OPENED_BY_4], 4)
    tiny_mesh.launch(folder, ours([*(case for case, ranks in WHOLE if ranks == 2), *SHORT, *OPENED, *TWO, *LOW]), 2)
    for case in ENDED:
        tiny_mesh.run(case, folder)
    return folder


def close(folder: Path, case: Case) -> None:
    if "deepspeed" in case.name:
        pytest.importorskip("deepspeed")
    found = apart(folder / case.name, folder / reference(case).name)
    assert found.worst() < TOLERANCE, found


@pytest.mark.parametrize("case", [case for case, _ in WHOLE], ids=lambda case: case.name)
def test_every_layout_gives_the_figures_of_one_rank(folder: Path, case: Case) -> None:
    close(folder, case)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_so_do_other_families_and_keys(folder: Path, case: Case) -> None:
    close(folder, case)


@pytest.mark.parametrize("case", OPENED + OPENED_BY_4, ids=lambda case: case.name)
def test_ranks_that_open_their_part_alone_give_the_figures_of_one_that_opens_all(folder: Path, case: Case) -> None:
    close(folder, case)


@pytest.mark.parametrize("case", [case for case in OPENED_BY_4 if case.counts], ids=lambda case: case.name)
def test_a_sharded_pipeline_sends_what_the_plan_says(folder: Path, case: Case) -> None:
    """Gradients of every micro-batch go to their owners at once; `test_scale` counts the layouts that one process can play."""
    mesh = ONE | {"pp": 2, "dp_shard": 2}
    parts, reshards = weights(case.config), case.changes.get("reshard_after_forward", True)
    moved = Moved(parts, (), 4, tiny_mesh.SEQ_LEN, sizes(case.config).hidden_size, False, 4, 4, 4)  # 8 rows = 2 ranks x 4 micro-batches of one row
    said = traffic.by_kind(traffic.mesh(Cut(mesh, splits(case.config), sizes(case.config).num_hidden_layers), moved, reshards=reshards))
    found = [json.loads((folder / case.name / f"sent-{rank}.json").read_text()) for rank in range(4)]
    sent = max(found, key=lambda one: one["all_gather"] + one["reduce_scatter"] + one["send"])
    assert {kind: sent[kind] for kind in said} == said


@pytest.mark.parametrize("case", LOW, ids=lambda case: case.name)
def test_every_engine_hears_of_low_precision(folder: Path, case: Case) -> None:
    """bfloat16, in matrix products or in the sums over ranks, is near float32 and not it."""
    if "deepspeed" in case.name:
        pytest.importorskip("deepspeed")
    found = apart(folder / case.name, folder / reference(case).name)
    assert found.loss < 2e-2, found
    assert 2 * TOLERANCE < found.grad_norm < 2e-2, found


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_under_another_layout(folder: Path, name: str) -> None:
    """Its legs, each from the state that another layout left, are the one run that nobody disturbed, step by step."""
    chain = [case for case in [*BEGUN, *FOUR, *TWO, *ENDED] if case.name == name]
    assert len(chain) == CHAINS[name]
    close(folder, chain[0])


def test_the_yardstick_would_see_a_difference(folder: Path) -> None:
    """One rank's run learns, is clipped in some steps and not in others, moves every weight far beyond the tolerance, and differs between vocabularies."""
    lines = figures(folder / "one-llama-97-50")
    assert [line["step"] for line in lines] == list(range(1, 51))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    norms = [line["grad_norm"] for line in lines]
    assert min(norms) < 1.1 < max(norms)
    trained, fresh = load_file(folder / "one-llama-97-50" / "final.safetensors"), tiny_mesh.model("llama", 97).state_dict()
    assert all(float((value - fresh[name]).abs().max()) > 100 * TOLERANCE for name, value in trained.items())
    with pytest.raises(ValueError, match="other models"):
        apart(folder / "one-llama-97-50", folder / "one-llama-64-50")

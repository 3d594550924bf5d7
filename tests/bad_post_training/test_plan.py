"""Bad input of post-training that a command alone shows: refused in one line before anything runs.

A row of a table is (command, where, what, instead). `{files}` is a folder of broken things, `{data}` an override that names the committed rows.
"""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_post_training.broken import LONG
from tests.conftest import FIXTURES

LINE = re.compile(r"(conf|plan|data|checkpoint|run) error: \S.*: \S.*")
LIMIT_S = 2.0
Cli = Callable[..., Any]

LOSSES = [
    ("plan stage=[pretrain,dpo] {data} stage.dpo.label_smoothing=0.5", "stage.dpo.label_smoothing", "0.5 must be < 0.5", "labels assumed flipped"),
    ("plan stage=[pretrain,dpo] {data} stage.dpo.label_smoothing=-0.1", "stage.dpo.label_smoothing", "-0.1 must be >= 0", ""),
    ("plan stage=[pretrain,dpo] {data} stage.dpo.label_smoothing=nan", "stage.dpo.label_smoothing", "nan is not a finite number", ""),
    ("plan stage=[pretrain,dpo] {data} stage.dpo.length_normalised=true", "stage.dpo.length_normalised", "unknown key", "did you mean 'length_normalized'?"),
    ("plan stage=[pretrain,ipo] {data} stage.ipo.beta=-1", "stage.ipo.beta", "-1.0 must be > 0", ""),
    ("plan stage=[pretrain,ipo] {data} stage.ipo.average_log_ratios=true", "stage.ipo.average_log_ratios", "unknown key", "did you mean 'average_log_ratio'?"),
    ("plan stage=[pretrain,hinge] {data} stage.hinge.beta=inf", "stage.hinge.beta", "inf is not a finite number", ""),
    ("plan stage=[pretrain,hinge] {data} stage.hinge.betta=1", "stage.hinge.betta", "unknown key", "did you mean 'beta'?"),
    ("plan stage=[pretrain,kto] {data} stage.kto.beta=nan", "stage.kto.beta", "nan is not a finite number", ""),
    ("plan stage=[pretrain,kto] {data} stage.kto.desirable_weight=-1", "stage.kto.desirable_weight", "-1.0 must be > 0", "good answers"),
    ("plan stage=[pretrain,kto] {data} stage.kto.undesirable_wieght=1", "stage.kto.undesirable_wieght", "unknown key", "did you mean 'undesirable_weight'?"),
    ("plan stage=[pretrain,orpo] {data} stage.orpo.beta=0", "stage.orpo.beta", "0.0 must be > 0", "odds-ratio"),
    ("plan stage=[pretrain,orpo] {data} stage.orpo.lambda=0.1", "stage.orpo.lambda", "unknown key", "beta"),
    ("plan stage=[pretrain,simpo] {data} stage.simpo.gamma=-1", "stage.simpo.gamma", "-1.0 must be >= 0", "margin"),
    ("plan stage=[pretrain,simpo] {data} stage.simpo.gama=1", "stage.simpo.gama", "unknown key", "did you mean 'gamma'?"),
    ("plan stage=[pretrain,reward] {data} stage.reward.margin=-1", "stage.reward.margin", "-1.0 must be >= 0", ""),
    ("plan stage=[pretrain,reward] {data} stage.reward.centering=nan", "stage.reward.centering", "nan is not a finite number", ""),
    ("plan stage=[pretrain,reward] {data} stage.reward.centring=1", "stage.reward.centring", "unknown key", "did you mean 'centering'?"),
    ("plan stage=kto", "stage.kto", "nothing to start from", "type stage=[pretrain,kto], stage.kto.init_from="),
    ("plan stage=reward", "stage.reward", "nothing to start from", "type stage=[pretrain,reward]"),
    ("plan stage=[reward,pretrain]", "stage.reward", "nothing to start from", "type stage=[pretrain,reward]"),
    ("plan stage=[pretrain,kto] data=text data.path={files}/text.jsonl", "stage.kto.data", "text offers text, not the feedback view", "with a feedback view"),
    ("plan stage=[pretrain,kto] {data} stage.kto.data.path={files}/chat.jsonl", "stage.kto.data", "text offers chat, not the feedback view", "feedback view"),
    ("plan stage=[pretrain,reward] data=text data.path={files}/text.jsonl", "stage.reward.data", "not the preference view", "with a preference view"),
    ("plan stage=[pretrain,sample] data=text data.path={files}/text.jsonl", "stage.sample.data", "not the prompt view", "with a prompt view"),
]

RL = [
    ("plan stage=[pretrain,ppo] {data}", "stage.ppo", "consumes 'reward_model', which no earlier stage makes", "put reward before it"),
    ("plan stage=[pretrain,ppo,reward] {data}", "stage.ppo", "consumes 'reward_model'", "put reward before it"),
    ("plan stage=[pretrain,ppo] {data} stage.ppo.reward=length stage.ppo.value_init=reward", "stage.ppo", "consumes 'reward_model'", "put reward before it"),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.value_init=sft", "stage.ppo.value_init", "'sft' is not valid", "one of: policy, reward"),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.kl_coef=nan", "stage.ppo.kl_coef", "nan is not a finite number", ""),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.kl_target=0", "stage.ppo.kl_target", "0.0 must be > 0", "KL of an answer"),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.gamma=1.5", "stage.ppo.gamma", "1.5 must be <= 1", "discount"),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.gae_lambda=-0.1", "stage.ppo.gae_lambda", "-0.1 must be >= 0", ""),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.epochs=0", "stage.ppo.epochs", "0 must be >= 1", "passes"),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.missing_eos_penalty=-1", "stage.ppo.missing_eos_penalty", "-1.0 must be >= 0", ""),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.eval_prompts=1", "stage.ppo.eval_prompts", "1 must be >= 2", "held-out prompts"),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.clip_rang=0.1", "stage.ppo.clip_rang", "unknown key", "did you mean 'clip_range'?"),
    (
        "plan stage=[pretrain,grpo] {data} stage.grpo.group_size=7",
        "stage.grpo.group_size",
        "is no whole number of groups of 7",
        "another optimizer.global_batch_tokens",
    ),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.group_size=1", "stage.grpo.group_size", "1 must be >= 2", "answers to each prompt"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.clip_high=0.1", "stage.grpo.clip_high", "0.1 is below clip_low=0.2", "give at least clip_low"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.clip_low=1", "stage.grpo.clip_low", "1.0 must be < 1", ""),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.temperature=0", "stage.grpo.temperature", "0.0 must be > 0", ""),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.loss_type=mean", "stage.grpo.loss_type", "'mean' is not valid", "one of: dapo, dr_grpo, grpo"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.kl_cof=1", "stage.grpo.kl_cof", "unknown key", "did you mean 'kl_coef'?"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.seq_len=512", "stage.grpo.seq_len", "512 tokens do not fit the model's context of 256", "at most 256"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.max_new_tokens=256", "stage.grpo.max_new_tokens", "leave no room for a prompt in 256", "type at most 128"),
    (
        "plan stage=[pretrain,sample] {data} stage.sample.max_new_tokens=999",
        "stage.sample.max_new_tokens",
        "leave no room for a prompt in 256",
        "type at most 128",
    ),
    ("plan stage=[pretrain,sample] {data} stage.sample.answers=1", "stage.sample.answers", "1 must be >= 2", "answers to each prompt"),
    ("plan stage=[pretrain,sample] {data} stage.sample.top_p=nan", "stage.sample.top_p", "nan is not a finite number", ""),
    ("plan stage=[pretrain,sample] {data} stage.sample.split=test", "stage.sample.split", "'test' is not valid", "one of: heldout, train"),
    ("plan stage=[pretrain,sample] {data} stage.sample.anwsers=2", "stage.sample.anwsers", "unknown key", "did you mean 'answers'?"),
]

REWARDS = [
    (
        "plan stage=[pretrain,grpo] {data} stage.grpo.reward=python_prases",
        "stage.grpo.reward",
        "unknown option 'python_prases'",
        "did you mean 'python_parses'?",
    ),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=nosuch", "stage.grpo.reward", "unknown option 'nosuch'", "one of: exact_match, length, model"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward.type=length", "stage.grpo.reward.type", "brings its own keys", "type stage.grpo.reward=<option>"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward._target_=os.system", "stage.grpo.reward._target_", "nothing it names is imported", "plugin package"),
    ("plan stage=[pretrain,grpo] {data} reward=length", "reward", "is a key of a stage", "type stage.<name>.reward=length"),
    ("plan stage=[pretrain,dpo] {data} ++reward.target=3", "reward.target", "is a key of a stage", "type stage.<name>.reward.target=3"),
    ("plan -m stage=[pretrain,grpo] {data} reward=length,regex", "reward", "is a key of a stage", "type stage.<name>.reward=length,regex"),
    ("plan stage=[pretrain,dpo] {data} stage.dpo.reward=length", "stage.dpo.reward", "unknown key", "one of: adapter, beta"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward.min_node=1", "stage.grpo.reward.min_node", "unknown key", "did you mean 'min_nodes'?"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward.min_nodes=-1", "stage.grpo.reward.min_nodes", "-1 must be >= 1", ""),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=length stage.grpo.reward.target=0", "stage.grpo.reward.target", "0 must be >= 1", ""),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=length stage.grpo.reward.unit=words", "stage.grpo.reward.unit", "'words' is not valid", "tokens"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=repetition stage.grpo.reward.n=0", "stage.grpo.reward.n", "0 must be >= 1", ""),
    (
        "plan stage=[pretrain,grpo] {data} stage.grpo.reward=exact_match stage.grpo.reward.extract=box",
        "stage.grpo.reward.extract",
        "'box' is not valid",
        "boxed",
    ),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=regex 'stage.grpo.reward.pattern=\"(\"'", "stage.grpo.reward.pattern", "missing )", "RE2 has no"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=regex 'stage.grpo.reward.pattern=\"(?=a)\"'", "stage.grpo.reward.pattern", "(?=", "no lookaround"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=regex stage.grpo.reward.pattern=null", "stage.grpo.reward.pattern", "must be set", ""),
    (
        "plan stage=[pretrain,grpo] {data} stage.grpo.reward=sum stage.grpo.reward.weights.nosuch=1",
        "stage.grpo.reward.weights.nosuch",
        "each weight a reward",
        "has: ",
    ),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=sum ~stage.grpo.reward.weights.length", "stage.grpo.reward.weights.length", "has one weight", "add"),
    (
        "plan stage=[pretrain,grpo] {data} stage.grpo.reward=sum stage.grpo.reward.weights.length=0",
        "stage.grpo.reward.weights.length",
        "is 0",
        "leave the reward",
    ),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.reward=sum stage.grpo.reward.weights.length=nan", "stage.grpo.reward.weights.length", "nan is not", ""),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.reward.batch_size=0", "stage.ppo.reward.batch_size", "0 must be >= 1", ""),
    ("plan stage=[pretrain,reward,ppo] {data} stage.ppo.reward.scale=nan", "stage.ppo.reward.scale", "nan is not a finite number", ""),
]

ADAPTERS = [
    ("plan stage=[pretrain,sft] {data} adapter=lroa", "adapter", "unknown option 'lroa'", "did you mean 'lora'?"),
    ("plan stage=[pretrain] {data} adapter=lora", "adapter", "no stage of this plan (pretrain) reads it", "leave it out"),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.r=0", "adapter.r", "0 must be >= 1", "rank of the update"),
    ("plan stage=[pretrain,sft] --config-dir {files} {data} adapter=lora adapter.r=-8", "adapter.r", "-8 must be >= 1", "rank of the update"),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.r=nan", "adapter.r", "nan is not a finite number", ""),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.r=1.5", "adapter.r", "expected a whole number, got 1.5", ""),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.alpha=-1", "adapter.alpha", "-1.0 must be > 0", "scale"),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.dropout=1", "adapter.dropout", "1.0 must be < 1", ""),
    ("plan stage=[pretrain,sft] {data} adapter=dora adapter.dropuot=0", "adapter.dropuot", "unknown key", "did you mean 'dropout'?"),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.target_modules=[]", "adapter.target_modules", "names nothing", "type all-linear"),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.target_modules=[all-linear,q_proj]", "adapter.target_modules", "stands alone", "=all-linear"),
    (
        "plan stage=[pretrain,sft] {data} adapter=lora adapter.target_modules=[q_proj,v_prj]",
        "stage.sft.adapter.target_modules[1]",
        "no linear layer of the model is named 'v_prj'",
        "did you mean 'v_proj'?",
    ),
    (
        "plan stage=[pretrain,sft] {data} adapter=lora adapter.target_modules=[c_attn]",
        "stage.sft.adapter.target_modules[0]",
        "no linear layer of the model is named 'c_attn'",
        "q_proj",
    ),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.init=pissa adapter.dropout=0.1", "adapter.dropout", "dropout would take away", "adapter.dropout=0"),
    ("plan stage=[pretrain,sft] {data} adapter=lora adapter.init=pissa adapter.r=65", "stage.sft.adapter.r", "more than the 64 singular values", "or less"),
    ("plan stage=[pretrain,sft] {data} adapter=qlora adapter.quant_type=int4", "adapter.quant_type", "'int4' is not valid", "one of: fp4, nf4"),
    ("plan stage=[pretrain,sft] {data} adapter=prompt_tuning adapter.virtual_tokens=0", "adapter.virtual_tokens", "0 must be >= 1", ""),
    ("plan stage=[pretrain,sft] {data} adapter=prompt_tuning adapter.init_text=", "adapter.init_text", "is empty", "adapter.init_text=null"),
    ("plan stage=[pretrain,sft,dpo] {data} adapter=prompt_tuning", "stage.dpo", "soft prompt, which cannot be merged", "make sft the last stage"),
    ("plan stage=[pretrain,sft] {data} adapter=prompt_tuning quantize=int8", "quantize", "soft prompt, which cannot be merged", "type quantize=none"),
    ("plan stage=[pretrain,reward] {data} adapter=prompt_tuning", "stage.reward.adapter", "has no score under a soft prompt", "stage.reward.adapter=lora"),
    (
        "plan stage=[pretrain,sft] {data} adapter=prompt_tuning stage.sft.seq_len=250",
        "stage.sft.seq_len",
        "250 tokens and 20 virtual ones do not fit",
        "type at most 236",
    ),
]

VERBS = [
    ("plan stage=dpo {data} stage.dpo.init_from=aaaa output={files}/store", "stage.dpo.init_from", "made an adapter, not weights", "type: lmforge merge "),
    ("plan stage=dpo {data} stage.dpo.init_from={files}/adapter", "stage.dpo.init_from", "is an adapter, not weights", "type: lmforge merge "),
    ("plan stage=ppo {data} stage.ppo.init_from=bbbb output={files}/store", "stage.ppo.init_from", "made no checkpoint", "give a training step"),
    ("plan stage=[pretrain,grpo] {data} stage.grpo.init_from={files}/adapter", "stage.grpo.init_from", "is an adapter, not weights", "lmforge merge "),
    ("rank", "rank", "required: run", "type: rank RUN"),
    ("rank nosuch", "nosuch", "no such run, step or digest", "outputs/runs is empty"),
    ("rank aaaa output={files}/store", "aaaa", "made no samples", "give a run of stage=sample"),
    ("rank bbbb --foo output={files}/store", "rank", "unrecognized arguments: --foo", "type: rank RUN"),
    ("rank bbbb --by lenght output={files}/store", "--by lenght", "unknown method", "did you mean 'length'?"),
    ("rank bbbb --by length reward.traget=3 output={files}/store", "reward.traget", "unknown key", "did you mean 'target'?"),
    ("rank bbbb --by length reward.target=nan output={files}/store", "reward.target", "nan is not a finite number", ""),
    ("rank bbbb --by reward_model=aaaa output={files}/store", "aaaa", "made no reward_model", "give a run of stage=reward"),
    ("rank bbbb --by judge output={files}/store", "--by judge", "which checkpoint?", "type: --by judge=CHECKPOINT"),
    ("rank bbbb --by length --min-margin -1 output={files}/store", "--min-margin", "must be a finite number >= 0", ""),
    ("rank bbbb --rater reward:me output={files}/store", "--rater", "without a colon", ""),
    ("rank bbbb --raters zoe output={files}/store", "--raters", "says whose rankings are exported", "add --export"),
    ("rank bbbb --export out.jsonl --raters zoe output={files}/store", "--raters", "'zoe' has ranked nothing", ""),
    ("rank bbbb --by exact_match output={files}/store", "reward=exact_match", "has no reference answer", "choose a reward that needs none"),
    ("merge", "merge", "required: adapter, out", "type: merge ADAPTER OUT"),
    ("merge nosuch out", "nosuch", "no such run, step or digest", "PEFT folder"),
    ("merge {files}/base out", "{files}/base", "not an adapter folder", "give a PEFT folder"),
    ("merge bbbb out output={files}/store", "bbbb", "made no adapter", "adapter=lora"),
    ("merge {files}/adapter {files}/base", "{files}/base", "is there already", "does not exist yet"),
    ("merge {files}/adapter out --base {files}/other", "{files}/adapter", "was trained on another base", "give the checkpoint it was trained on"),
    ("merge {files}/adapter out --base {files}/wider", "{files}/adapter", "was trained on another base", "give the checkpoint it was trained on"),
    ("merge {files}/adapter out --base {files}/adapter", "{files}/adapter", "is an adapter, not weights", "type: lmforge merge "),
    ("generate {files}/other hello --adapter {files}/adapter", "{files}/adapter", "was trained on another base", "give the checkpoint it was trained on"),
    ("generate {files}/base hello --adapter {files}/other", "{files}/other", "not an adapter folder", "give a PEFT folder"),
    ("generate {files}/base hello --adapter nosuch", "nosuch", "no such run, step or digest", "PEFT folder"),
    ("generate {files}/base hello --adapter {files}/cut_adapter", "{files}/cut_adapter/adapter_model.safetensors", "is truncated", "copy or train it again"),
    ("generate {files}/base hello --adapter {files}/odd_adapter", "{files}/odd_adapter", "is a PEFT adapter of type IA3", "known here: LORA"),
    ("generate {files}/chat.jsonl hello --adapter {files}/adapter", "{files}/chat.jsonl", "not a checkpoint folder", "give a Hugging Face folder"),
    ("generate {files}/store hello --adapter {files}/adapter", "{files}/store", "not a checkpoint folder: it has no config.json", "give a Hugging Face folder"),
    ("generate {files}/unclosed hello --chat", "chat template", "does not render: TemplateSyntaxError", "another template"),
    ("generate {files}/refusing hello --chat", "chat template", "refuses it: only Latin, please", "use messages that it takes"),
    ("generate {files}/base '{long}'", "prompt", "tokens and the model's context is 64", "shorten it to at most 63 tokens"),
    ("generate {files}/lost_adapter hello", "{files}/lost_adapter", "the base it was trained on is not where it was", "--base"),
]

TABLE = [*LOSSES, *RL, *REWARDS, *ADAPTERS, *VERBS]
SLOW = ("merge", "generate", "rank")  # they bring torch and PEFT in, which the first of them in a process pays for


@pytest.mark.parametrize(("command", "where", "what", "instead"), TABLE, ids=[row[0][:100] for row in TABLE])
def test_bad_input_is_refused_in_one_line(command: str, where: str, what: str, instead: str, cli: Cli, files: Path) -> None:
    """The line names the key, the file or the step, says what is wrong and what to type; nothing is written."""
    command, where = (
        text.replace("{files}", str(files)).replace("{long}", LONG).replace("{data}", f"hardware=cpu data=text data.path={FIXTURES / 'corpus'}")
        for text in (command, where)
    )
    before = _listing(files)
    answer = cli(*shlex.split(command))
    lines = answer.err.splitlines()
    assert answer.code == 2, answer.out[:500] + answer.err[:500]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert len(lines) == 1, answer.err
    found = lines[0].partition(" error: ")[2]
    assert found.startswith(f"{where}: "), found
    assert what in found, found
    assert instead in found.partition(what)[2], found
    assert answer.written == []
    assert _listing(files) == before
    assert answer.cpu_s < LIMIT_S or command.startswith(SLOW)


def _listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


PLATFORMS = [("Linux", "riscv64", "", "has no build for Linux on riscv64"), ("Darwin", "x86_64", "14.1", "has no build for Darwin on x86_64")]
PLATFORMS += [("Darwin", "arm64", "13.6", "needs macOS 14 or later, and this is 13.6")]


@pytest.mark.parametrize(("system", "machine", "macos", "what"), PLATFORMS)
def test_qlora_is_refused_in_the_plan_where_it_cannot_run(cli: Cli, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, macos: str, what: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), ""))
    answer = cli("plan", "stage=[pretrain,sft]", "data=text", f"data.path={FIXTURES / 'corpus'}", "adapter=qlora", "hardware=cpu")
    assert (answer.code, answer.written) == (2, [])
    assert answer.err == f"conf error: adapter: bitsandbytes {what}; type adapter=lora, whose base stays in 16 bits\n"

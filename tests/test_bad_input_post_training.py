"""Every bad input of post-training: what a config shows is refused before anything runs, and what only rows, templates or weights show, in one line too.

A row of a table is (command, where, what, instead). `{files}` is a folder of broken things, `{data}` an override that names the committed rows.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</cut>')[-1] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "unclosed": "{% for m in messages %}{{ m.content }}",
    "undefined": "{% for m in messages %}{{ m.nosuch.thing }}{% endfor %}",
    "refusing": "{{ raise_exception('only Latin, please') }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "greedy": "{% set n = namespace(x='x' * 4096) %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "dropping": "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|assistant|>ok<|end|>",
    "silent": "",
}


def _chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# (a row that is bad, its kind in the account, what the quarantine says)
BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "empty_conversation", "messages is empty"),
    (_chat(("user", "a"), ("user", "b"), ("assistant", "c")), "turn_order", "messages[1]: two user turns in a row"),
    (_chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "turn_order", "messages[2]: two assistant turns in a row"),
    (_chat(("assistant", "a"), ("user", "b"), ("assistant", "c")), "turn_order", "messages[0]: begins with the assistant, so there is no prompt"),
    (_chat(("user", "a"), ("system", "b"), ("assistant", "c")), "turn_order", "messages[1]: a system turn right after "),
    (_chat(("user", "a")), "no_assistant_turn", "messages has no assistant turn to learn from"),
    (_chat(("user", "a"), ("robot", "b")), "unknown_role", "messages[1].role is 'robot', not one of system, user,"),
    (_chat(("user", "a"), ("assistant", "  ")), "empty", "messages[1].content is empty"),
    ({"messages": [{"role": "user", "content": 3}]}, "wrong_type", "messages[0].content is int, not text"),
    ({"messages": "hello"}, "wrong_type", "messages is str, not a list"),
    ({"messages": [None]}, "wrong_type", "messages[0] is NoneType, not an object"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown_role", "conversations[0].from is 'alien', not one of"),
    ({"prompt": "a", "chosen": "same", "rejected": "same"}, "chosen_is_rejected", "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "missing_field", "rejected is missing"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "wrong_type", "margin is 'big', not a number"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "label_not_boolean", "label is 'yes', not a boolean"),
    ({"prompt": "a", "completion": "b", "label": 1}, "label_not_boolean", "label is 1, not a boolean"),
    ({"prompt": "a", "completion": "b", "label": None}, "label_not_boolean", "label is missing, not a boolean"),
]
REFUSALS = {  # what a run says of each: of the rows that a template does not render the first, of one that goes over a limit the template itself
    "unclosed": "good.jsonl:{row}: the chat template does not render: TemplateSyntaxError: Unexpected end of template.",
    "undefined": "good.jsonl:{row}: the chat template does not render: UndefinedError: 'dict object' has no attribute 'nosuch'; every one of the ",
    "refusing": "good.jsonl:{row}: the chat template refuses it: only Latin, please; every one of the ",
    "endless": "chat template of {weights}: does not finish a conversation within 3 s of processor time, at 'question {question}'; use another",
    "greedy": "chat template of {weights}: takes more than 512 MiB of memory, at 'question {question}'; use another",
    "dropping": "good.jsonl:{row}: the chat template changes or drops the text; every one of the ",
    "silent": "good.jsonl:{row}: the chat template drops the user's text; every one of the ",
}
LONG = "again and again " * 30  # more tokens than the context of 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, adapters, steps and rows that the tables name."""
    root = tmp_path_factory.mktemp("files")
    shutil.copy(FIXTURES / "corpus" / "text.jsonl", root)
    shutil.copy(FIXTURES / "corpus" / "chat.jsonl", root)
    _weights(root)
    _adapters(root)
    _steps(root)
    return root


def _weights(root: Path) -> None:
    from tests.adapter import tiny

    tokenizer = tiny.tokenizer_folder(root / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    for seed, name in enumerate(("base", "other", *TEMPLATES)):
        tiny.checkpoint_folder(root / name, tokenizer, seed, **({"hidden_size": 64} if name == "wider" else {}))
        if name in TEMPLATES:
            (root / name / "chat_template.jinja").write_text(TEMPLATES[name])
    tiny.checkpoint_folder(root / "wider", tokenizer, 0, hidden_size=64)


def _adapters(root: Path) -> None:
    from lmforge.model import build
    from tests.adapter import tiny

    node = tiny.adapter("lora", r=2)
    model = tiny.learn(node.attach(build.from_folder(root / "base"), 0))
    node.save(model, root / "tokenizer", root / "adapter", root / "base")
    for name in ("cut_adapter", "odd_adapter", "lost_adapter"):
        shutil.copytree(root / "adapter", root / name)
    weights = root / "cut_adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    _edit(root / "odd_adapter" / "adapter_config.json", peft_type="IA3")
    _edit(root / "lost_adapter" / "adapter_config.json", base_model_name_or_path=str(root / "gone"))


def _edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def _steps(root: Path) -> None:
    """A store with a step that trained an adapter and one that drew samples."""
    from lmforge.formats import samples
    from lmforge.formats.samples import Answer, Sampled

    trained, drawn = root / "store/steps/sft-aaaa000011112222", root / "store/steps/sample-bbbb000011112222"
    for step in (trained, drawn):
        step.mkdir(parents=True)
        (step / "step.json").write_text(json.dumps({"step": {"inputs": []}}))
    shutil.copytree(root / "adapter", trained / "adapter")
    (drawn / "samples").mkdir()
    samples.write(drawn / "samples", [Sampled("train-0", "a", (Answer("b", 2, True, -1.0), Answer("c", 2, True, -2.0)))], {"seed": 0})
    shutil.copytree(root / "tokenizer", drawn / "samples" / "tokenizer")


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


def _rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _good(count: int = 12) -> list[dict[str, Any]]:
    chats = [_chat(("user", f"question {number}"), ("assistant", f"answer {number}")) for number in range(count)]
    return chats + [{"prompt": f"ask {number}", "chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(count)]


def _run(cli: Cli, data: Path, stage: str, weights: Path, *more: str) -> Any:
    """A run of some stages on tiny weights, a step each."""
    names = stage.strip("[]").split(",")
    few = [word for name in names if name != "sample" for word in (f"stage.{name}.budget.steps=1", f"stage.{name}.optimizer.global_batch_tokens=256")]
    return cli(f"stage={stage}", f"stage.{names[0]}.init_from={weights}", "data=text", f"data.path={data}", "eval=none", "track=none", *few, *more)


def _artifact(name: str, kind: str) -> Path:
    [step] = [folder for folder in Path("outputs/steps").glob(f"{name}-*") if folder.name.rpartition("-")[0] == name]
    return step / kind


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def test_bad_rows_are_quarantined_and_counted_while_good_rows_go_on(cli: Cli, files: Path, tmp_path: Path) -> None:
    """Rows that are no conversation never reach the tokens; those that the template or the context spoils are counted there."""
    (tmp_path / "rows").mkdir()
    bad = _rows(tmp_path / "rows" / "bad.jsonl", [row for row, _, _ in BAD_ROWS])
    spoiled = [_chat(("user", "keep"), ("assistant", "lost</cut>kept")), _chat(("user", LONG), ("assistant", "b"))]
    pairs = [{"prompt": "cut", "chosen": "one</cut>same", "rejected": "two</cut>same"}, {"prompt": LONG, "chosen": "b", "rejected": "c"}]
    _rows(tmp_path / "rows" / "good.jsonl", [*_good(), *spoiled, *pairs])
    answer = _run(cli, tmp_path / "rows", "[sft,dpo]", files / "base", "data.heldout_fraction=0.5")
    assert answer.code == 0, answer.err
    account = _json(_artifact("data", "corpus") / "account.json")
    kinds = [kind for _, kind, _ in BAD_ROWS]
    assert account["dropped"] == {kind: kinds.count(kind) for kind in kinds}
    assert (account["in"], account["kept"]) == (len(BAD_ROWS) + 28, 28)
    quarantined = [json.loads(line) for line in (_artifact("data", "corpus") / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"]) for one in quarantined] == [(bad.name, line) for line in range(1, len(BAD_ROWS) + 1)]
    for one, (_, _, reason) in zip(quarantined, BAD_ROWS, strict=True):
        assert reason in one["reason"]
    cut, long = "the chat template changes or drops the text", "the prompt alone fills seq_len"
    spoils = {"tokens.chat": {cut: 1, long: 1}, "tokens.preference": {cut: 1, long: 1}}
    for name, dropped in spoils.items():
        meta = _json(_artifact(name, "tokens") / "meta.json")
        assert meta["dropped"] == dropped
        assert sum(meta["rows"].values()) == 12
        reasons = [json.loads(line) for line in (_artifact(name, "tokens") / "quarantine.jsonl").read_text().splitlines()]
        assert sorted(one["reason"] for one in reasons) == sorted(dropped)
        assert all(re.fullmatch(r"good\.jsonl:\d+", one["source"]) for one in reasons)


def test_where_every_row_is_bad_the_first_is_named(cli: Cli, files: Path, tmp_path: Path) -> None:
    """The fields say which view was meant, so the plan is made; the run ends at the rows, and nothing is trained."""
    chats = [row for row, _, _ in BAD_ROWS if "messages" in row or "conversations" in row]
    pairs, labels = ([row for row, _, _ in BAD_ROWS if field in row] for field in ("chosen", "label"))
    for number, (stage, rows) in enumerate((("sft", chats), ("dpo", pairs), ("kto", labels))):
        for at in range(len(rows)):
            given = [*rows[at:], *rows[:at]]
            file = _rows(tmp_path / f"bad{number}.jsonl", given)
            answer = _run(cli, file, stage, files / "base")
            [reason] = [reason for row, _, reason in BAD_ROWS if row is given[0]]
            assert answer.code == 2
            assert len(answer.err.splitlines()) == 1, answer.err
            assert answer.err.startswith(f"data error: {file.name}:1: {reason}"), answer.err
            assert f"every one of the {len(given)} rows is bad, and this is the first" in answer.err
            assert [
                folder.name for folder in Path("outputs/steps").iterdir() if (folder / "step.json").is_file() and not folder.name.startswith("weights")
            ] == []


def test_rows_without_a_known_field_are_refused_in_the_plan(cli: Cli, tmp_path: Path) -> None:
    for text, what in (('{"a": 1}\n', "no known fields (has: a; wanted"), ("[1]\n", "expected an object, got list"), ("{nope\n", "broken JSON")):
        (tmp_path / "rows.jsonl").write_text(text)
        answer = cli("plan", "stage=[pretrain,sft]", "data=text", f"data.path={tmp_path / 'rows.jsonl'}", "hardware=cpu")
        assert (answer.code, answer.written) == (2, [])
        assert answer.err.startswith(f"data error: rows.jsonl:1: {what}"), answer.err
        assert len(answer.err.splitlines()) == 1


def test_good_rows_behind_many_bad_ones_are_found(cli: Cli, tmp_path: Path) -> None:
    """A plan looks at the first rows alone; what they hold may be bad."""
    _rows(tmp_path / "rows.jsonl", [_chat(("user", "a"))] * 40 + _good())
    assert (
        cli(
            "plan",
            "stage=[pretrain,sft]",
            "data=text",
            f"data.path={tmp_path / 'rows.jsonl'}",
            f"stage.pretrain.data.path={FIXTURES / 'corpus'}",
            "hardware=cpu",
        ).code
        == 0
    )


def _first_kept(rows: Path) -> tuple[int, int]:
    """(line, number of the question) of the first training row of the chats."""
    [source] = [json.loads(line)["source"] for line in (_artifact("data", "corpus") / "chat" / "train.jsonl").read_text().splitlines()[:1]]
    line = int(source.partition(":")[2])
    return line, int(json.loads(rows.read_text().splitlines()[line - 1])["messages"][0]["content"].split()[-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_render_ends_the_run_in_one_line(name: str, cli: Cli, files: Path, tmp_path: Path) -> None:
    """The jinja sandbox has limits on time and memory; the weights lie in a folder with such a chat_template."""
    rows = _rows(tmp_path / "good.jsonl", _good())
    answer = _run(cli, rows, "sft", files / name)
    line, question = _first_kept(rows)
    said = REFUSALS[name].format(row=line, question=question, weights=_artifact("weights", "checkpoint"))
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1, answer.err
    assert answer.err.startswith(f"data error: {said}"), answer.err


GRPO = ("stage.grpo.max_new_tokens=8", "stage.grpo.group_size=2", "stage.grpo.eval_prompts=2")
OVERFLOW = ("stage.grpo.reward=sum", *(f"stage.grpo.reward.weights.{name}=1e308" for name in ("parses", "length")), "stage.grpo.reward.rewards.length.target=8")
LINES = {
    "a reward that is NaN": (
        ("stage.grpo.reward=broken",),
        r"run error: reward=broken: is nan for row 0, the answer '.*' to '.*ask \d+.*'; a reward must be a finite",
    ),
    "a sum that overflows": (OVERFLOW, r"run error: reward=sum: is \S+ for row \d, the answer '.*' to '.*'; a reward must be a finite number for every answer"),
    "no reference answers": (
        ("stage.grpo.reward=exact_match",),
        r"data error: reward=exact_match: .*prompt .* has no reference answer; give its row",
    ),
}


@pytest.fixture
def broken_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of options with a reward of a plugin's, which gives NaN; it is unknown again after the test."""
    from lmforge import registry
    from lmforge.reward.nodes import Reward

    registry.load()
    monkeypatch.setattr(registry, "_NODES", {group: dict(options) for group, options in registry._NODES.items()})

    @registry.register("reward", "broken")
    class Broken(Reward):
        """NaN for every answer."""

        def scorer(self, inputs: Any, where: str) -> Any:
            return lambda episodes: [float("nan")] * len(episodes.prompts)

    (tmp_path / "conf" / "reward").mkdir(parents=True)
    (tmp_path / "conf" / "reward" / "broken.yaml").write_text("type: broken\n")
    return tmp_path / "conf"


def test_rewards_that_cannot_be_learned_from_end_the_run(cli: Cli, files: Path, tmp_path: Path, broken_reward: Path) -> None:
    """One line that names the reward, the answer and the prompt; a prompt that leaves no room for an answer is left out and counted before."""
    rows = _rows(tmp_path / "prompts.jsonl", [{"prompt": f"ask {number}"} for number in range(12)] + [{"prompt": LONG + str(number)} for number in range(3)])
    for words, line in LINES.values():
        answer = _run(cli, rows, "grpo", files / "base", *GRPO, *words, "--config-dir", str(broken_reward), "data.heldout_fraction=0.3")
        assert answer.code == 2
        assert len(answer.err.splitlines()) == 1, answer.err
        assert re.match(line, answer.err), answer.err
    meta = _json(_artifact("tokens.prompt", "tokens") / "meta.json")
    assert meta["dropped"] == {"the prompt is longer than seq_len": 3}
    assert sum(meta["rows"].values()) == 12


def test_where_every_prompt_is_longer_than_the_context_the_first_is_named(cli: Cli, files: Path, tmp_path: Path) -> None:
    rows = _rows(tmp_path / "prompts.jsonl", [{"prompt": LONG + str(number)} for number in range(3)])
    answer = _run(cli, rows, "sample", files / "base", "stage.sample.max_new_tokens=8")
    assert answer.code == 2
    assert re.fullmatch(
        r"data error: prompts.jsonl:\d: the prompt is longer than seq_len; every one of the \d .* rows is bad for the prompt view, .*\n", answer.err
    )

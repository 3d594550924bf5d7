"""Every bad input a config alone shows: exit code 2, one line that says where, what and what instead, nothing written, under 2 s.

A row is (command, where, what, instead). `{files}` is a folder of broken things.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LINE = re.compile(r"(conf|plan|data|checkpoint|run) error: \S.*: \S.*")
LIMIT_S = 2.0

KEY = {  # of the refusals below that have one
    "intermediate_size 11008 is not divisible by tp 3": ".tp",
    "nobody has tested how matrices of a gpt2 split": ".tp",
    "4 layers are fewer than 8 stages": ".pp",
    "the head is the embedding": ".pp",
    "1 micro-batch of 64 rows is fewer than the 8 stages": ".micro_batch_size",
}

GROUPS_AND_KEYS = [
    ("plan parallelism=fsdp stage=pretrain", "parallelism", "unknown group or key", "did you mean 'parallel=fsdp'?"),
    ("plan +parallelism=fsdp stage=pretrain", "parallelism", "unknown group or key", "did you mean 'parallel=fsdp'?"),
    ("plan ++parallelism=fsdp stage=pretrain", "parallelism", "unknown group or key", "did you mean 'parallel=fsdp'?"),
    ("plan ~parallelism stage=pretrain", "parallelism", "unknown group or key", "did you mean 'parallel'?"),
    ("plan optimiser.lr=3 stage=pretrain", "optimiser.lr", "unknown group or key", "did you mean 'optimizer'?"),
    ("plan sead=3 stage=pretrain", "sead", "unknown group or key", "did you mean 'seed=3'?"),
    ("plan a.b.c=d stage=pretrain", "a.b.c", "unknown group or key", "the groups are: adapter, data, eval,"),
    ("plan STAGE=pretrain", "STAGE", "unknown group or key", "the groups are"),
    ("plan tokenizer=bpe stage=pretrain", "tokenizer", "unknown group or key", "the groups are"),
    ("plan model=nan stage=pretrain", "model", "unknown option 'nan'", "did you mean 'nano'?"),
    ("plan +model=nan stage=pretrain", "model", "unknown option 'nan'", "did you mean 'nano'?"),
    ("plan ++model=nan stage=pretrain", "model", "unknown option 'nan'", "did you mean 'nano'?"),
    ("plan stage=pretrian", "stage", "unknown option 'pretrian'", "did you mean 'pretrain'?"),
    ("plan stage=[pretrain,sftt]", "stage", "unknown option 'sftt'", "did you mean 'sft'?"),
    ("plan stage=Pretrain", "stage", "unknown option 'Pretrain'", "did you mean 'pretrain'?"),
    ("plan hardware=a100x9 stage=pretrain", "hardware", "unknown option 'a100x9'", "did you mean 'a100x8'?"),
    ("plan experiment=quickstrt", "experiment", "unknown option 'quickstrt'", "did you mean 'quickstart'?"),
    ("plan sweep=lr_nanoo", "sweep", "unknown option 'lr_nanoo'", "did you mean 'lr_nano'?"),
    ("plan optimizer.schedule=cosin stage=pretrain", "optimizer.schedule", "unknown option 'cosin'", "did you mean 'cosine'?"),
    ("plan optimizer/schedule=cosin stage=pretrain", "optimizer.schedule", "unknown option 'cosin'", "did you mean 'cosine'?"),
    ("plan stage.pretrain.optimizer=muonn stage=pretrain", "stage.pretrain.optimizer", "unknown option 'muonn'", "did you mean 'muon'?"),
    ("plan model=null stage=pretrain", "model", "unknown option 'null'", "nano"),
    ("plan quantize=null stage=pretrain", "quantize", "unknown option 'null'", "one of: int8, none"),
    ("plan stage=null", "stage", "unknown option 'null'", "one of: dpo, grpo, hinge,"),
    ("plan stage=[]", "stage", "expected one stage or a list", "choose from"),
    ("plan model.hidden_sze=3 stage=pretrain", "model.hidden_sze", "unknown key", "did you mean 'hidden_size'?"),
    ("plan +model.hidden_sze=3 stage=pretrain", "model.hidden_sze", "unknown key", "did you mean 'hidden_size'?"),
    ("plan ++model.hidden_sze=3 stage=pretrain", "model.hidden_sze", "unknown key", "did you mean 'hidden_size'?"),
    ("plan ~model.hidden_sze stage=pretrain", "model.hidden_sze", "there is no such key to delete", "list"),
    ("plan ~model.hidden_size stage=pretrain", "model.hidden_size", "missing key", "width of the residual stream"),
    ("plan ~model stage=pretrain", "model", "expected a mapping, got None", ""),
    ("plan ~stage", "stage", "cannot be deleted", "choose an option"),
    ("plan 'optimizer={lrr: 1}' stage=pretrain", "optimizer.lrr", "unknown key", "did you mean 'lr'?"),
    ("plan optimizer.schedule.warmpu=0.1 stage=pretrain", "optimizer.schedule.warmpu", "unknown key", "did you mean 'warmup'?"),
    ("plan stage=dpo model=1b hardware=h100x1 stage.dpo.bta=0.2", "stage.dpo.bta", "unknown key", "did you mean 'beta'?"),
    ("plan stage=dpo model=1b hardware=h100x1 +stage.dpo.bta=0.2", "stage.dpo.bta", "unknown key", "did you mean 'beta'?"),
    ("plan stage=dpo model=1b hardware=h100x1 ++stage.dpo.optimizer.lrr=1", "stage.dpo.optimizer.lrr", "unknown key", "did you mean 'lr'?"),
    ("plan hardware.devices=4 stage=pretrain", "hardware.devices", "unknown key", "type hardware=a100x1 hardware.devices=4, or one of: "),
    ("plan quantize.group_size=8 stage=pretrain", "quantize.group_size", "unknown key", ""),
    ("plan track.projct=2 stage=pretrain", "track.projct", "unknown key", "did you mean 'project'?"),
    ("plan optimizer.type=sgd stage=pretrain", "optimizer.type", "an option brings its own keys", "type optimizer=<option>"),
    ("plan optimizer@foo=muon stage=pretrain", "optimizer", "'@' names no place", "type optimizer="),
    ("plan hydra.nosuch=1 stage=pretrain", "hydra.nosuch", "unknown key", ""),
    ("plan hydra.mode=NOPE stage=pretrain", "hydra.mode", "'NOPE' is not valid", ""),
    ("plan hydra/launcher=nosuch stage=pretrain", "hydra/config", "there is no option 'hydra/launcher/nosuch'", ""),
    ("plan =3 stage=pretrain", "=3", "names no key", "write key=value"),
    ("plan stage=pretrain model", "model", "not an override", "write key=value"),
    ("plan stage=pretrain 'optimizer.lr=[1'", "optimizer.lr=[1", "not an override", "write key=value"),
    ("plan stage=pretrain,sft", "stage", "pretrain,sft are several values", "add -m"),
    ("plan optimizer.lr=1e-3,1e-4 stage=pretrain", "optimizer.lr", "1e-3,1e-4 are several values", "add -m"),
]

VALUES = [
    ("plan optimizer.lr=abc stage=pretrain", "optimizer.lr", "expected a number, got 'abc'", ""),
    ("plan optimizer.lr= stage=pretrain", "optimizer.lr", "expected a number, got ''", ""),
    ("plan optimizer.lr=true stage=pretrain", "optimizer.lr", "expected a number, got True", ""),
    ("plan optimizer.lr=null stage=pretrain", "optimizer.lr", "must be set", ""),
    ("plan 'optimizer.lr=[1e-3]' stage=pretrain", "optimizer.lr", "expected a number, got [0.001]", ""),
    ("plan 'optimizer.lr={a: 1}' stage=pretrain", "optimizer.lr", "expected a number, got {'a': 1}", ""),
    ("plan optimizer.lr=nan stage=pretrain", "optimizer.lr", "nan is not a finite number", ""),
    ("plan optimizer.lr=inf stage=pretrain", "optimizer.lr", "inf is not a finite number", ""),
    ("plan optimizer.lr=-inf stage=pretrain", "optimizer.lr", "-inf is not a finite number", ""),
    ("plan optimizer.lr=1e400 stage=pretrain", "optimizer.lr", "inf is not a finite number", ""),
    ("plan optimizer.lr=-1 stage=pretrain", "optimizer.lr", "-1.0 must be > 0", "peak learning rate"),
    ("plan optimizer.lr=0 stage=pretrain", "optimizer.lr", "0.0 must be > 0", "peak learning rate"),
    ("plan seed=nan stage=pretrain", "seed", "nan is not a finite number", ""),
    ("plan seed=1.5 stage=pretrain", "seed", "expected a whole number, got 1.5", ""),
    ("plan seed=-1 stage=pretrain", "stage.pretrain.seed", "-1 must be >= 0", "seed of the weights"),
    ("plan model.hidden_size=0 stage=pretrain", "model.hidden_size", "0 must be >= 1", "width of the residual stream"),
    ("plan model.hidden_size=-64 stage=pretrain", "model.hidden_size", "-64 must be >= 1", "width of the residual stream"),
    ("plan model.hidden_size=64.5 stage=pretrain", "model.hidden_size", "expected a whole number, got 64.5", ""),
    ("plan model.hidden_size=true stage=pretrain", "model.hidden_size", "expected a whole number, got True", ""),
    ("plan 'model.hidden_size=[1,2]' stage=pretrain", "model.hidden_size", "expected a whole number, got [1, 2]", ""),
    ("plan model.tie_word_embeddings=1 stage=pretrain", "model.tie_word_embeddings", "expected true or false, got 1", ""),
    ("plan stage=pretrain stage.pretrain.budget.steps=200.5", "stage.pretrain.budget.steps", "expected a whole number, got 200.5", ""),
    ("plan stage=pretrain stage.pretrain.budget.steps=0", "stage.pretrain.budget.steps", "0 must be > 0", "optimizer steps"),
    ("plan stage=pretrain stage.pretrain.budget.tokens=-5", "stage.pretrain.budget.tokens", "-5 must be > 0", "tokens seen"),
    ("plan stage=pretrain stage.pretrain.budget.flops=inf", "stage.pretrain.budget.flops", "inf is not a finite number", ""),
    ("plan stage=pretrain stage.pretrain.budget=5", "stage.pretrain.budget", "expected a mapping, got 5", ""),
    ("plan stage=dpo model=1b hardware=h100x1 stage.dpo.beta=0", "stage.dpo.beta", "0.0 must be > 0", "reference policy"),
    ("plan stage=dpo model=1b hardware=h100x1 stage.dpo.label_smoothing=0.5", "stage.dpo.label_smoothing", "0.5 must be < 0.5", ""),
    ("plan eval.after=never stage=pretrain", "eval.after", "'never' is not valid", "one of: all, last"),
    ("plan precision.param_dtype=float16 stage=pretrain", "precision.param_dtype", "'float16' is not valid", "bfloat16"),
    ("plan data.heldout_fraction=1 stage=pretrain", "data.heldout_fraction", "1.0 must be < 1", ""),
    ("plan data.mutations=[nope] stage=pretrain", "data.mutations", "'nope' is not one of operator", ""),
    ("plan data.exclude=test stage=pretrain", "data.exclude", "expected a list, got 'test'", "write [test]"),
    ("plan hardware=h100x8 hardware.devices=0 stage=pretrain", "hardware.devices", "0 must be > 0", ""),
    ("plan model=dial model.params=1e30 stage=pretrain", "model.params", "must be <= 1e+13", ""),
    ("plan output=null stage=pretrain", "output", "must be set", ""),
    ("plan output= stage=pretrain", "output", "is empty", "output=."),
    ("plan name=../../escape stage=pretrain", "name", "'../../escape' cannot name a folder", "use letters"),
    ("plan name= stage=pretrain", "name", "'' cannot name a folder", "use letters"),
]

RELATIONS = [
    (
        "plan stage=pretrain stage.pretrain.budget.tokens=1e6 stage.pretrain.budget.steps=3",
        "stage.pretrain.budget",
        "tokens and steps are set",
        "exactly one",
    ),
    ("plan stage=pretrain 'stage.pretrain.budget={tokens: 5, steps: 6}'", "stage.pretrain.budget", "tokens and steps are set", "exactly one"),
    ("plan experiment=two --config-dir {files}/two_budgets", "stage.pretrain.budget", "tokens and steps are set", "exactly one"),
    ("plan stage=pretrain stage.pretrain.budget.tokens_per_parameter=null", "stage.pretrain.budget", "no budget is set", "exactly one"),
    ("plan model.num_attention_heads=7 stage=pretrain", "model.num_attention_heads", "7 heads do not divide hidden_size 64", "take 4 or 8"),
    (
        "plan model.num_attention_heads=4 model.num_key_value_heads=3 stage=pretrain",
        "model.num_key_value_heads",
        "3 key-value heads do not divide",
        "take 2 or 4",
    ),
    ("plan model=gpt3_175b model.num_attention_heads=7 stage=pretrain", "model.num_attention_heads", "7 heads do not divide hidden_size 12288", "take 6 or 8"),
    ("plan stage=[dpo,pretrain]", "stage.dpo", "nothing to start from", "stage=[pretrain,dpo]"),
    ("plan stage=[dpo,pretrain] model=1b hardware=h100x1", "stage", "pretrain cannot come after dpo", "stage=[pretrain,dpo]"),
    ("plan stage=[sft,pretrain] model=1b hardware=h100x1", "stage", "pretrain cannot come after sft", "stage=[pretrain,sft]"),
    ("plan stage=dpo", "stage.dpo", "nothing to start from", "stage.dpo.init_from="),
    ("plan stage=sft model=micro", "stage.sft", "nothing to start from", "a model with weights (model=1b)"),
    ("plan stage=[pretrain,pretrain]", "stage", "'pretrain' is there twice", "a name of its own in an experiment file"),
    ("plan stage=[pretrain,sft,pretrain]", "stage", "'pretrain' is there twice", "a name of its own in an experiment file"),
    ("plan stage=sft model=1b hardware=h100x1 stage.pretrain.budget.steps=3", "stage.pretrain", "no stage 'pretrain' in this run (sft)", "add it to stage="),
    ("plan experiment=quickstart stage.anneal.budget.steps=1", "stage.anneal", "no stage 'anneal' in this run (pretrain, sft, dpo)", "one of"),
    ("plan stage=dpo model=1b hardware=h100x1 optimizer.lr=1e-3", "optimizer.lr", "every stage of this plan has its own value", "type stage.dpo.optimizer.lr="),
    (
        "plan stage=[pretrain,sft] stage.pretrain.optimizer.lr=1e-3 optimizer.lr=3",
        "optimizer.lr",
        "every stage of this plan has its own value",
        "stage.pretrain.optimizer.lr=... stage.sft.optimizer.lr=...",
    ),
    ("plan stage=pretrain model.tokenizer.vocab_size=4096", "model.tokenizer.vocab_size", "bigger than the model's vocabulary of 2,048", "at most 2048"),
    ("plan stage=pretrain model.tokenizer.vocab_size=10", "model.tokenizer.vocab_size", "10 must be >=", "entries"),
    ("plan stage=pretrain model.tokenizer=own", "model.tokenizer", "the model names none", "model.tokenizer=bpe"),
    ("plan stage=pretrain stage.pretrain.model=micro", "stage.pretrain.model", "a pipeline has one model", "to the root"),
    ("plan stage=pretrain stage.pretrain.seq_len=512", "stage.pretrain.seq_len", "512 tokens do not fit the model's context of 256", "at most 256"),
    ("plan stage=pretrain parallel=ddp parallel.devices=9 hardware=cpu", "stage.pretrain.parallel.devices", "9 devices asked", "parallel.devices=8"),
    ("plan stage=pretrain parallel=fsdp parallel.devices=16 hardware=h100x8", "stage.pretrain.parallel.devices", "16 devices asked", "parallel.devices=8"),
    *(
        (f"plan stage={stage} model={model} hardware=h100x8 {rest}", f"stage.{stage}.parallel{KEY.get(said, '')}", said, instead)
        for stage, model, rest, said, instead in (
            ("pretrain", "7b", "parallel=fsdp parallel.dp_shard=3", "dp_shard 3 = 3, and there are 8 devices", "parallel.dp_shard=8 or parallel.devices=3"),
            ("pretrain", "7b", "parallel=3d parallel.tp=3", "pp 2 x tp 3 = 6, and that does not divide 8", "parallel.tp=2 or parallel.devices=6"),
            ("pretrain", "7b", "parallel=tp parallel.devices=3", "intermediate_size 11008 is not divisible by tp 3", "parallel=fsdp"),
            ("pretrain", "gpt3_175b", "parallel=3d", "nobody has tested how matrices of a gpt2 split", "parallel.tp=1 parallel.pp=1"),
            ("pretrain", "gpt3_175b", "parallel=tp", "nobody has tested how matrices of a gpt2 split", "parallel=fsdp"),
            ("pretrain", "nano", "parallel=pp", "4 layers are fewer than 8 stages", "parallel.pp=4"),
            ("pretrain", "nano", "parallel=fsdp_pp", "the head is the embedding", "model.tie_word_embeddings=false"),
            ("pretrain", "7b", "parallel=pp parallel.micro_batch_size=64", "1 micro-batch of 64 rows is fewer than the 8 stages", "type 8"),
            ("pretrain", "7b", "parallel=fsdp parallel.cp=2", "does not run with cp", "parallel.cp=1"),
            ("pretrain", "7b", "parallel=deepspeed_zero2 optimizer=muon", "optimizer=muon does not run with deepspeed", "parallel=fsdp"),
            ("pretrain", "7b", "parallel=deepspeed_zero3 optimizer.max_skips=3", "max_skips>0 does not run with deepspeed", "optimizer.max_skips=0"),
            ("pretrain", "7b", "parallel=tp precision=fp16", "precision=fp16 does not run with tp", "precision=bf16"),
            ("dpo", "7b", "parallel=pp", "stage=dpo does not run with pp", "parallel=fsdp"),
            ("sft", "7b", "parallel=tp adapter=lora", "adapter=lora does not run with tp", "parallel=fsdp"),
        )
    ),
    ("plan stage=pretrain model=7b hardware=h100x8 parallel=fsdp parallel.tp=null", "parallel", "dp_shard and tp are both null", "parallel.tp=1"),
    ("plan stage=pretrain parallel=ddp parallel.devices=100000", "stage.pretrain.parallel.devices", "100000 devices asked", "another hardware="),
    ("plan stage=pretrain parallel=ddp parallel.devices=0 hardware=cpu", "parallel.devices", "0 must be > 0", ""),
    (
        "plan stage=pretrain parallel=ddp parallel.devices=3 hardware=cpu",
        "stage.pretrain.optimizer.global_batch_tokens",
        "64 rows do not split over 3",
        "type 16128",
    ),
    ("plan stage=pretrain parallel.micro_batch_size=7", "stage.pretrain.parallel.micro_batch_size", "7 does not divide the 64 rows", "type 4 or 8"),
    ("plan stage=pretrain optimizer.global_batch_tokens=1000", "stage.pretrain.optimizer.global_batch_tokens", "1,000 tokens are no whole number", "1024"),
    ("plan stage=pretrain precision.compute_dtype=float16", "precision.loss_scale", "must be set", "precision.loss_scale=65536"),
    ("plan stage=pretrain optimizer.schedule=wsd optimizer.schedule.warmup=0.9", "optimizer.schedule.decay", "more than all steps", "at most 1"),
    ("plan stage=pretrain model.revision=main", "model.revision", "weights that are not named", "set model.pretrained"),
    ("plan stage=pretrain model=7b hardware=cpu", "stage.pretrain", "of 16.0 GiB on one device of laptop, 8 cores, 16 GiB (", "plan for hardware=h200x1"),
    ("plan stage=dpo model=7b hardware=cpu", "stage.dpo", "of 16.0 GiB on one device of laptop, 8 cores, 16 GiB (", "plan for hardware=h200x1"),
    (
        "plan stage=pretrain model=70b hardware=h100x8",
        "stage.pretrain",
        "of 79.6 GiB on one device of NVIDIA H100 80GB HBM3 (",
        "parallel.cpu_offload=true (41.7 GiB",
    ),
    ("run stage=pretrain model=70b", "stage.pretrain", "GiB on one device of ", "the device would have to have"),
]

DATA = [
    ("plan stage=pretrain data=text", "data.path", "must be set", "give a file"),
    ("plan stage=pretrain data=text data.path={files}/nosuch", "data.path", "no such file or folder", "give a file, or a folder with files that end in"),
    ("plan stage=pretrain data=text data.path={files}/empty_folder", "data.path", "no usable file", ".txt"),
    ("plan stage=pretrain data=text data.path={files}/unusable", "data.path", "no usable file", ".jsonl"),
    ("plan stage=pretrain data=text data.path={files}/unusable/table.csv", "data.path", "no usable file", ".parquet"),
    ("plan stage=pretrain data=text data.path={files}/empty_files", "data.path", "only empty files", "give a file"),
    ("plan stage=pretrain data=text data.path={files}/empty_files/a.txt", "data.path", "only empty files", "give a file"),
    ("plan stage=pretrain data=text data.path={files}/pairs.jsonl", "stage.pretrain.data", "text offers preference, not the text view", "stage.pretrain.data="),
    ("plan stage=[pretrain,dpo] data=text data.path={files}/good.txt", "stage.dpo.data", "text offers text, not the preference view", "stage.dpo.data="),
    ("plan stage=pretrain data=hf data.name=/nope", "data.name", "no such folder", "owner/name"),
    ("plan stage=pretrain data=hf data.name=foo/bar data.revision=main", "data.revision", "main is not a commit", "40 hex digits"),
    ("plan stage=pretrain data=mixture", "data.sources.own.path", "must be set", "give a file"),
    ("plan stage=pretrain data=mixture data.sources.own.path={files}/good.txt data.weights.own=0", "data.weights.own", "0 must be > 0", "leave the source out"),
]

DOORS = [
    *[
        (f"plan stage=pretrain {plus}{key}._target_=os.system", f"{key}._target_", "nothing it names is imported", "choose an option")
        for key in ("model", "optimizer", "optimizer.schedule", "stage.pretrain", "stage.pretrain.budget", "track", "data")
        for plus in ("", "+", "++")
    ],
    ("plan stage=pretrain +_target_=os.system", "_target_", "nothing it names is imported", "choose an option"),
    ("plan stage=pretrain '+model={_target_: os.system}'", "model._target_", "nothing it names is imported", "choose an option"),
    ("plan stage=pretrain '+stage.pretrain.x={_target_: os.system}'", "stage.pretrain.x._target_", "nothing it names is imported", "choose an option"),
    ("plan stage=pretrain +model._partial_=true", "model._partial_", "nothing it names is imported", "choose an option"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/target", "optimizer._target_", "nothing it names is imported", "choose an option"),
    (
        "plan stage=pretrain data=mixture data.sources.own.path={files}/good.txt '+data.sources.x={type: os.system}'",
        "data.sources.x.type",
        "unknown data type",
        "text",
    ),
    *[
        (
            f"{verb} stage=pretrain {plus}hydra.callbacks.x._target_=os.system",
            "hydra.callbacks.x._target_",
            "'os.system' is not run from a config",
            "can be named",
        )
        for verb in ("plan", "run", "plan -m", "--cfg job", "--info config")
        for plus in ("+", "++")
    ],
    *[
        (f"plan {flag} stage=pretrain {plus}hydra.{key}._target_=os.system", f"hydra.{key}._target_", "'os.system' is not run from a config", "can be named")
        for key in ("launcher", "sweeper")
        for plus in ("", "++")
        for flag in ("", "-m")
    ],
    ("plan stage=pretrain hydra.callbacks.x._target_=os.system", "hydra.callbacks.x._target_", "unknown key", ""),
    ("plan stage=pretrain '+hydra.callbacks={{x: {{_target_: os.system}} }}'", "hydra.callbacks.x._target_", "'os.system' is not run", "can be named"),
    ("plan stage=pretrain +hydra.callbacks.x.y._target_=os.system", "hydra.callbacks.x.y._target_", "'os.system' is not run", "can be named"),
    ("plan stage=pretrain '+hydra.callbacks.x=[{_target_: os.system}]'", "hydra.callbacks.x[0]._target_", "'os.system' is not run", "can be named"),
    ("plan -m stage=pretrain hydra.callbacks.x._target_=os.system,os.getcwd", "hydra.callbacks.x._target_", "cannot be an axis of a sweep", "one value"),
    (
        "plan stage=pretrain hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.os.system",
        "hydra.launcher._target_",
        "basic_launcher.os.system' is not run from a config",
        "can be named",
    ),
    ("plan stage=pretrain hydra.launcher._target_=hydra.utils.instantiate", "hydra.launcher._target_", "is not run from a config", "can be named"),
    ("plan stage=pretrain 'hydra.launcher._target_=${{name}}' name=os.system", "hydra.launcher._target_", "is not run from a config", "can be named"),
    ("plan experiment=mine --config-dir {files}/callback", "hydra.callbacks.x._target_", "'os.system' is not run from a config", "can be named"),
    ("plan -m experiment=mine --config-dir {files}/callback", "hydra.callbacks.x._target_", "'os.system' is not run from a config", "can be named"),
    ("plan stage=pretrain 'optimizer.lr=${{oc.env:HOME}}'", "optimizer.lr", "'${oc.env:...}' is not resolved", "write the value out"),
    ("plan stage=pretrain 'model.pretrained=${{oc.env:HOME}}'", "model.pretrained", "'${oc.env:...}' is not resolved", "write the value out"),
    ("plan stage=pretrain 'name=${{oc.decode:HOME}}'", "name", "'${oc.decode:...}' is not resolved", "write the value out"),
    ("plan stage=pretrain 'name=${{nosuch}}'", "name", "Interpolation key 'nosuch' not found", "write the value out"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/environment", "optimizer.lr", "'${oc.env:...}' is not resolved", "write the value out"),
]

FILES = [
    ("plan stage=pretrain optimizer=mine --config-dir {files}/duplicate", "{files}/duplicate/optimizer/mine.yaml", "key 'lr' given twice", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/nested", "{files}/nested/optimizer/mine.yaml", "key 'type' given twice", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/tab", "{files}/tab/optimizer/mine.yaml", "found character '\\t'", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/utf", "{files}/utf/optimizer/mine.yaml", "'utf-8' codec can't decode", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/tag", "{files}/tag/optimizer/mine.yaml", "could not determine a constructor", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/bomb", "{files}/bomb/optimizer/mine.yaml", "aliases (*name) are not read", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/deep", "{files}/deep/optimizer/mine.yaml", "nested more than 50 deep", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/null_byte", "{files}/null_byte/optimizer/mine.yaml", "special characters", "mend the YAML"),
    ("list optimizer --config-dir {files}/bomb", "{files}/bomb/optimizer/mine.yaml", "aliases (*name) are not read", "mend the YAML"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/empty_option", "optimizer.type", "unknown optimizer type '(none given)'", "adamw"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/a_list", "optimizer", "expected a mapping, got ['a', 'b']", ""),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/unknown_key", "optimizer.lrr", "unknown key", "did you mean 'lr'?"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/unknown_type", "optimizer.type", "unknown optimizer type 'adanw'", "did you mean 'adamw'?"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/no_default", "optimizer/mine", "there is no option 'optimizer/nosuch'", ""),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/cycle", "conf", "a defaults list leads back to itself", "mend"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/itself", "optimizer.lr", "Recursive interpolation", "write the value out"),
    ("plan stage=pretrain optimiser=mine --config-dir {files}/other_group", "optimiser", "unknown group or key", "did you mean 'optimizer=mine'?"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/a_folder", "optimizer", "unknown option 'mine'", "adamw"),
    ("plan stage=pretrain optimizer=mine --config-dir {files}/dangling", "optimizer", "unknown option 'mine'", "adamw"),
    ("plan stage=pretrain --config-dir {files}/nosuch", "--config-dir", "no such folder", "give a folder"),
    ("plan stage=pretrain --config-dir {files}/good.txt", "--config-dir", "no such folder", "give a folder"),
    ("stage=pretrain output=/proc/x", "output", "cannot write to /proc/x", "type output="),
    ("stage=pretrain output={files}/good.txt", "output", "cannot write to {files}/good.txt: Not a directory", "type output="),
    ("stage=pretrain output={files}/good.txt/below", "output", "cannot write to {files}/good.txt/below: Not a directory", "type output="),
    ("stage=pretrain output={files}/read_only", "output", "cannot write to {files}/read_only: ", "type output="),
]

CHECKPOINTS = [
    ("plan stage=dpo stage.dpo.init_from={files}/nosuch", "stage.dpo.init_from", "no such run, step or digest", ""),
    ("plan stage=dpo stage.dpo.init_from=nosuch", "stage.dpo.init_from", "no such run, step or digest", "outputs/runs is empty"),
    ("plan stage=dpo stage.dpo.init_from=abcd1234", "stage.dpo.init_from", "no such run, step or digest", "outputs/runs is empty"),
    ("plan stage=[pretrain,dpo] stage.dpo.init_from=nosuch", "stage.dpo.init_from", "no such run, step or digest", "outputs/runs is empty"),
    ("plan stage=dpo stage.dpo.init_from={files}/no_config", "stage.dpo.init_from", "it has no config.json", "give a Hugging Face folder"),
    ("plan stage=[pretrain,dpo] stage.dpo.init_from={files}/no_config", "stage.dpo.init_from", "it has no config.json", "give a Hugging Face folder"),
    ("plan stage=dpo stage.dpo.init_from={files}/good.txt", "stage.dpo.init_from", "it has no config.json", "give a Hugging Face folder"),
    ("plan stage=dpo stage.dpo.init_from=.", "stage.dpo.init_from", "it has no config.json", "give a Hugging Face folder"),
    ("plan stage=dpo stage.dpo.init_from=", "stage.dpo.init_from", "it has no config.json", "give a Hugging Face folder"),
    ("plan stage=dpo stage.dpo.init_from={files}/broken_config", "stage.dpo.init_from", "config.json cannot be read", "restore the file"),
    ("plan stage=dpo stage.dpo.init_from={files}/list_config", "stage.dpo.init_from", "names no model_type", "config.json of a transformers model"),
    ("plan stage=dpo stage.dpo.init_from={files}/nan_config", "stage.dpo.init_from", "NaN is not a number", "restore the file"),
    ("plan stage=dpo stage.dpo.init_from={files}/own_code", "stage.dpo.init_from", "needs code of its own", "known: "),
    ("plan stage=dpo stage.dpo.init_from={files}/other_family", "config.json", "'nosuchmodel' is not a known family", "known: "),
    ("plan stage=dpo stage.dpo.init_from={files}/wrong_type", "config.json", "hidden_size must be a whole number", ""),
    ("plan stage=dpo model=micro stage.dpo.init_from={files}/config_only", "stage.dpo.init_from", "the model's", "leave model out"),
    ("plan stage=dpo model=hf", "model.pretrained", "must be set", ""),
    ("plan stage=dpo model=hf model.pretrained={files}/nosuch", "model.pretrained", "has no config.json", "hub id"),
    ("plan stage=dpo model=hf model.pretrained={files}/broken_config", "model.pretrained", "config.json cannot be read", "restore the file"),
    ("plan stage=dpo model=hf model.pretrained=no/such", "model.pretrained", "the hub did not answer", "local folder"),
]

VERBS = [
    ("pln stage=dpo", "pln", "unknown verb", "did you mean 'plan'?"),
    ("foo", "foo", "unknown verb", "one of: calibrate, compare, diff,"),
    ("plan pln stage=dpo", "pln", "not an override", "write key=value"),
    ("--foo", "command line", "unrecognized arguments: --foo", "--help"),
    ("plan --foo stage=pretrain", "command line", "unrecognized arguments: --foo", "--help"),
    ("plan stage=pretrain --bar=3", "command line", "unrecognized arguments: --bar=3", "--help"),
    ("plan stage=pretrain --config-dir", "command line", "expected one argument", "--help"),
    ("plan stage=pretrain --config-name=other", "--config-name", "is not read", "--config-dir"),
    ("plan stage=pretrain --config-path=other", "--config-path", "is not read", "--config-dir"),
    ("plan stage=pretrain --experimental-rerun=x", "--experimental-rerun", "is not read", "--config-dir"),
    ("list --foo", "command line", "unrecognized arguments: --foo", "--help"),
    ("list optimiser", "optimiser", "unknown group", "did you mean 'optimizer'?"),
    ("list optimizer=adamv", "optimizer=adamv", "unknown option", "did you mean 'adam'?"),
    ("diff stage=pretrain", "diff", "expects two sides", "type: diff"),
    ("diff stage=pretrain -- stage=pretrian", "stage", "unknown option 'pretrian'", "did you mean 'pretrain'?"),
    ("diff nosuch -- stage=pretrain", "nosuch", "no such run, step or digest", ""),
    ("compare nosuch", "nosuch", "no such run, step or digest", ""),
    ("compare --foo", "--foo", "unknown flag", "type: compare"),
    ("compare", "compare", "there is no finished run", "python -m lmforge"),
    ("generate", "generate", "required: checkpoint, prompt", "type: generate"),
    ("generate nosuch prompt", "nosuch", "no such run, step or digest", ""),
    ("run stage=pretrain hardware=h100x8", "hardware", "is described, not this machine", "hardware=here"),
    ("plan -m stage=pretrain model=nano,nope", "model", "unknown option 'nope'", "nano"),
    ("-m stage=dpo model=nano,micro", "stage.dpo", "nothing to start from", "init_from"),
]

NASTY = [
    # A text that looks like a command, a path or code stays text.
    ("plan 'model=$(touch pwned)' stage=pretrain", "model=$(touch pwned)", "not an override", "write key=value"),
    ("plan model=../../etc/passwd stage=pretrain", "model", "unknown option '../../etc/passwd'", "nano"),
    ("plan 'stage.pretrain.data={{type: text, path: {files}/good.txt}}' stage=pretrain", "stage.pretrain.data.text_field", "missing key", "give it a value"),
    # Python's own names are no keys.
    ("plan model.__class__=x stage=pretrain", "model.__class__", "nothing it names is imported", "choose an option"),
    ("plan stage.pretrain.run=x stage=pretrain", "stage.pretrain.run", "unknown key", ""),
    ("plan stage.pretrain.identity=false stage=pretrain", "stage.pretrain.identity", "unknown key", ""),
    # Numbers that are strings, unicode digits, separators and other bases' spellings.
    ("plan stage=pretrain 'optimizer.global_batch_tokens=\"16k\"'", "optimizer.global_batch_tokens", "expected a whole number, got '16k'", ""),
    ("plan stage=pretrain stage.pretrain.budget.steps=0x10", "stage.pretrain.budget.steps", "expected a whole number, got '0x10'", ""),
    # A batch too large to be looked through divisor by divisor, a model too large to exist.
    (
        "plan stage=pretrain optimizer.global_batch_tokens=1e18 parallel=ddp parallel.devices=3 hardware=cpu",
        "stage.pretrain.optimizer.global_batch_tokens",
        "do not split over 3",
        "type",
    ),
    ("plan stage=pretrain model.num_hidden_layers=1e9", "stage.pretrain", "GiB on one device of", "model= or seq_len= be smaller"),
    ("plan stage=pretrain model.vocab_size=1e15", "tokens.text.vocab_size", "ids do not fit in 32 bits", ""),
    # Keys inside a group that another layer replaced.
    ("plan stage=pretrain stage.pretrain.parallel=ddp parallel.devices=2 hardware=cpu", "parallel.devices", "unknown key", "micro_batch_size"),
    ("plan stage=pretrain stage.pretrain.optimizer=sgd stage.pretrain.optimizer.beta1=0.5", "stage.pretrain.optimizer.beta1", "unknown key", "lr"),
    # Two mistakes, both told at once.
    ("plan stage=pretrain model.hidden_size=-1 optimizer.lr=nan", "model.hidden_size", "-1 must be >= 1", ""),
    ("plan stage=pretrain model.hidden_size=-1 optimizer.lr=nan", "optimizer.lr", "nan is not a finite number", ""),
]

TABLE = [*GROUPS_AND_KEYS, *VALUES, *RELATIONS, *DATA, *DOORS, *FILES, *CHECKPOINTS, *VERBS, *NASTY]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every broken thing that the table names."""
    root = tmp_path_factory.mktemp("files")
    bomb = "a: &a [1, 1]\n" + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True))
    contents: dict[str, str | bytes] = {
        "good.txt": "A sentence.\n" * 50,
        "unusable/readme.md": "no data",
        "unusable/table.csv": "a,b\n1,2\n",
        "empty_files/a.txt": "",
        "empty_files/b.jsonl": "",
        "pairs.jsonl": json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n",
        "two_budgets/experiment/two.yaml": "# @package _global_\ndefaults: [override /stage: [pretrain]]\nstage: {pretrain: {budget: {tokens: 5, steps: 6}}}\n",
        "target/optimizer/mine.yaml": "defaults: [adamw, _self_]\n_target_: os.system\n",
        "callback/experiment/mine.yaml": "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system, command: touch pwned}}}\n",
        "environment/optimizer/mine.yaml": "defaults: [adamw, _self_]\nlr: ${oc.env:HOME}\n",
        "duplicate/optimizer/mine.yaml": "type: adamw\nlr: 1\nlr: 2\n",
        "nested/optimizer/mine.yaml": "type: adamw\nschedule: {type: cosine, type: wsd}\n",
        "tab/optimizer/mine.yaml": "type: adamw\n\tlr: 1\n",
        "utf/optimizer/mine.yaml": b"type: adamw\nlr: \xff\n",
        "tag/optimizer/mine.yaml": 'type: !!python/object/apply:os.system ["touch pwned"]\n',
        "bomb/optimizer/mine.yaml": bomb,
        "deep/optimizer/mine.yaml": "a: " + "[" * 5000 + "]" * 5000 + "\n",
        "null_byte/optimizer/mine.yaml": b"type: adamw\x00\n",
        "empty_option/optimizer/mine.yaml": "",
        "a_list/optimizer/mine.yaml": "- a\n- b\n",
        "unknown_key/optimizer/mine.yaml": "defaults: [adamw, _self_]\nlrr: 1\n",
        "unknown_type/optimizer/mine.yaml": "defaults: [adamw, _self_]\ntype: adanw\n",
        "no_default/optimizer/mine.yaml": "defaults: [nosuch, _self_]\n",
        "cycle/optimizer/mine.yaml": "defaults: [mine, _self_]\n",
        "itself/optimizer/mine.yaml": "defaults: [adamw, _self_]\nlr: ${optimizer.lr}\n",
        "other_group/optimiser/mine.yaml": "type: adamw\n",
        "no_config/model.safetensors": b"",
        "broken_config/config.json": '{"model_type": "llama", ',
        "list_config/config.json": "[1, 2]",
        "nan_config/config.json": '{"model_type": "llama", "hidden_size": NaN}',
        "own_code/config.json": json.dumps({"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}),
        "other_family/config.json": json.dumps({"model_type": "nosuchmodel"}),
        "wrong_type/config.json": json.dumps({**LLAMA, "hidden_size": "big"}),
        "config_only/config.json": json.dumps(LLAMA),
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "empty_folder").mkdir()
    (root / "a_folder" / "optimizer" / "mine.yaml").mkdir(parents=True)
    (root / "dangling" / "optimizer").mkdir(parents=True)
    (root / "dangling" / "optimizer" / "mine.yaml").symlink_to(root / "nosuch")
    (root / "read_only").mkdir(mode=0o500)
    return root


@pytest.mark.parametrize(("command", "where", "what", "instead"), TABLE, ids=[row[0] if len(row[0]) < 90 else row[0][:90] for row in TABLE])
def test_bad_input_is_refused_in_one_line(command: str, where: str, what: str, instead: str, cli: Callable[..., Any], files: Path) -> None:
    """The line names the key, says what is wrong and what to type; nothing is written and no traceback is shown."""
    if "read_only" in command and os.geteuid() == 0:
        pytest.skip("nothing is read-only for root")
    command, where, what = (text.replace("{files}", str(files)).replace("{{", "{").replace("}}", "}") for text in (command, where, what))
    answer = cli(*shlex.split(command))
    said = answer.err.splitlines()
    lines = [line for line in said if LINE.fullmatch(line)]
    assert answer.code == 2, answer.out[:500] + answer.err[:500]
    assert "Traceback" not in answer.err
    assert [line for line in said if line not in lines and not _of_a_sweep(line)] == []
    found = [line.partition(" error: ")[2] for line in lines]
    assert any(line.startswith(f"{where}: ") and what in line and instead in line.partition(what)[2] for line in found), "\n".join(said)
    assert answer.written == []
    assert answer.cpu_s < LIMIT_S


def _of_a_sweep(line: str) -> bool:
    """Hydra names the point of a sweep that failed; `run -m` counts them."""
    return line.startswith("Error executing job with overrides: ") or " points of the sweep failed" in line


def test_every_problem_of_a_config_is_told_at_once(cli: Callable[..., Any]) -> None:
    """Three mistakes in three places are three lines, so that a user mends them in one go."""
    answer = cli("plan", "stage=pretrain", "model.hidden_sze=3", "optimizer.lr=abc", "track.mode=never")
    assert [line.split(": ")[1] for line in answer.err.splitlines()] == ["model.hidden_sze", "track.mode", "optimizer.lr"]


def test_a_higher_layer_replaces_the_whole_budget(plan_of: Callable[..., Any]) -> None:
    """stage/pretrain.yaml sets tokens_per_parameter, the experiment tokens; steps typed on the command line stand alone."""
    for typed in ("stage.pretrain.budget.steps=7", "stage.pretrain.budget={steps: 7}"):
        budget = plan_of("experiment=quickstart", "hardware=cpu", typed, until="expand").step("pretrain").spec.budget
        assert (budget.tokens, budget.steps, budget.flops, budget.tokens_per_parameter) == (None, 7, None, None)


def test_large_round_numbers_are_whole_numbers(plan_of: Callable[..., Any]) -> None:
    """`200e3` is an integer."""
    plan = plan_of("stage=pretrain", "stage.pretrain.budget.tokens=200e3", until="expand")
    assert plan.step("pretrain").spec.budget.tokens == 200_000


def test_a_7b_model_names_what_it_needs_and_what_is_here(cli: Callable[..., Any]) -> None:
    """Parameters, gradients and optimizer states in GiB on one side, this machine's memory on the other."""
    answer = cli("plan", "stage=pretrain", "model=7b", "hardware=cpu")
    assert "(optimizer 54.4 GiB, params 27.2 GiB, grads 27.2 GiB)" in answer.err
    assert "of 16.0 GiB on one device of laptop, 8 cores, 16 GiB" in answer.err


def test_nothing_that_a_config_names_is_ever_run(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A shell command behind every door of Hydra's leaves no trace."""
    proof = tmp_path / "pwned"
    for door in ("hydra.callbacks.x", "hydra.launcher", "hydra.sweeper", "hydra.help", "model", "stage.pretrain"):
        for flags in ((), ("-m",), ("--cfg", "all")):
            cli(*flags, "stage=pretrain", f"++{door}._target_=os.system", f"++{door}.command='touch {proof}'", "hardware=h100x8")
    assert not proof.exists()


def test_secrets_of_the_environment_never_enter_a_config(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`${oc.env:...}` is refused, and the refusal does not tell the value."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value")
    for words in (("plan",), ("--cfg", "job"), ("--cfg", "job", "--resolve"), ("-m",)):
        answer = cli(*words, "stage=pretrain", "track.project=${oc.env:WANDB_API_KEY}", "hardware=h100x8")
        assert "s3cr3t-value" not in answer.out + answer.err


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1], ids=["empty", "half a length", "a length", "half a header", "a byte short"])
def test_a_truncated_checkpoint_is_refused_before_anything_runs(cut: int, verb: str, cli: Callable[..., Any], tmp_path: Path, rows: Path) -> None:
    """The header of safetensors tells how long the file must be; the whole file is not complained of."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(256)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(whole[:cut])
    words = ("stage=dpo", f"stage.dpo.init_from={folder}", "data=text", f"data.path={rows}", "eval=none")
    answer = cli(verb, *words)
    assert (answer.code, answer.written) == (2, [])
    assert answer.err == f"plan error: {folder / 'model.safetensors'}: is truncated or no safetensors file; restore it, or make the checkpoint again\n"
    (folder / "model.safetensors").write_bytes(whole)
    assert cli("plan", *words).code == 0

"""Folders of content for keys that name some, and overrides that bring an option into a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.keys.options import Leaf

COMMITS = ("a" * 40, "b" * 40)


@dataclasses.dataclass(frozen=True)
class World:
    """Folders of content for keys that name some."""

    rows: Path
    text: Path
    other_text: Path
    weights: Path
    other_weights: Path
    tasks: Path

    def base(self, group: str, option: str, stages: str = "[pretrain,sft]") -> list[str]:
        """Overrides that make a plan of which the option is a part; a model's weights are read where the first stage is not pretrain."""
        hardware = ["hardware=h200x8", "hardware.memory_bytes=1e16"]
        data = ["data=text", f"data.path={self.rows}"]
        if group == "model":
            source = {"hf": "known/model"}.get(option, "some/model")
            named = [f"model.pretrained={source}", f"model.revision={COMMITS[0]}"] if option not in ("1b", "7b", "13b") else []
            return [f"model={option}", f"stage={stages}", *named, *data, *hardware]
        if group == "model/tokenizer":
            named = [f"model.pretrained={self.weights}"] if option == "own" else []
            return [f"model.tokenizer={option}", "stage=pretrain", *named, *data, *hardware]
        if group == "data":
            chosen = {"text": [f"data.path={self.text}"], "mixture": [f"data.sources.own.path={self.text}"]}
            return [f"data={option}", "stage=pretrain", "eval=none", *chosen.get(option, []), *hardware]
        if group == "stage":
            if option == "grpo":  # with a trained reward, so that reward_from names something
                model = [f"stage.grpo.reward_from={self.weights}", "stage.grpo.reward=model"]
                return ["stage=[pretrain,grpo]", "eval=none", *model, *data, *hardware]
            if option == "ppo":  # a reward model, with a tokenizer that it shares, only comes with a pipeline
                return ["stage=[pretrain,sft,reward,ppo]", "eval=none", *data, *hardware]
            return [f"stage={option}", *([f"stage.{option}.init_from={self.weights}"] if option != "pretrain" else []), *data, *hardware]
        if group == "adapter":
            return [f"adapter={option}", "stage=[pretrain,sft]", "eval=none", *data, *hardware]
        if group == "reward":
            first = {"model": "reward,"}.get(option, "")
            return [f"stage.grpo.reward={option}", f"stage=[pretrain,sft,{first}grpo]", "eval=none", *data, *hardware]
        if group == "hardware":
            return [f"hardware={option}", "stage=pretrain", "parallel=ddp", "parallel.devices=1", *data]
        # Eight of everything, so that any axis may be 2 or 8.
        wide = ["model.num_hidden_layers=8", "model.num_attention_heads=8", "model.hidden_size=64", "model.tie_word_embeddings=false"]
        several = [*wide, *(["parallel.devices=8"] if option != "single" else [])] if group == "parallel" else []
        several += ["optimizer.max_skips=4"] if group == "optimizer" else []  # skip_sigma asks for some
        return [f"{group}={option}", f"stage={stages}", *several, *data, *hardware]

    def special(self, leaf: Leaf) -> list[Any]:
        """Values that must name something real."""
        return {
            "init_from": [str(self.other_weights)],
            "reward_from": [str(self.other_weights)],
            "pretrained": ["other/model", str(self.other_weights)],
            "revision": [COMMITS[1]],
            "path": [str(self.other_text)],
            "include_path": [str(self.tasks)],
            "exclude": [["idlelib"]],
            "tasks": [["heldout_code"]],
            "seq_len": [200],
            "dp_shard": [4],
            "target_modules": [["q_proj"]],
            "pattern": ["another"],
            "rewards": [{"parses": {"min_nodes": 2}}],
            "sources": [{"code": {"heldout_fraction": 0.5}}],
        }.get(leaf.name, [])

"""expand: stages become steps, wired by what each consumes and produces.

What a stage consumes is taken from the steps before it; where nothing before makes it, a provider is added: the data
node for a corpus, a tokenizer for the model's vocabulary, a tokenize step per view, a reference pass per preference set.
Steps that are the same thing are one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lmforge.adapter.nodes import Merge
from lmforge.codec import decode
from lmforge.data.nodes import Data
from lmforge.errors import PlanError, Problem
from lmforge.experiment import Experiment, NamedStage
from lmforge.formats import store
from lmforge.model.fetch import FetchWeights
from lmforge.model.fetch_tokenizer import FetchTokenizer
from lmforge.model.weights import max_positions, vocab_size
from lmforge.plan import Artifact, Plan, Step
from lmforge.registry import types
from lmforge.stage.nodes import Stage
from lmforge.step import StepNode
from lmforge.tokenizer.nodes import BPE, Tokenize


def expand(plan: Plan) -> Plan:
    """The steps of every stage in order, with evaluation after each and quantization at the end."""
    return dataclasses.replace(plan, steps=_Expansion(plan.experiment).steps())


WEIGHTS = ("checkpoint", "adapter")
SHORTEST = 2  # tokens of an example


class _Expansion:
    """Steps being gathered, with the latest artifact of each kind in scope."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.config: dict[str, Any] = experiment.model.config()
        self.made: list[Step] = []
        self.scope: dict[str, Artifact] = {}
        self.cache = store.cache(experiment.output, "weights.json")
        self.evaluated = 0
        self.makers: dict[str, Callable[[str, Data, int], Artifact]] = {
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
            "tokens": self.tokens,
        }

    def steps(self) -> tuple[Step, ...]:
        stages = self.experiment.stages
        for index, named in enumerate(stages):
            self.start(named, first=index == 0)
            self.stage(named)
            last = not any(later.stage.makes() in WEIGHTS for later in stages[index + 1 :])
            if named.stage.makes() in WEIGHTS and self.experiment.eval.measures(last):
                self.evaluate(named.name)
        if self.experiment.quantize.produces:
            self.quantize()
        return tuple(self.made)

    def add(self, name: str, spec: StepNode, inputs: tuple[Artifact, ...]) -> Artifact:
        """The step that does this, made once however many ask for it."""
        for step in self.made:
            if step.inputs == inputs and step.spec == spec:  # inputs differ more often, and compare faster
                return Artifact(step=step.name, kind=spec.makes())
        taken = {step.name for step in self.made}
        name = name if name not in taken else next(f"{name}.{n}" for n in range(2, 1000) if f"{name}.{n}" not in taken)
        self.made.append(Step(name=name, stage=spec.type, group=spec.group, spec=spec, inputs=inputs))
        return Artifact(step=name, kind=spec.makes())

    def start(self, named: NamedStage, first: bool) -> None:
        """Weights from outside: what the stage's `init_from` says, or what the model names when the first stage trains on from weights."""
        source, revision = getattr(named.stage, "init_from", None), None
        if source is None and first and "checkpoint" in named.stage.takes():
            source, revision = self.experiment.model.pretrained, self.experiment.model.revision
        if source is None:
            return
        self.evaluated += 1  # an untrained or a bigram model says nothing beside weights from elsewhere
        self.scope.pop("adapter", None)  # of an earlier stage, whose weights these replace
        self.scope["checkpoint"] = self.add("weights", FetchWeights.of(source, revision, self.cache, self.config), ())
        self.scope["tokenizer"] = dataclasses.replace(self.scope["checkpoint"], kind="tokenizer")
        if self.experiment.eval.measures(last=False):
            self.evaluate("weights")

    def reward_model(self, named: NamedStage) -> None:
        """A reward model from outside, where the stage names one."""
        source = getattr(named.stage, "reward_from", None)
        if source is None:
            return
        if "reward_model" not in named.stage.takes():
            raise PlanError(f"stage.{named.name}.reward_from", "nothing of this stage asks a reward model", f"type stage.{named.name}.reward=model")
        made = self.add("reward_weights", FetchWeights.of(source, None, self.cache), ())
        self.scope["reward_model"] = dataclasses.replace(made, kind="reward_model")

    def stage(self, named: NamedStage) -> None:
        stage = named.stage
        self.reward_model(named)
        wanted = list(stage.takes())
        if "checkpoint" in self.scope and stage.makes() in WEIGHTS and "checkpoint" not in wanted:
            wanted.insert(0, "checkpoint")
        data = getattr(stage, "data", self.experiment.data)
        inputs = tuple(self.need(kind, named, data, self.example_tokens(named)) for kind in wanted)
        self.scope[stage.makes()] = self.add(named.name, stage, inputs)

    def example_tokens(self, named: NamedStage) -> int:
        """The longest example the stage takes; PlanError where its answers leave no room for a prompt."""
        context = max_positions(self.config)
        room, answer = named.stage.example_tokens(context), getattr(named.stage, "max_new_tokens", 0)
        if room < SHORTEST and not answer:
            most = f"at most {context - SHORTEST} of them"
            raise PlanError(f"stage.{named.name}.adapter", "its virtual tokens leave no room in the model's context", most)
        if room < SHORTEST:
            what = f"{answer:,} tokens of answer leave no room for a prompt in {room + answer:,}"
            raise PlanError(f"stage.{named.name}.max_new_tokens", what, f"type at most {(room + answer) // 2}")
        return room

    def checkpoint(self) -> Artifact:
        """The latest weights; an adapter is merged into its base when somebody asks for them, and not before."""
        adapter = self.scope.pop("adapter", None)
        if adapter is not None:
            self.scope["checkpoint"] = self.add(f"{adapter.step}.merge", Merge(), (self.scope["checkpoint"], adapter))
        return self.scope["checkpoint"]

    def need(self, kind: str, named: NamedStage, data: Data, seq_len: int) -> Artifact:
        """The artifact of that kind: made before, or made now."""
        base, _, argument = kind.partition(":")
        if base in self.makers:
            return dataclasses.replace(self.makers[base](argument, data, seq_len), kind=kind)
        if base == "checkpoint" and base in self.scope:
            return self.checkpoint()
        if base in self.scope:
            return self.scope[base]
        for cls in types("step").values():
            if issubclass(cls, StepNode) and cls.produces == base and base not in cls.consumes and (made := cls.made_for(named.stage)) is not None:
                inputs = tuple(self.need(one, named, data, seq_len) for one in cls.consumes)
                return self.add(f"{named.name}.{base}", made, inputs)
        raise PlanError.of([self.missing(kind, named)])

    def missing(self, kind: str, named: NamedStage) -> Problem:
        where = f"stage.{named.name}"
        if kind == "checkpoint":
            model = self.experiment.model
            before = f"stage=[pretrain,{named.name}], " if named.name != "pretrain" else ""
            return Problem(
                where,
                f"nothing to start from: the model ({model.type}) names no pretrained weights",
                f"type {before}{where}.init_from=<folder | hub id | run>, or a model with weights (model=1b)",
            )
        makers = sorted(name for name, cls in types("stage").items() if issubclass(cls, Stage) and kind == cls.produces)
        return Problem(where, f"consumes '{kind}', which no earlier stage makes", f"put {' or '.join(makers) or 'a stage that makes it'} before it")

    def corpus(self, _: str, data: Data, __: int) -> Artifact:
        name = "data" if data == self.experiment.data else f"data.{data.type}"
        return self.add(name, data, ())

    def tokenizer(self, _: str, data: Data, seq_len: int) -> Artifact:
        """Trained for a pipeline from scratch; otherwise it came with the weights. One for the whole pipeline."""
        if "tokenizer" in self.scope:
            return self.scope["tokenizer"]
        node = self.experiment.model.tokenizer
        if node.trains:
            if isinstance(node, BPE) and node.vocab_size is None:
                node = dataclasses.replace(node, vocab_size=vocab_size(self.config))
            self.scope["tokenizer"] = self.add("tokenizer", node, (self.corpus("", data, seq_len),))
        else:
            source = self.experiment.model.pretrained
            if source is None:
                what = "'own' takes the tokenizer of the weights, and the model names none"
                raise PlanError("model.tokenizer", what, "type model.tokenizer=bpe to train one")
            self.scope["tokenizer"] = self.add("tokenizer", FetchTokenizer(source=source, revision=self.experiment.model.revision), ())
        return self.scope["tokenizer"]

    def tokens(self, view: str, data: Data, seq_len: int) -> Artifact:
        # Text documents are never cut: whatever a stage's sequence length, they are one step of the model's.
        longest = max_positions(self.config) if view == "text" else seq_len
        spec = decode(Tokenize, {"type": Tokenize.type, "view": view, "seq_len": longest, "vocab_size": vocab_size(self.config)}, f"tokens.{view}")
        inputs = (self.corpus("", data, seq_len), dataclasses.replace(self.tokenizer("", data, seq_len), kind="tokenizer"))
        return self.add(f"tokens.{view}", spec, inputs)

    def evaluate(self, name: str) -> None:
        node = self.experiment.eval if self.evaluated == 0 else self.experiment.eval.later()
        self.evaluated += 1
        inputs = []
        for kind in node.consumes:
            view = kind.partition(":")[2]
            if view and view not in self.experiment.data.views:
                continue
            if kind == "checkpoint":
                inputs.append(self.checkpoint())
            else:
                maker = self.makers[kind.partition(":")[0]]
                inputs.append(dataclasses.replace(maker(view, self.experiment.data, max_positions(self.config)), kind=kind))
        self.add(f"eval.{name}", node, tuple(inputs))

    def quantize(self) -> None:
        if "checkpoint" not in self.scope:
            raise PlanError("quantize", "no stage of this plan makes a checkpoint to quantize", "add a training stage, or type quantize=none")
        self.scope["checkpoint"] = self.add("quantize", self.experiment.quantize, (self.checkpoint(),))
        if self.experiment.eval.measures(last=True):
            self.evaluate("quantize")

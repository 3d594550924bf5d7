"""validate: relations between nodes. What one node can see of itself it has checked already."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lmforge.compiler import capability
from lmforge.errors import PlanError, Problem
from lmforge.model.agree import differences
from lmforge.model.fetch import FetchWeights
from lmforge.model.source import local_folder, read_config
from lmforge.model.weights import max_positions, vocab_size, weights
from lmforge.parallel.nodes import Auto
from lmforge.plan import Plan
from lmforge.stage.nodes import Ppo, RewardModel, TrainingStage, Tuning
from lmforge.tokenizer.nodes import Tokenize


def validate(plan: Plan) -> Plan:
    """The same plan; PlanError with every relation that does not hold."""
    problems = [problem for rule in RULES for problem in rule(plan)]
    if problems:
        raise PlanError.of(problems)
    return plan


def order(plan: Plan) -> Iterator[Problem]:
    """A stage may not throw away what an earlier one learned."""
    stages = plan.experiment.stages
    for before, after in itertools.pairwise(stages):
        if after.stage.follows and before.stage.type not in after.stage.follows:
            ordered = sorted(stages, key=lambda one: "checkpoint" in one.stage.takes())
            yield Problem("stage", f"{after.name} cannot come after {before.name}", f"type 'stage=[{','.join(one.name for one in ordered)}]'")


def views(plan: Plan) -> Iterator[Problem]:
    """The data must offer the view a stage reads."""
    for named in plan.experiment.stages:
        data = getattr(named.stage, "data", None)
        if data is not None and named.stage.view and not data.offers(named.stage.view):
            offers = ", ".join(data.views) or "nothing readable"
            what = f"{data.type} offers {offers}, not the {named.stage.view} view that {named.name} reads"
            yield Problem(f"stage.{named.name}.data", what, f"type stage.{named.name}.data=<an option with a {named.stage.view} view>")


def one_model(plan: Plan) -> Iterator[Problem]:
    """Every stage changes the same weights, so a stage cannot have a model of its own."""
    for named in plan.experiment.stages:
        model = getattr(named.stage, "model", None)
        if model is not None and model != plan.experiment.model:
            yield Problem(f"stage.{named.name}.model", "a pipeline has one model", "give these keys to the root: model=..., model.<key>=...")


def context(plan: Plan) -> Iterator[Problem]:
    """A sequence cannot be longer than the model's positions."""
    longest = max_positions(plan.experiment.model.config())
    for named in plan.experiment.stages:
        stage = named.stage
        taken = stage.adapter.positions if isinstance(stage, Tuning) else 0  # by a soft prompt
        if isinstance(stage, TrainingStage) and taken and stage.length(longest) + taken > longest:
            what = f"{stage.length(longest):,} tokens and {taken} virtual ones do not fit the model's context of {longest:,}"
            yield Problem(f"stage.{named.name}.seq_len", what, f"type at most {longest - taken}")
        elif isinstance(stage, TrainingStage) and stage.seq_len is not None and stage.seq_len > longest:
            yield Problem(f"stage.{named.name}.seq_len", f"{stage.seq_len:,} tokens do not fit the model's context of {longest:,}", f"type at most {longest}")


def vocabulary(plan: Plan) -> Iterator[Problem]:
    """A tokenizer cannot be bigger than the model's vocabulary."""
    known = vocab_size(plan.experiment.model.config())
    wanted = getattr(plan.experiment.model.tokenizer, "vocab_size", None)
    if wanted is not None and wanted > known and any(isinstance(step.spec, Tokenize) for step in plan.steps):
        what = f"a tokenizer of {wanted:,} entries is bigger than the model's vocabulary of {known:,}"
        yield Problem("model.tokenizer.vocab_size", what, f"type at most {known}, or model.vocab_size={wanted}")


def same_shape(plan: Plan) -> Iterator[Problem]:
    """Weights of a local folder decide the model, so a model typed beside them may say nothing else; weights from the hub are not here to compare."""
    model, typed = plan.experiment.model, {}
    for named in reversed(plan.experiment.stages):
        if (start := getattr(named.stage, "init_from", None)) and (folder := local_folder(start)):
            typed[str(folder.resolve())] = f"stage.{named.name}.init_from"
    starts = {one.step for step in plan.steps for one in step.inputs if one.kind == "checkpoint"}  # a reward model may have any shape
    for step in plan.steps:
        if step.name not in starts or not isinstance(step.spec, FetchWeights) or local_folder(step.spec.source) is None:
            continue
        where = typed.get(step.spec.source, "model.pretrained")
        found = differences(model.config(), read_config(step.spec.source, None, where))
        if found:
            one, more = found[0], f" (and {len(found) - 1} more of the model's keys)" if found[1:] else ""
            ours = f"model.{one.key} says {one.ours!r}" if hasattr(model, one.key) else f"the model's is {one.ours!r}"
            instead = f"type model=hf model.pretrained={model.pretrained}" if where == "model.pretrained" else "leave model out"
            yield Problem(where, f"its config.json says {one.key}={one.theirs!r}, {ours}{more}", f"{instead}, the weights decide")


def whole_weights(plan: Plan) -> Iterator[Problem]:
    """A safetensors file whose header does not match its length is told before anything runs; a folder without weights will do for a plan."""
    from safetensors import SafetensorError, safe_open

    for step in plan.steps:
        folder = local_folder(step.spec.source) if isinstance(step.spec, FetchWeights) else None
        for file in sorted(folder.glob("*.safetensors")) if folder else ():
            try:
                with safe_open(file, framework="numpy"):
                    continue
            except (OSError, SafetensorError):
                yield Problem(str(file), "is truncated or no safetensors file", "restore it, or make the checkpoint again")


def adapters(plan: Plan) -> Iterator[Problem]:
    """An adapter's targets are the model's; a soft prompt has no score, and it stays the last thing trained, for it cannot be merged into weights."""
    config = plan.experiment.model.config()
    soft = ""
    for named in plan.experiment.stages:
        stage = named.stage
        if soft and "checkpoint" in stage.takes():
            what = f"{soft} trains a soft prompt, which cannot be merged into the weights that {named.name} starts from"
            yield Problem(f"stage.{named.name}", what, f"make {soft} the last stage, or type stage.{soft}.adapter=lora")
            return
        if not isinstance(stage, Tuning):
            continue
        yield from stage.adapter.problems(weights(config), f"stage.{named.name}.adapter")
        if not stage.adapter.packs and isinstance(stage, (RewardModel, Ppo)):
            model = "reward" if isinstance(stage, RewardModel) else "value"
            yield Problem(f"stage.{named.name}.adapter", f"a {model} model has no score under a soft prompt", f"type stage.{named.name}.adapter=lora or none")
        elif not stage.adapter.packs:
            soft = named.name
    if soft and plan.experiment.quantize.produces:
        yield Problem("quantize", f"{soft} trains a soft prompt, which cannot be merged into the weights", "type quantize=none, or another adapter")


def devices(plan: Plan) -> Iterator[Problem]:
    """No more devices than there are."""
    machine = plan.experiment.hardware.machine()
    for named in plan.experiment.stages:
        parallel = getattr(named.stage, "parallel", None)
        if parallel is not None and (asked := parallel.world(machine.devices)) > machine.devices:
            yield Problem(
                f"stage.{named.name}.parallel.devices",
                f"{asked} devices asked, {machine.name} has {machine.devices}",
                f"type parallel.devices={machine.devices}, or plan for another hardware=",
            )


def meshes(plan: Plan) -> Iterator[Problem]:
    """Axes that multiply to the devices, and nothing on them that does not run there."""
    machine, config = plan.experiment.hardware.machine(), plan.experiment.model.config()
    for named in plan.experiment.stages:
        if not isinstance(named.stage, TrainingStage) or named.stage.parallel.world(machine.devices) > machine.devices:
            continue
        if isinstance(named.stage.parallel, Auto):  # not chosen yet; lmforge.compiler.auto asks the same of every mesh
            continue
        try:
            mesh = named.stage.parallel.mesh(named.stage.parallel.world(machine.devices))
        except PlanError as error:
            yield from (Problem(f"stage.{named.name}.{one.where}", one.what, one.instead) for one in error.problems)
            continue
        yield from capability.problems(named.stage, config, mesh, f"stage.{named.name}")


RULES = (order, views, one_model, context, vocabulary, same_shape, whole_weights, adapters, devices, meshes)

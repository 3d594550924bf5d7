"""The torch side of adapters: PEFT modules onto a transformers model, and off it again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmforge.adapter.targets import ALL_LINEAR
from lmforge.errors import RunError
from lmforge.inference.adapters import WEIGHTS_FILE, library, quiet_peft
from lmforge.inference.base import write_base
from lmforge.inference.checkpoint import open_tokenizer
from lmforge.inference.four_bit import dense
from lmforge.inference.positions import follow_mask
from lmforge.inference.saving import copy_tokenizer, whole_folder

if TYPE_CHECKING:
    from lmforge.adapter.nodes import PromptTuning

Reader = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
SCORE = "score"  # transformers' name for the head of a sequence classifier


def low_rank(model: Any, config: Any, targets: Sequence[str], seed: int | None) -> Any:
    """LoRA or DoRA by PEFT on the layers that `targets` mean, the rest frozen; A is drawn from `seed`, or from the caller's random state."""
    config.target_modules = linear_names(model) if tuple(targets) == (ALL_LINEAR,) else list(targets)
    if hasattr(model, SCORE):
        config.task_type = None
    made = _peft(model, config, seed)
    if config.init_lora_weights == "pissa":
        _keep_start(made)
    return made


def linear_names(model: Any) -> list[str]:
    """Names of the linear layers but for the output layer, without where they are: what PEFT's `all-linear` means, stacked experts and routers left out."""
    from transformers.pytorch_utils import Conv1D

    heads = (model.get_output_embeddings(), getattr(model, SCORE, None))
    found = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer not in heads}
    return sorted(found)


def soft_prompt(model: Any, node: PromptTuning, seed: int | None) -> Any:
    """Prompt tuning by PEFT: `virtual_tokens` trained embeddings before every row, begun as the node says."""
    table = model.get_input_embeddings().weight
    task = "SEQ_CLS" if hasattr(model, SCORE) else "CAUSAL_LM"
    made = _peft(model, library().PromptTuningConfig(task_type=task, num_virtual_tokens=node.virtual_tokens), seed)
    if node.init_text is not None or node.init == "vocabulary":
        with torch.no_grad(), _seeded(seed):
            drawn = torch.randint(len(table), (node.virtual_tokens,))
            ids = drawn if node.init_text is None else _text_ids(model, node.init_text, node.virtual_tokens)
            made.prompt_encoder["default"].embedding.weight.copy_(table[ids.to(table.device)])
    follow_mask(made)
    return made


def _text_ids(model: Any, text: str, count: int) -> torch.Tensor:
    """The tokens of a text, repeated or cut to `count` (as PEFT does)."""
    folder = Path(model.name_or_path or "-")
    if not folder.is_dir():
        raise RunError("adapter.init_text", "needs the model's tokenizer, and the model was opened from no folder", "type adapter.init_text=null")
    ids = open_tokenizer(folder)(text)["input_ids"]
    if not ids:
        raise RunError("adapter.init_text", "has no tokens", "type some words")
    return torch.tensor((ids * -(-count // len(ids)))[:count])


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from `seed`, and the caller's as they were; without one, the caller's are drawn from."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _peft(model: Any, config: Any, seed: int | None) -> Any:
    """PEFT's model, in the mode the model is in.

    The scalar head of a reward or value model begins anew, so it is trained whole: in its place, where PEFT would train a copy of it.
    """
    with _seeded(seed), quiet_peft():
        made: Any = library().get_peft_model(model, config, autocast_adapter_dtype=False)
    if hasattr(model, SCORE):
        model.score = getattr(model.score, "original_module", model.score).requires_grad_(True)
    return made.train(model.training)


# PiSSA takes B A out of the base, so the base is what is left together with the first A and B


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, library().tuners.lora.LoraLayer)]


def _parts(layer: Any) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """A and B of a layer, each with what it was at the start."""
    return [(layer.lora_A["default"].weight, layer.start_A), (layer.lora_B["default"].weight, layer.start_B)]


def _keep_start(model: Any) -> None:
    for layer in _layers(model):
        for name, part in (("start_A", layer.lora_A), ("start_B", layer.lora_B)):
            layer.register_buffer(name, part["default"].weight.detach().clone(), persistent=False)


@contextlib.contextmanager
def without(model: Any) -> Iterator[None]:
    """The model as its base within the block, whatever the adapter has learned, and as it was after it."""
    parts = [part for layer in _layers(model) if hasattr(layer, "start_A") for part in _parts(layer)]
    if not parts:
        with model.disable_adapter():
            yield
        return
    learned = [parameter.data for parameter, _ in parts]
    try:
        for parameter, start in parts:
            parameter.data = start.to(parameter)
        yield
    finally:
        for (parameter, _), kept in zip(parts, learned, strict=True):
            parameter.data = kept


def plain_lora(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(config, tensors) of the adapter as PEFT keeps them.

    PiSSA is written as the LoRA of twice the rank that it is on the untouched base: B A - B0 A0 = [B, -B0] [A; A0], as PEFT's own conversion does.
    """
    config, tensors = copy.copy(model.peft_config["default"]), library().get_peft_model_state_dict(model, save_embedding_layers=False)
    if getattr(config, "init_lora_weights", None) != "pissa":
        return config, tensors
    starts = {name: layer for name, layer in model.named_modules() if hasattr(layer, "start_A")}
    for name, layer in starts.items():
        tensors[f"{name}.lora_A.weight"] = torch.cat([tensors[f"{name}.lora_A.weight"], layer.start_A.to(tensors[f"{name}.lora_A.weight"])], dim=0)
        tensors[f"{name}.lora_B.weight"] = torch.cat([tensors[f"{name}.lora_B.weight"], -layer.start_B.to(tensors[f"{name}.lora_B.weight"])], dim=1)
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the factor alpha / r, or alpha / sqrt(r), stays as it was
    config.r, config.init_lora_weights = 2 * config.r, True
    return config, tensors


def merged(model: Any) -> Any:
    """The transformers model with the adapter's weights added to its own; a base in 4 bits becomes the dense weights those bits stand for.

    PEFT itself would round the sum to 4 bits again.
    """
    if not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        return model.merge_and_unload()
    peft, config = library(), model.peft_config["default"]
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    with quiet_peft():
        again = peft.get_peft_model(dense(model.unload()), config, autocast_adapter_dtype=False)
        peft.set_peft_model_state_dict(again, tensors)
    return again.merge_and_unload()


def merged_in_turn(bones: Any, read: Reader) -> tuple[Any, Reader]:
    """`merged` of LoRA on a base without memory: what is to be added is made when a weight is read."""
    names = {parameter: name for name, parameter in bones.named_parameters()}
    layers = {layer.get_base_layer().weight: layer for layer in _layers(bones)}
    plain = bones.unload()
    weights = dict(plain.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def merged(wanted: Sequence[str]) -> Mapping[str, torch.Tensor]:
        found = read([names[weights[name]] for name in wanted])
        if not found:
            return {}
        made = {name: found[names[weights[name]]] for name in wanted}
        return {name: value + layers[weights[name]].get_delta_weight("default") if weights[name] in layers else value for name, value in made.items()}

    return plain, merged


def save(model: Any, tokenizer_folder: Path, out: Path, base: Path, quantized: dict[str, Any] | None) -> None:
    """Write `out` as a PEFT folder with the tokenizer's files and base.json, whole or not at all."""
    from safetensors.torch import save_file

    config, tensors = plain_lora(model)
    config.base_model_name_or_path, config.inference_mode = str(base.resolve()), True
    with whole_folder(out) as partial:
        config.save_pretrained(partial)
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_tokenizer(tokenizer_folder, partial)
        write_base(partial, base, quantized)

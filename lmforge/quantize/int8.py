"""INT8 weights in compressed-tensors' pack-quantized format: written, opened again, and compared before anyone else reads them."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmforge.errors import CheckpointError, RunError
from lmforge.inference.checkpoint import INDEX, open_model, read_config, weight_files

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PreTrainedModel

FORMAT = "pack-quantized"
TOLERANCE = 1e-4  # of the largest logit; the reloaded weights are the same numbers, so only the order of sums may differ


@dataclass(frozen=True)
class Choice:
    """Which modules of a model are quantized, and which stay."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]


def quantize_folder(
    source: Path, out: Path, *, embeddings: bool, skip: tuple[str, ...], group_size: int | None, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Write `source`, quantized, to `out`; returns bytes on disk, bits per parameter and the layers with the largest relative error.

    CheckpointError for a model that is quantized already, RunError where nothing is left to quantize or the reloaded model differs.
    """
    config = read_config(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise CheckpointError(str(source), f"is quantized already ({method})", "quantize the checkpoint it was made from")
    files = weight_files(source)
    model = open_model(source, "cpu")
    choice = choose(model, embeddings, skip)
    scheme = make_scheme(model, choice, group_size)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    tensors, errors = _quantize_tensors(model, choice, scheme, progress)
    _write(source, out, tensors, config | {"quantization_config": _describe(scheme, choice, embeddings)})
    difference = _compare(model, open_model(out, "cpu"))
    before, after = sum(path.stat().st_size for path in files), sum(path.stat().st_size for path in weight_files(out))
    params = sum(parameter.numel() for parameter in model.parameters())  # a tied tensor counts once
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    return {
        "bytes_before": before,
        "bytes_after": after,
        "size_ratio": after / before,
        "bits_per_parameter_before": 8 * before / params,
        "bits_per_parameter": 8 * after / params,
        "params_total": params,
        "params_quantized": sum(weight_of(model, name).numel() for name in choice.quantized),
        "tied_embeddings": tied,
        "relative_error_mean": sum(errors.values()) / len(errors),
        "worst_layers": [{"name": name, "relative_error": error} for name, error in worst],
        "reload_logit_difference": difference,
    }


def choose(model: PreTrainedModel, embeddings: bool, skip: tuple[str, ...]) -> Choice:
    """Linear layers, and embeddings where asked, but for `skip`. A module that shares a kept module's tensor is kept with it."""
    import torch

    modules = {name: module for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))}
    for pattern in skip:
        if not any(_matches(name, pattern) for name in modules):
            raise RunError("quantize.skip", f"{pattern!r} matches no layer", f"layers are named like {', '.join(list(modules)[:2] + list(modules)[-1:])}")
    left = {name for name, module in modules.items() if any(_matches(name, one) for one in skip) or (isinstance(module, torch.nn.Embedding) and not embeddings)}
    held = {id(modules[name].weight) for name in left}
    stored: set[int] = set()  # a tied tensor is in the file once, under its first name
    quantized = []
    for name, module in modules.items():
        if id(module.weight) not in held | stored:
            stored.add(id(module.weight))
            quantized.append(name)
    if not quantized:
        raise RunError("quantize", "no layer is left to quantize", "make quantize.skip shorter or set quantize.embeddings=true")
    return Choice(tuple(quantized), tuple(name for name in modules if name not in quantized))


def weight_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The weight of the named module, shape (rows, input features)."""
    return model.get_parameter(f"{name}.weight")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def make_scheme(model: PreTrainedModel, choice: Choice, group_size: int | None) -> QuantizationScheme:
    """The one scheme of the file: 8 bits, symmetric, a scale per channel or per group. RunError where the group does not divide a layer's width."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for name in choice.quantized if group_size else ():
        width = weight_of(model, name).shape[1]
        if group_size and width % group_size:
            raise RunError("quantize.group_size", f"{group_size} does not divide the {width} input features of {name}", "null, or a divisor of every width")
    shape: dict[str, Any] = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    targets = sorted({type(model.get_submodule(name)).__name__ for name in choice.quantized}, reverse=True)
    return QuantizationScheme(targets=targets, weights=QuantizationArgs(num_bits=8, type="int", symmetric=True, **shape), format=FORMAT)


def scales(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """Absmax / 127 by output row, shape (rows, 1), or by group of inputs, shape (rows, groups); 1 where all is zero, so that nothing divides by it."""
    grouped = weight.float().reshape(weight.shape[0], -1, group_size or weight.shape[1])
    scale = (grouped.abs().amax(2) / 127).to(weight.dtype)
    return scale.where(scale > 0, 1)


def _quantize_tensors(
    model: PreTrainedModel, choice: Choice, scheme: QuantizationScheme, progress: Callable[[int, int, str], None]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors of the new file and each layer's relative error; `model` itself ends with the dequantized weights, as what the file must equal."""
    import torch
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    packed: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    assert scheme.weights is not None
    for done, name in enumerate(choice.quantized):
        weight = weight_of(model, name).detach()
        state = compressor.compress({"weight": weight, "weight_scale": scales(weight, scheme.weights.group_size)}, scheme)
        packed |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
        restored = compressor.decompress(state, scheme)["weight"].to(weight.dtype)
        errors[name] = float((restored - weight).float().norm() / weight.float().norm().clamp_min(1e-30))
        with torch.no_grad():
            weight.copy_(restored)
        progress(done + 1, len(choice.quantized), name)
    rest, seen = {}, {id(weight_of(model, name)) for name in choice.quantized}
    for name, tensor in (*model.named_parameters(), *_saved_buffers(model)):
        if id(tensor) not in seen:  # named_parameters gives a tied tensor once, under its first name
            rest[name] = tensor.detach().contiguous()
    return rest | packed, errors


def _saved_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _describe(scheme: QuantizationScheme, choice: Choice, embeddings: bool) -> dict[str, Any]:
    """config.json's `quantization_config`. transformers 5.23 opens packed embeddings only where it dequantizes at load, which the file then asks for."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": scheme}, quant_method="compressed-tensors", format=FORMAT, quantization_status="compressed", ignore=list(choice.kept)
    )
    plain: dict[str, Any] = json.loads(config.model_dump_json())
    if "Embedding" in scheme.targets and embeddings:
        plain["dequantize"] = True
    return plain


def _write(source: Path, out: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    from huggingface_hub import save_torch_state_dict

    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, out / path.name)
    save_torch_state_dict(tensors, out, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _compare(expected: PreTrainedModel, reloaded: PreTrainedModel) -> float:
    """The largest difference of logits on a fixed probe; RunError where the folder is not the model that was meant."""
    import torch

    probe = torch.randint(0, expected.config.get_text_config().vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = expected(probe).logits.float(), reloaded(probe).logits.float()
    difference = float((want - got).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(want.abs().max())):  # written so that NaN fails too
        raise RunError("quantize", f"the reloaded model's logits differ by {difference:.3g} from the quantized one's", "report this model's architecture")
    return difference

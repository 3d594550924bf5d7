"""What `eval=perplexity` does with one checkpoint, from the folder to metrics.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmforge.eval.bigram import bigram_perplexity
from lmforge.eval.perplexity import choose_rows, perplexity
from lmforge.eval.preference import choose_pairs, score_pairs, summarize, write_pairs
from lmforge.formats.tokens import Tokens
from lmforge.inference.checkpoint import context_tokens, open_model, open_tokenizer, quiet_transformers
from lmforge.inference.generate import stream
from lmforge.step import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmforge.eval.nodes import Perplexity

SEED = 0  # of the untrained model and of the sample: the same for every checkpoint, so that they compare
TOP_P = 0.95


def measure(node: Perplexity, context: Context) -> dict[str, Any]:
    """Everything the node asks for that the inputs allow; the metrics also go to out/metrics.json."""
    text, chat, preference = (context.inputs.get(f"tokens:{view}") for view in ("text", "chat", "preference"))
    checkpoint = context.inputs["checkpoint"]
    model = open_model(checkpoint)
    metrics: dict[str, Any] = {}
    if text is not None:
        metrics |= _text(node, context, model, Tokens(text, "heldout"))
    if chat is not None:
        metrics |= _answers(node, context, model, Tokens(chat, "heldout"))
    if preference is not None:
        metrics |= _pairs(node, context, model, Tokens(preference, "heldout"))
    if node.sample_tokens:
        metrics |= _sample(node, context, model, Tokens(text, "heldout") if text is not None else None)
    write_json(context.out / "metrics.json", metrics)
    return metrics


def _text(node: Perplexity, context: Context, model: PreTrainedModel, heldout: Tokens) -> dict[str, Any]:
    rows = choose_rows(heldout, node.max_tokens)
    size, progress = node.batch_tokens, context.report.progress
    metrics: dict[str, Any] = perplexity(model, heldout, rows, batch_tokens=size, progress=progress).plain()
    if node.untrained:
        metrics["untrained_perplexity"] = perplexity(untrained(model), heldout, rows, batch_tokens=size, progress=progress).perplexity
    if node.bigram:
        metrics |= bigram_perplexity(Tokens(heldout.folder, "train"), heldout, rows)
    return metrics


def _answers(node: Perplexity, context: Context, model: PreTrainedModel, heldout: Tokens) -> dict[str, Any]:
    """Perplexity of the assistant's turns given what came before them: what SFT is trained on."""
    rows = choose_rows(heldout, node.max_tokens)
    found = perplexity(model, heldout, rows, batch_tokens=node.batch_tokens, progress=context.report.progress)
    return {
        "answer_perplexity": found.perplexity,
        "answer_perplexity_standard_error": found.perplexity_standard_error,
        "answer_tokens": found.tokens,
    }


def untrained(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture with random weights, from a fixed seed, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    maker: Any = AutoModelForCausalLM  # untyped in transformers

    plain = {key: value for key, value in model.config.to_dict().items() if key not in ("quantization_config", "dtype")}
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(SEED)
        fresh: PreTrainedModel = maker.from_config(AutoConfig.for_model(**plain), dtype=torch.float32).to(model.device).eval()
    return fresh


def _pairs(node: Perplexity, context: Context, model: PreTrainedModel, heldout: Tokens) -> dict[str, Any]:
    chosen = choose_pairs(heldout, node.max_pairs)
    scored = score_pairs(model, heldout, chosen, batch_tokens=node.batch_tokens, progress=context.report.progress)
    write_pairs(context.out / "preference.jsonl", scored)
    return summarize(scored)


def _sample(node: Perplexity, context: Context, model: PreTrainedModel, heldout: Tokens | None) -> dict[str, Any]:
    """A continuation of the prompt, or of a held-out document's beginning; shown to the user and kept in the metrics."""
    tokenizer = open_tokenizer(context.inputs["checkpoint"])
    prompt = _prompt(node, tokenizer, heldout)
    room = context_tokens(model) - len(tokenizer(prompt)["input_ids"])
    length = min(node.sample_tokens, max(1, room))
    text = "".join(stream(model, tokenizer, prompt, max_new_tokens=length, temperature=node.sample_temperature, top_p=TOP_P, seed=SEED, chat=False))
    context.report.sample(f"{context.step}: what it writes after {prompt[-40:]!r}", prompt + text)
    return {"sample": {"prompt": prompt, "text": text}}


def _prompt(node: Perplexity, tokenizer: PreTrainedTokenizerBase, heldout: Tokens | None) -> str:
    if node.sample_prompt is not None or heldout is None:
        return node.sample_prompt or ""
    for index in range(len(heldout)):
        ids, _ = heldout.example(index)
        if len(ids) > node.sample_prompt_tokens:
            return str(tokenizer.decode(ids[: node.sample_prompt_tokens].tolist(), skip_special_tokens=True))
    return str(tokenizer.decode(heldout.example(0)[0].tolist(), skip_special_tokens=True))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written atomically; numpy's scalars become numbers."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=_plain) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)  # the harness's results hold numpy scalars and dtypes

"""Text from a checkpoint, piece by piece, with a KV cache."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmforge.errors import CheckpointError, RunError
from lmforge.inference.adapters import open_adapter, quiet_peft
from lmforge.inference.checkpoint import context_tokens, has_tokenizer, open_model, open_tokenizer, quiet_transformers
from lmforge.inference.saving import set_ids
from lmforge.tokenizer import templates

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 128  # where nobody says how many


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    adapter: Path | None = None,
) -> Iterator[str]:
    """Stream a continuation of `prompt`; the pieces joined are the whole text, without the prompt.

    `max_new_tokens` None is 128, or what the context has room for. `temperature` 0 is greedy; `chat` wraps the prompt as a user's turn in the folder's
    chat template. `adapter` is a PEFT folder to put onto the checkpoint, with the tokenizer it brings. Everything that can be refused is refused here,
    before the first piece: CheckpointError for a folder that is not a whole model or an adapter of another one, RunError for a prompt that does not fit
    the context.
    """
    source = adapter if adapter is not None and has_tokenizer(adapter) else checkpoint
    tokenizer = open_tokenizer(source)
    if chat and not tokenizer.chat_template:
        raise CheckpointError(str(source), "has no chat template", "generate without chat, or from a checkpoint after sft")
    model = open_model(checkpoint)
    if adapter is not None:
        model = open_adapter(model, adapter)
        set_ids(model, tokenizer)
    return stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, chat=chat)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
) -> Iterator[str]:
    """`generate` for a model that is open already."""
    _check_sampling(max_new_tokens, temperature, top_p)
    inputs = _encode(tokenizer, prompt, chat)
    length, room = inputs.shape[1], context_tokens(model)
    if length >= room:
        raise RunError("prompt", f"has {length} tokens and the model's context is {room}", f"shorten it to at most {room - 1} tokens")
    if max_new_tokens is None:
        max_new_tokens = min(NEW_TOKENS, room - length)
    if length + max_new_tokens > room:
        raise RunError("max_new_tokens", f"{length} prompt tokens + {max_new_tokens} new ones exceed the context of {room}", f"at most {room - length}")
    sampling: dict[str, Any] = {
        "do_sample": temperature > 0,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_tokens(model, [tokenizer.eos_token_id]) or None,
    }
    if temperature > 0:
        # top_k=0: transformers' own default of 50 would cut the distribution without being asked
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return _pieces(model, tokenizer, inputs.to(model.device), sampling, seed)


def stop_tokens(model: Any, known: Iterable[int | None]) -> list[int]:
    """What ends an answer of this model, for all that draw answers: what is `known`, and what the checkpoint's generation_config.json names.

    `known` is the tokenizer's EOS, or the `stop_token_ids` of tokens, which have the template's end of a turn too. Neither is enough: tokens know the
    template they were rendered with but not that a checkpoint from elsewhere was taught to stop with a further token; and a checkpoint after
    pretraining alone knows no end of a turn.
    """
    config = getattr(model, "generation_config", None)
    named = config.eos_token_id if config is not None else None
    return sorted({one for one in (*known, *(named if isinstance(named, list) else [named])) if one is not None})


def _check_sampling(max_new_tokens: int | None, temperature: float, top_p: float) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RunError("max_new_tokens", f"{max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise RunError("temperature", f"{temperature} must be a finite number >= 0", "0 is greedy")
    if not 0 < top_p <= 1:
        raise RunError("top_p", f"{top_p} must be in (0, 1]")


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids, shape (1, tokens). An empty prompt starts from BOS or EOS, the boundary token documents are packed with."""
    import torch

    if chat:
        text = templates.render(tokenizer, [[{"role": "user", "content": prompt}]], add_generation_prompt=True)[0]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own
    else:
        ids = tokenizer(prompt)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and start is None:
        raise RunError("prompt", "is empty and the tokenizer has no token to start from", "type some text")
    return torch.tensor([ids or [start]])


def _pieces(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, sampling: dict[str, Any], seed: int) -> Iterator[str]:
    """Run transformers' generate in a thread and hand its text on; a failure there is raised here, and leaving early stops it."""
    import torch
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, run = threading.Event(), cast("Any", model)  # torch's types hide generate
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def stopped(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    def work() -> None:
        with torch.random.fork_rng(), quiet_transformers(), quiet_peft():
            torch.manual_seed(seed)
            mask = torch.ones_like(ids)
            run.generate(ids, attention_mask=mask, streamer=streamer, stopping_criteria=[stopped], use_cache=True, pad_token_id=pad, **sampling)

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        future.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))  # also where generate failed and never says it is done
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
        future.result()

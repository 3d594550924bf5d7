"""Text to ids: whole documents, and conversations with an exact mask of what is supervised."""

from __future__ import annotations

from typing import Any

from lmforge.tokenizer.shapes import Piece

Example = tuple[list[int], list[int]]  # ids and mask, of one length


class Encoder:
    """Encodes with a fast tokenizer. `markers` says whether a special token spelled out in the text is that token or plain text."""

    def __init__(self, tokenizer: Any, markers: bool) -> None:
        self._eos = tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not markers
        self._apart = _keeps_pieces(tokenizer)

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Documents as the tokenizer begins them (some write a BOS), each ended by EOS; no text becomes a special token."""
        encoded = [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=True)]
        return [ids if ids and ids[-1] == self._eos else [*ids, self._eos] for ids in encoded]

    def conversations(self, conversations: list[list[Piece]]) -> list[Example | None]:
        """(ids, mask) of each conversation; None where a token belongs to a supervised and to a given piece.

        Pieces are encoded apart, as they are when the model generates: the prompt's ids never depend on the response. Tokenizers
        that begin every text with a space (Llama 2's) cannot do so; for them the whole is encoded and the mask follows offsets.
        """
        return self._encode_apart(conversations) if self._apart else self._encode_whole(conversations)

    def _encode_apart(self, conversations: list[list[Piece]]) -> list[Example | None]:
        flat = [text for pieces in conversations for text, _ in pieces]
        encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        examples: list[Example | None] = []
        for pieces in conversations:
            ids: list[int] = []
            mask: list[int] = []
            for _, supervised in pieces:
                part = next(encoded).ids
                ids += part
                mask += [int(supervised)] * len(part)
            examples.append((ids, mask))
        return examples

    def _encode_whole(self, conversations: list[list[Piece]]) -> list[Example | None]:
        encoded = self._backend.encode_batch(["".join(text for text, _ in pieces) for pieces in conversations], add_special_tokens=False)
        return [_by_offsets(one, pieces) for one, pieces in zip(encoded, conversations, strict=True)]


def _by_offsets(encoding: Any, pieces: list[Piece]) -> Example | None:
    mask: list[int] = []
    at = 0  # the piece that the current token lies in
    edge = len(pieces[0][0])  # where it ends
    for start, end in encoding.offsets:
        while start >= edge and at + 1 < len(pieces):
            at += 1
            edge += len(pieces[at][0])
        if end > edge:
            return None
        mask.append(int(pieces[at][1]))
    return encoding.ids, mask


def _keeps_pieces(tokenizer: Any) -> bool:
    """Whether texts encoded apart decode to the same as joined."""
    parts = ("one two", "three", " four\n", "\n five")
    ids = [one for part in parts for one in tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids]
    return bool(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == "".join(parts))

"""New tokens for the text encoders of a pipeline, whose vectors are given from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.adapters import sharing_tensors
from sfumato.errors import ConfigError

ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # and those with a number after it
# pipelines whose encoders are all CLIP's, and which write a token of several vectors out
LEARNING = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


class TokenTable(nn.Module):
    """An encoder's table of token vectors, extended by rows that another module owns.

    Attributes:
        first: number of the first new token.
        rows: vectors of the new tokens, (n, D).
    """

    def __init__(self, table: nn.Embedding, *, first: int, count: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.rows = table.weight.new_zeros(count, table.embedding_dim)

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the vector of each token."""
        place = numbers - self.first
        new = (place >= 0) & (place < len(self.rows))
        vectors: Tensor = self.table(numbers.masked_fill(new, 0))
        rows = self.rows.to(vectors)[place.clamp(0, len(self.rows) - 1)]
        return torch.where(new[..., None], rows, vectors)


def initial_vectors(pipeline: Any, word: str, count: int) -> dict[str, Tensor]:
    """Return the vectors of a word's pieces, repeated in turn, (count, D) for each encoder.

    Raises:
        ConfigError: if the word has more pieces.
    """
    result = {}
    for name, encoder, tokenizer in _pairs(pipeline):
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        if len(pieces) > count:
            raise ConfigError(
                f"{word!r} is {len(pieces)} pieces to the tokenizer "
                f"({' '.join(tokenizer.convert_ids_to_tokens(pieces))}), for {count} "
                f"{'vector' if count == 1 else 'vectors'}",
                where="adapter.word",
                hint=f"use a common word, or adapter.vectors={len(pieces)}",
            )
        numbers = torch.tensor([pieces[place % len(pieces)] for place in range(count)])
        table = encoder.get_input_embeddings()
        result[name] = table(numbers.to(next(encoder.parameters()).device)).detach()
    return result


def read_tokens(pipeline: Any, tokens: Sequence[str]) -> None:
    """Let the tokenizers and encoders of a pipeline read new tokens.

    Raises:
        ConfigError: if a tokenizer knows one already, or splits it.
    """
    for name, encoder, tokenizer in _pairs(pipeline) if tokens else ():
        known = [token for token in tokens if token in tokenizer.get_vocab()]
        first = len(tokenizer)
        tokenizer.add_tokens(list(tokens))
        read = [tokenizer(token, add_special_tokens=False).input_ids for token in tokens]
        if known or read != [[first + place] for place in range(len(tokens))]:
            raise ConfigError(
                f"{known[0]!r} is a token that the model knows"
                if known
                else f"{tokens[0]!r} cannot be read as one token",
                where="adapter.token",
                hint="use another name, such as <my-cat>",
            )
        copy = sharing_tensors(encoder)  # others that use the encoder know no new token
        table = _own_table(copy.get_input_embeddings())
        copy.set_input_embeddings(TokenTable(table, first=first, count=len(tokens)))
        setattr(pipeline, name, copy)


def _own_table(table: Any) -> nn.Embedding:
    """Return the table without the rows of other tokens."""
    return cast(nn.Embedding, table.table if isinstance(table, TokenTable) else table)


@contextmanager
def with_vectors(pipeline: Any, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """Use these vectors of the new tokens within the block, (n, D) by the name of the encoder."""
    tables = {
        name: cast(TokenTable, getattr(pipeline, name).get_input_embeddings()) for name in vectors
    }
    before = {name: table.rows for name, table in tables.items()}
    try:
        for name, table in tables.items():
            # a view, since a parameter would become one of the encoder's
            table.rows = vectors[name].view_as(vectors[name])
        yield
    finally:
        for name, table in tables.items():
            table.rows = before[name]


def _pairs(pipeline: Any) -> list[tuple[str, Any, Any]]:
    """Return name, encoder and tokenizer of each encoder."""
    names = [name for name in pipeline.components if name.startswith(ENCODER)]
    return [
        (name, getattr(pipeline, name), getattr(pipeline, name.replace(ENCODER, TOKENIZER)))
        for name in names
        if getattr(pipeline, name) is not None
    ]

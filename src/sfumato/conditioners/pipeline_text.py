"""Conditioning on captions by the text encoders of a text-to-image pipeline of diffusers (extras
`diffusers` and `text`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters import LearnedTokens, TokenLearner, sharing_tensors
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.pipeline_encoder import NEGATIVE, PipelineTextEncoder
from sfumato.conditioners.pretrained_text import TextEmbedding, TextEncoder
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction, SizeOrZero
from sfumato.errors import ConfigError

CLIP_BLOCKS = "encoder.layers."  # in the names of its blocks


@dataclass(frozen=True, kw_only=True)
class PipelineTextConfig:
    """Condition on captions as a pipeline of diffusers does: by the encoders and tokenizers of its
    folder, without a learned projection (extras `diffusers` and `text`).

    Attributes:
        path: the pipeline's folder.
        dropout: share of training samples whose caption is replaced by the null condition.
        variant: which weights, where the folder has several: "fp16" for *.fp16.safetensors.
        clip_skip: how many of the encoders' last layers prompts and captions are read without, as
            diffusers counts: one less than in the web interfaces and in sd-scripts. The absence
            of a text, and negative prompts, are read by all layers.
    """

    kind: ClassVar[str] = "pipeline"
    needs_captions: ClassVar[bool] = False
    learns_words: ClassVar[bool] = False

    path: str
    dropout: Fraction = 0.1
    variant: str = ""
    clip_skip: SizeOrZero = 0

    def words(self, captions: Iterable[str]) -> tuple[str, ...]:
        """Return no words: the tokenizers are the pipeline's own."""
        return ()

    def build(
        self, words: Sequence[str], encoder: Callable[[Any], TextEncoder]
    ) -> PipelineTextConditioner:
        """Build the conditioner; nothing in it is trained."""
        text_encoder = encoder(self)
        assert isinstance(text_encoder, PipelineTextEncoder)
        return PipelineTextConditioner(self, encoder=text_encoder)

    def text_encoder(self, folder: Path) -> PipelineTextEncoder:
        """Return the encoder, which is loaded for the first text."""
        return PipelineTextEncoder(self, folder)


class PipelineTextConditioner(Conditioner, TokenLearner):
    """context["text"], B texts -> Condition.tokens (B, length, D), perhaps a vector (B, V), and a
    mask where texts differ in length.

    The null condition is what the pipeline uses without a prompt: the empty text, or zeros. The
    encoders are not part of the model's weights, unless they are trained: they are loaded from
    their folder.

    Attributes:
        encoders: that are a part of the model, by name: none, or all of the pipeline's.
        learned: new tokens that the encoders read; None for none.
    """

    device_marker: Tensor

    def __init__(self, config: PipelineTextConfig, *, encoder: PipelineTextEncoder) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.learns_bytes = True
        encoder.require_layers()
        self._encoder = (encoder,)  # nn.Module does not register what a tuple holds
        self.encoders = nn.ModuleDict()
        self.learned: LearnedTokens | None = None
        self.sizes = ContextSizes(
            tokens=encoder.size, vector=len(encoder.empty.vector) if encoder.family.pooled else 0
        )
        # says which device the model is on
        self.register_buffer("device_marker", torch.zeros(0), persistent=False)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return the encoded texts; a missing context gives `null`."""
        if "text" not in context:
            return self.null(batch_size)
        return self._condition(self._embeddings(context["text"]))

    def _embeddings(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Return the embeddings of texts; those that depend on trained parameters are never kept."""
        encoder, device = self._encoder[0], self.device_marker.device
        if not self._is_trained:
            return encoder(texts, device)
        learned = [text for text in texts if self.encoders or encoder.reads_new(text)]
        new = sorted(set(learned))
        others = [text for text in texts if text not in new]
        found = dict(zip(others, encoder(others, device), strict=True))
        vectors = {} if self.learned is None else self.learned.vectors()
        found |= zip(new, encoder.encode_by(dict(self.encoders), vectors, new, device), strict=True)
        return [found[text] for text in texts]

    @property
    def _is_trained(self) -> bool:
        """Whether embeddings depend on trained parameters."""
        return self.learned is not None or len(self.encoders) > 0

    def null(self, batch_size: int) -> Condition:
        """Return the condition of an image without a prompt."""
        encoder, device = self._encoder[0], self.device_marker.device
        if self.encoders:
            condition = self._condition(self._embeddings([encoder.nothing]))
        else:
            empty = TextEmbedding(*(part.to(device) for part in encoder.empty))
            condition = self._condition([empty])
        if encoder.null_is_zero:
            condition = condition.map(torch.zeros_like)
        return condition.expand(batch_size)

    def _condition(self, embeddings: Sequence[TextEmbedding]) -> Condition:
        vector = (
            torch.stack([embedding.vector for embedding in embeddings])
            if self._encoder[0].family.pooled
            else None
        )
        if not self._encoder[0].family.masked:
            tokens = torch.stack([embedding.tokens for embedding in embeddings])
            return Condition(tokens=tokens, vector=vector)
        shape = (len(embeddings), self._encoder[0].capacity, self.sizes.tokens)
        tokens = torch.zeros(shape, device=self.device_marker.device)
        mask = torch.zeros(shape[:2], dtype=torch.bool, device=self.device_marker.device)
        for row, embedding in enumerate(embeddings):
            tokens[row, : len(embedding.tokens)] = embedding.tokens
            mask[row, : len(embedding.tokens)] = True
        return Condition(tokens=tokens, token_mask=mask, vector=vector)

    def as_negative(self, text: str) -> str:
        """Return a text as `forward` takes it where guidance leads away from it."""
        return NEGATIVE + text

    def base_parts(self) -> dict[str, str]:
        """Return a hash of the tensors of each text encoder in the pipeline's folder, by its name."""
        return dict(self._encoder[0].weights)

    def encode_ahead(self, texts: Sequence[str]) -> None:
        """Encode texts, unless the encoders learn, and keep their embeddings where other processes
        find them.
        """
        if not self._is_trained:
            self._encoder[0].encode_ahead(texts, self.device_marker.device)

    def release_encoders(self) -> int:
        """Free the pipeline's encoders, unless they learn, and return how many parameters."""
        return 0 if self._is_trained else self._encoder[0].release()

    def include_text_encoders(self) -> None:
        """Make the encoders child modules, which share their weights with the pipeline's."""
        encoders = self._encoder[0].modules()
        self.encoders.update({name: sharing_tensors(one) for name, one in encoders.items()})

    def text_layers(self) -> dict[str, nn.Module]:
        """Return the linear layers in the blocks of the encoders, if these are all CLIP's."""
        if not self._encoder[0].can_learn:
            return {}
        return {
            f"{part}.{name}": layer
            for part, encoder in self.text_encoders().items()
            for name, layer in encoder.named_modules()
            if isinstance(layer, nn.Linear) and CLIP_BLOCKS in name
        }

    def trained_text_encoders(self) -> dict[str, nn.Module]:
        """Return the encoders that are a part of the model."""
        return dict(self.encoders)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the encoders: those that are a part of the model, or the pipeline's, which are loaded
        for this.
        """
        return dict(self.encoders) or self._encoder[0].modules()

    def replace_text_encoders(self, encoders: Mapping[str, nn.Module]) -> None:
        """Use other encoders in the place of some."""
        if self.encoders:
            self.encoders.update(encoders)
        else:
            self._encoder = (self._encoder[0].with_replacements(encoders),)

    def skip_layers(self, count: int) -> None:
        """Read prompts without the last layers of the encoders.

        Raises:
            ConfigError: if all layers are needed, or none is left.
        """
        self._encoder = (self._encoder[0].with_clip_skip(count),)

    def word_vectors(self, word: str, count: int) -> dict[str, Tensor]:
        """Return the vectors of a word's pieces, repeated in turn, (count, D) for each encoder."""
        return self._encoder[0].word_vectors(word, count)

    def learn_tokens(self, names: Sequence[str], vectors: Mapping[str, Tensor]) -> None:
        """Let the encoders read tokens whose vectors begin as these, and are trained."""
        encoder = self._encoder[0]
        if self.learned is not None:
            raise ConfigError(
                f"the model has learned {self.learned.names[0]}, and cannot learn another token",
                where=names[0],
                hint="use one embedding at a time",
            )
        sizes = {name: (len(names), size) for name, size in encoder.widths().items()}
        if sizes != {name: tuple(rows.shape) for name, rows in vectors.items()}:
            raise ConfigError(
                f"vectors of {_sizes(vectors)} do not fit the text encoders, whose tokens have "
                f"{', '.join(f'{size} numbers ({name})' for name, size in encoder.widths().items())}",
                where=names[0],
                hint="they were learned with another model",
            )
        if self.encoders:
            encoder = encoder.with_replacements(dict(self.encoders))
        self._encoder = (encoder.with_tokens(names),)
        if self.encoders:  # those that read the tokens
            self.encoders.update(self._encoder[0].modules())
        learned = LearnedTokens(names, vectors, encoder.digest())
        self.learned = learned.to(self.device_marker.device)

    def reads_learned(self, text: str) -> bool:
        """Return whether a text, once truncated, contains one of the learned tokens."""
        return self._encoder[0].reads_new(text)

    @property
    def length(self) -> int:
        """Maximum number of tokens of a text."""
        return self._encoder[0].length

    def truncate(self, text: str) -> str:
        """Return the part of a text that is not truncated."""
        return self._encoder[0].truncate(text)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, truncated."""
        return self._encoder[0].token_ids(text)

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more tokens than the encoders read."""
        return self._encoder[0].is_truncated(text)

    def pieces(self, word: str) -> list[str]:
        """Return the pieces that the tokenizer splits a word into."""
        return self._encoder[0].pieces(word)

    def unknown_words(self, text: str) -> list[str]:
        """Return no words: the encoders know more than the captions contain."""
        return []


def _sizes(vectors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{tuple(rows.shape)} ({name})" for name, rows in vectors.items())

"""The text encoder of a text-to-image pipeline in diffusers' layout, used as the pipeline uses it
(extra `text`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.pretrained_text import TEXT_MODELS, TextEmbedding, TextEncoder
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction
from sfumato.errors import CheckpointError, ConfigError
from sfumato.transformers_models import from_transformers

ENCODER, TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class PipelineTextConfig:
    """Steer by captions as a pipeline of diffusers does: by the encoder and the tokenizer of its
    folder, without a learned projection (extra `text`).

    Attributes:
        path: the pipeline's folder, with `text_encoder` and `tokenizer` in it.
        dropout: share of training samples whose caption is replaced by the empty text.
    """

    kind: ClassVar[str] = "pipeline"

    path: str
    dropout: Fraction = 0.1

    needs_captions: ClassVar[bool] = False

    def words(self, captions: Iterable[str]) -> tuple[str, ...]:
        """Return no words: the tokenizer is the pipeline's own."""
        return ()

    def build(
        self, words: Sequence[str], encoder: Callable[[Any], TextEncoder]
    ) -> PipelineTextConditioner:
        """Build the conditioner; nothing in it is trained."""
        return PipelineTextConditioner(self, encoder=encoder(self))

    def text_encoder(self, folder: Path) -> PipelineTextEncoder:
        """Return the encoder, which is loaded for the first text."""
        return PipelineTextEncoder(self, folder)


class PipelineTextEncoder(TextEncoder):
    """The encoder of a pipeline: every text has `length` tokens, of which padding counts too."""

    @cached_property
    def place(self) -> str:
        """The folder of the encoder."""
        return str(Path(self.config.path, ENCODER))

    @cached_property
    def identity(self) -> str:
        """A hash of the files of the encoder and the tokenizer."""
        files = sorted(Path(self.config.path, TOKENIZER).glob("*"))
        parts = [path.name + hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        parts.append(super().identity)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]

    @property
    def size(self) -> int:
        """Channels of an embedding, from the encoder's configuration."""
        return int(_settings(Path(self.place))["hidden_size"])

    @cached_property
    def length(self) -> int:
        """The number of tokens that every text is padded or truncated to."""
        return int(self._tokenizer.model_max_length)

    @cached_property
    def _tokenizer(self) -> Any:
        place = Path(self.config.path, TOKENIZER)
        if not place.is_dir():
            raise CheckpointError(
                "has no folder `tokenizer`",
                where=self.config.path,
                hint="download the whole pipeline",
            )
        return from_transformers("AutoTokenizer", str(place), where="conditioner.text.path")

    def _load(self, kind: str, **settings: Any) -> Any:
        return from_transformers(kind, self.place, where="conditioner.text.path", **settings)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        model = self._model.to(device)
        encoding = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(device)
        mask = (
            encoding["attention_mask"]
            if _settings(Path(self.place)).get("use_attention_mask")
            else None
        )
        hidden = model(encoding["input_ids"], attention_mask=mask)[0]
        return [TextEmbedding(tokens.mean(0).cpu(), tokens.cpu()) for tokens in hidden]


class PipelineTextConditioner(Conditioner):
    """context["text"], B texts -> Condition.tokens (B, length, size), all of which count.

    The null condition is the encoding of the empty text. The encoder is not part of the model's
    weights: it is loaded from its folder.
    """

    def __init__(self, config: PipelineTextConfig, *, encoder: TextEncoder) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.learns_bytes = True
        self._encoder = (encoder,)  # in a tuple, so that it is no module's child
        self.sizes = ContextSizes(tokens=encoder.size)
        # says which device the model is on
        self.register_buffer("device_marker", torch.zeros(0), persistent=False)

    device_marker: Tensor

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return the encoded texts; a missing context gives `null`."""
        if "text" not in context:
            return self.null(batch_size)
        embeddings = self._encoder[0](context["text"], self.device_marker.device)
        return Condition(tokens=torch.stack([embedding.tokens for embedding in embeddings]))

    def null(self, batch_size: int) -> Condition:
        """Return the encoding of the empty text for each image."""
        return self.forward({"text": [""]}, 1).expand(batch_size)

    def truncate(self, text: str) -> str:
        """Return the part of a text that is not truncated."""
        return self._encoder[0].truncate(text)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, truncated."""
        return self._encoder[0].token_ids(text)

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more tokens than the encoder reads."""
        return self._encoder[0].is_truncated(text)

    def unknown_words(self, text: str) -> list[str]:
        """Return no words: the encoder knows more than the captions contain."""
        return []

    @property
    def length(self) -> int:
        """The number of tokens of every text."""
        return self._encoder[0].length


def _settings(folder: Path) -> dict[str, Any]:
    """Read the configuration of a text encoder.

    Raises:
        CheckpointError: if it cannot be read.
        ConfigError: for a kind of encoder that is not supported.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        model_type = settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(path), hint="download the whole pipeline"
        ) from None
    if model_type not in TEXT_MODELS:
        raise ConfigError(
            f"unsupported text encoder {model_type!r}",
            where=str(path),
            hint=f"supported are {', '.join(TEXT_MODELS)}",
        )
    result: dict[str, Any] = settings
    return result

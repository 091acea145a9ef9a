"""The text encoders of a text-to-image pipeline of diffusers, used as the pipeline uses them (extras
`diffusers` and `text`).

A table names every pipeline that can be used. Classes are looked up in it, so that a file never
chooses what is imported.
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
from sfumato.conditioners.pretrained_text import TextEmbedding, TextEncoder
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import CheckpointError, ConfigError, closest

INDEX = "model_index.json"
PARTS = ("text_encoder", "tokenizer")  # and those with a number after it
HASHED = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True, kw_only=True)
class PipelineTextConfig:
    """Condition on captions as a pipeline of diffusers does: by the encoders and tokenizers of its
    folder, without a learned projection (extras `diffusers` and `text`).

    Attributes:
        path: the pipeline's folder.
        dropout: share of training samples whose caption is replaced by the null condition.
    """

    kind: ClassVar[str] = "pipeline"
    needs_captions: ClassVar[bool] = False

    path: str
    dropout: Fraction = 0.1

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


Encode = Callable[[Any, list[str], torch.device], list[TextEmbedding]]


@dataclass(frozen=True)
class TextPipeline:
    """How one class of pipelines encodes text.

    Attributes:
        encode: (pipeline, texts, device) -> embeddings.
        tokenizer: the one that reads the longest texts.
        length: tokens that it reads; 0 for the tokenizer's own limit.
        pooled: whether the condition has a vector.
        guidance: scale that the pipeline's call has by default.
        masked: whether texts differ in length, which a mask says; other pipelines pad them, and
            padding counts.
        zero_null: whether the null condition is zeros, unless model_index.json says otherwise.
    """

    encode: Encode
    guidance: float
    tokenizer: str = "tokenizer"
    length: int = 0
    pooled: bool = False
    masked: bool = False
    zero_null: bool = False


def _encode_sd(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens = pipeline.encode_prompt(texts, device, 1, False)[0]
    return [TextEmbedding(part.mean(0), part) for part in tokens]


def _encode_sdxl(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, device=device, do_classifier_free_guidance=False
    )
    return [TextEmbedding(*pair) for pair in zip(pooled, tokens, strict=True)]


def _encode_sd3(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, device=device, do_classifier_free_guidance=False,
        max_sequence_length=PIPELINES["StableDiffusion3Pipeline"].length,
    )  # fmt: skip
    return [TextEmbedding(*pair) for pair in zip(pooled, tokens, strict=True)]


def _encode_pixart(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, mask, _, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, device=device, clean_caption=False,
        max_sequence_length=PIPELINES["PixArtSigmaPipeline"].length,
    )  # fmt: skip
    valid = [part[counts.bool()] for part, counts in zip(tokens, mask, strict=True)]
    return [TextEmbedding(part.mean(0), part) for part in valid]


PIPELINES = {
    "StableDiffusionPipeline": TextPipeline(_encode_sd, 7.5),
    "StableDiffusionXLPipeline": TextPipeline(_encode_sdxl, 5.0, pooled=True, zero_null=True),
    "StableDiffusion3Pipeline": TextPipeline(
        _encode_sd3, 7.0, tokenizer="tokenizer_3", length=256, pooled=True
    ),
    "PixArtSigmaPipeline": TextPipeline(_encode_pixart, 4.5, length=300, masked=True),
}


class PipelineTextEncoder(TextEncoder):
    """The encoders of a pipeline."""

    @cached_property
    def place(self) -> str:
        """The folder of the pipeline."""
        return str(self.config.path)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        path = Path(self.place, INDEX)
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot be read: {error}", where=str(path), hint="download the whole pipeline"
            ) from None
        return result

    @cached_property
    def family(self) -> TextPipeline:
        """How the pipeline encodes text."""
        name = str(self.index.get("_class_name"))
        if name not in PIPELINES:
            raise ConfigError(
                f"unsupported pipeline class {name!r}",
                where=self.place,
                hint=f"{closest(name, PIPELINES)}supported are {', '.join(PIPELINES)}",
            )
        return PIPELINES[name]

    @cached_property
    def identity(self) -> str:
        """A hash of the pipeline's class and the files of its encoders and tokenizers."""
        parts = [str(self.index.get("_class_name"))]
        for folder in sorted(Path(self.place).iterdir()):
            if folder.is_dir() and folder.name.startswith(PARTS):
                for path in sorted(p for p in folder.iterdir() if p.suffix in HASHED):
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    parts.append(f"{folder.name}/{path.name} {digest}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]

    @cached_property
    def null_is_zero(self) -> bool:
        """Whether the null condition is zeros instead of the empty text."""
        return bool(self.family.zero_null and self.index.get("force_zeros_for_empty_prompt", True))

    @property
    def size(self) -> int:
        """Channels of a token."""
        return self.empty.tokens.shape[1]

    @cached_property
    def empty(self) -> TextEmbedding:
        """The embedding of the empty text."""
        return self([""], torch.device("cpu"))[0]

    @cached_property
    def length(self) -> int:
        """Maximum number of tokens of a text."""
        return self.family.length or int(self._tokenizer.model_max_length)

    @cached_property
    def _tokenizer(self) -> Any:
        return getattr(self._pipeline, self.family.tokenizer)

    @cached_property
    def _pipeline(self) -> Any:
        """The pipeline without its network, scheduler and autoencoder."""
        needed = [name for name, entry in self.index.items() if name.startswith(PARTS) and entry[0]]
        missing = [name for name in needed if not Path(self.place, name).is_dir()]
        if missing:
            raise CheckpointError(
                f"has no folder {', '.join(missing)}",
                where=self.place,
                hint="download the whole pipeline",
            )
        diffusers = import_diffusers(
            "conditioner.text.kind=pipeline", where="conditioner.text", extras="diffusers,text"
        )
        others = {
            name: None
            for name, entry in self.index.items()
            if isinstance(entry, list) and name not in needed
        }
        name = str(self.index["_class_name"])
        try:
            with quiet():
                return getattr(diffusers, name).from_pretrained(
                    self.place,
                    local_files_only=True,
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    **others,
                )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(
                f"cannot be loaded: {' '.join(str(error).split())[:300]}",
                where=self.place,
                hint="download the whole pipeline with its safetensors files",
            ) from None

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        embeddings = self.family.encode(self._pipeline.to(device), list(texts), device)
        return [
            TextEmbedding(vector.float().cpu(), tokens.float().cpu())
            for vector, tokens in embeddings
        ]


class PipelineTextConditioner(Conditioner):
    """context["text"], B texts -> Condition.tokens (B, length, D), perhaps a vector (B, V), and a
    mask where texts differ in length.

    The null condition is what the pipeline uses without a prompt: the empty text, or zeros. The
    encoders are not part of the model's weights: they are loaded from their folder.
    """

    device_marker: Tensor

    def __init__(self, config: PipelineTextConfig, *, encoder: PipelineTextEncoder) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.learns_bytes = True
        self._encoder = (encoder,)  # nn.Module does not register what a tuple holds
        self.sizes = ContextSizes(
            tokens=encoder.size, vector=len(encoder.empty.vector) if encoder.family.pooled else 0
        )
        # says which device the model is on
        self.register_buffer("device_marker", torch.zeros(0), persistent=False)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return the encoded texts; a missing context gives `null`."""
        if "text" not in context:
            return self.null(batch_size)
        return self._condition(self._encoder[0](context["text"], self.device_marker.device))

    def null(self, batch_size: int) -> Condition:
        """Return the condition of an image without a prompt."""
        encoder, device = self._encoder[0], self.device_marker.device
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
        shape = (len(embeddings), self.length, self.sizes.tokens)
        tokens = torch.zeros(shape, device=self.device_marker.device)
        mask = torch.zeros(shape[:2], dtype=torch.bool, device=self.device_marker.device)
        for row, embedding in enumerate(embeddings):
            tokens[row, : len(embedding.tokens)] = embedding.tokens
            mask[row, : len(embedding.tokens)] = True
        return Condition(tokens=tokens, token_mask=mask, vector=vector)

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

    def unknown_words(self, text: str) -> list[str]:
        """Return no words: the encoders know more than the captions contain."""
        return []

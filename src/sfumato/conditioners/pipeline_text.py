"""The text encoders of a text-to-image pipeline of diffusers, used as the pipeline uses them (extras
`diffusers` and `text`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.pipeline_parts import load_encoders, require_known
from sfumato.conditioners.pipeline_prompts import PIPELINES, TextPipeline
from sfumato.conditioners.pretrained_text import TextEmbedding, TextEncoder
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import CheckpointError, ConfigError, closest
from sfumato.networks.diffusers_weights import only_variant

INDEX = "model_index.json"
PARTS = ("text_encoder", "tokenizer")  # and those with a number after it
# before a text that is encoded as one to lead away from, which some pipelines do in another way
NEGATIVE = "\x00"
HASHED = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass(frozen=True, kw_only=True)
class PipelineTextConfig:
    """Condition on captions as a pipeline of diffusers does: by the encoders and tokenizers of its
    folder, without a learned projection (extras `diffusers` and `text`).

    Attributes:
        path: the pipeline's folder.
        dropout: share of training samples whose caption is replaced by the null condition.
        variant: which weights, where the folder has several: "fp16" for *.fp16.safetensors.
    """

    kind: ClassVar[str] = "pipeline"
    needs_captions: ClassVar[bool] = False

    path: str
    dropout: Fraction = 0.1
    variant: str = ""

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


@dataclass
class PipelineTextEncoder(TextEncoder):
    """The encoders of a pipeline.

    Attributes:
        replacements: encoders in the place of those in the folder, by name.
    """

    replacements: Mapping[str, nn.Module] = field(default_factory=dict)

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
        parts = [str(self.index.get("_class_name")), str(self.family.length), self.config.variant]
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
        """The embedding of the text that stands for none."""
        return self([NEGATIVE + self.family.nothing], torch.device("cpu"))[0]

    @cached_property
    def capacity(self) -> int:
        """Maximum number of tokens of an embedding."""
        return self.family.length or int(self._tokenizer.model_max_length)

    @cached_property
    def length(self) -> int:
        """Maximum number of tokens of a text, without those that the pipeline adds."""
        return self.capacity - self.family.added_tokens(self._pipeline)

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
        require_known(self.index, needed, self.place)
        diffusers = import_diffusers(
            "conditioner.text.kind=pipeline", where="conditioner.text", extras="diffusers,text"
        )
        others = {
            name: None
            for name, entry in self.index.items()
            if isinstance(entry, list) and name not in needed
        }
        name = str(self.index["_class_name"])
        variant = self._variant(needed)
        encoders = load_encoders(self.index, needed, self.place, variant=variant)
        try:
            with quiet():
                return getattr(diffusers, name).from_pretrained(
                    self.place,
                    local_files_only=True,
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    torch_dtype=torch.float32,
                    variant=variant,
                    **{**encoders, **others, **self.replacements},
                )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(
                f"cannot be loaded: {' '.join(str(error).split())[:300]}",
                where=self.place,
                hint="download the whole pipeline with its safetensors files",
            ) from None

    def _variant(self, needed: Sequence[str]) -> str | None:
        """Return the variant of the encoders' weights: the one that is set, or the only one."""
        folders = [Path(self.place, name) for name in needed if name.startswith(PARTS[0])]
        found = {only_variant(folder, stem="model") for folder in folders} - {""}
        return self.config.variant or (found.pop() if len(found) == 1 else None)

    def modules(self) -> dict[str, nn.Module]:
        """Return the encoders by their names in the pipeline."""
        names = [name for name in self.index if name.startswith(PARTS[0])]
        found = {name: getattr(self._pipeline, name) for name in names}
        return {name: module for name, module in found.items() if module is not None}

    def with_replacements(self, encoders: Mapping[str, nn.Module]) -> PipelineTextEncoder:
        """Return one that uses other encoders; its embeddings are kept in memory only."""
        return replace(self, cache={}, replacements={**self.modules(), **encoders})

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        pipeline, family = self._pipeline.to(device), self.family
        result: dict[str, TextEmbedding] = {}
        for mark, encode in (("", family.encode), (NEGATIVE, family.encode_negative)):
            chosen = [text for text in texts if text.startswith(NEGATIVE) == bool(mark)]
            if chosen:
                plain = [text.removeprefix(NEGATIVE) for text in chosen]
                result |= zip(chosen, encode(pipeline, plain, device), strict=True)
        return [TextEmbedding(*(part.float().cpu() for part in result[text])) for text in texts]


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

    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Return the pipeline's encoders, which are loaded for this."""
        return self._encoder[0].modules()

    def replace_text_encoders(self, encoders: Mapping[str, nn.Module]) -> None:
        """Use other encoders in the place of some of the pipeline's."""
        self._encoder = (self._encoder[0].with_replacements(encoders),)

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

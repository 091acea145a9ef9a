"""The text encoders of a pipeline of diffusers, used as the pipeline uses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.conditioners.pipeline_parts import load_encoders, require_known, with_encoders
from sfumato.conditioners.pipeline_prompts import (
    PIPELINES,
    Encode,
    EncodeWithout,
    TextPipeline,
)
from sfumato.conditioners.pipeline_tokens import (
    LEARNING,
    initial_vectors,
    read_tokens,
    with_vectors,
)
from sfumato.conditioners.pretrained_text import EmbeddingsInMemory, TextEmbedding, TextEncoder
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import CheckpointError, ConfigError, closest
from sfumato.networks.diffusers_weights import only_variant, weight_files
from sfumato.storage.base_parts import weights_digest
from sfumato.storage.checkpoint import digest

INDEX = "model_index.json"
PARTS = ("text_encoder", "tokenizer")  # and those with a number after it
# before a text that is encoded as one to lead away from, which some pipelines do in another way
NEGATIVE = "\x00"
HASHED = (".json", ".txt", ".model", ".jinja")  # beside the weights
# tensors that some versions of transformers write under other names, or twice
PREFIX, TIED = "text_model.", {"encoder.embed_tokens.weight": "shared.weight"}
UNUSED = "position_ids"  # numbers of positions, which newer versions do not write


def _weight_files(folder: Path, variant: str) -> list[Path]:
    """Return the files that an encoder is loaded from; [] for none, which loading refuses."""
    files = [path.name for path in folder.glob("*.safetensors")]
    chosen = variant if any(f".{variant}." in name for name in files) else ""
    return weight_files(folder, variant=chosen, stem="model") if files else []


def _canonical(name: str) -> str:
    """Return the name by which a tensor counts in the identity of its encoder, "" if it does not."""
    name = name.removeprefix(PREFIX)
    return "" if name.endswith(UNUSED) else TIED.get(name, name)


@dataclass
class PipelineTextEncoder(TextEncoder):
    """The encoders of a pipeline.

    Attributes:
        replacements: encoders in the place of those in the folder, by name.
        tokens: that are new to the encoders.
    """

    replacements: Mapping[str, nn.Module] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()

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
        """A hash of the pipeline's class, the weights of its encoders and the other files of
        encoders and tokenizers.
        """
        parts = [str(self.index.get("_class_name")), str(self.family.length), self.config.variant]
        parts += [f"clip skip {self.config.clip_skip}"] if self.config.clip_skip else []
        parts += [f"{name} {weights}" for name, weights in sorted(self.weights.items())]
        for folder in sorted(Path(self.place).iterdir()):
            if folder.is_dir() and folder.name.startswith(PARTS):
                for path in sorted(p for p in folder.iterdir() if p.suffix in HASHED):
                    with path.open("rb") as file:
                        hashed = hashlib.file_digest(file, "sha256").hexdigest()
                    parts.append(f"{folder.name}/{path.name} {hashed}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]

    @cached_property
    def weights(self) -> dict[str, str]:
        """A hash of the tensors of each encoder in the folder, by its name."""
        names = [name for name, entry in self.index.items() if name.startswith(PARTS[0])]
        folders = {name: Path(self.place, name) for name in names if self.index[name][0]}
        variant = self._variant(list(folders)) or ""
        return {
            name: weights_digest(_weight_files(folder, variant), rename=_canonical)
            for name, folder in folders.items()
        }

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
        """The embedding of `nothing`."""
        return self([self.nothing], torch.device("cpu"))[0]

    @property
    def nothing(self) -> str:
        """The text that stands for none."""
        return NEGATIVE + self.family.nothing

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
        own = [part for part in needed if part not in self.replacements]
        encoders = load_encoders(self.index, own, self.place, variant=variant)
        try:
            with quiet():
                pipeline = getattr(diffusers, name).from_pretrained(
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
        read_tokens(pipeline, self.tokens)
        return pipeline

    def _variant(self, needed: Sequence[str]) -> str | None:
        """Return the variant of the encoders' weights: the one that is set, or the only one."""
        folders = [Path(self.place, name) for name in needed if name.startswith(PARTS[0])]
        found = {only_variant(folder, stem="model") for folder in folders} - {""}
        return self.config.variant or (found.pop() if len(found) == 1 else None)

    def release(self) -> int:
        """Free the encoders, and return the number of their parameters.

        They are loaded again for a text that `cache` does not hold. Those that are not as in the
        folder are kept.
        """
        if self.replacements or self.tokens or "_pipeline" not in self.__dict__:
            return 0
        _ = self._tokenizer, self.length, self.empty  # read while the pipeline is there
        count = sum(p.numel() for module in self.modules().values() for p in module.parameters())
        del self.__dict__["_pipeline"]
        return count

    def modules(self) -> dict[str, nn.Module]:
        """Return the encoders by their names in the pipeline."""
        names = [name for name in self.index if name.startswith(PARTS[0])]
        found = {name: getattr(self._pipeline, name) for name in names}
        return {name: module for name, module in found.items() if module is not None}

    def with_replacements(self, encoders: Mapping[str, nn.Module]) -> PipelineTextEncoder:
        """Return one that uses other encoders; its embeddings are kept in memory only."""
        return replace(
            self, cache=EmbeddingsInMemory(), replacements={**self.modules(), **encoders}
        )

    def with_clip_skip(self, count: int) -> PipelineTextEncoder:
        """Return one that leaves out the last layers of the encoders; see `require_layers`."""
        config = replace(self.config, clip_skip=count)
        encoder = replace(
            self, config=config, cache=EmbeddingsInMemory(), replacements=self.modules()
        )
        encoder.require_layers()
        return encoder

    def require_layers(self) -> None:
        """Raise ConfigError if the encoders do not have the layers that are left out."""
        count = self.config.clip_skip
        if not count:
            return
        name = str(self.index["_class_name"])
        if self.family.without is None:
            raise ConfigError(
                f"no layer of the text encoders of {name} can be left out",
                where="conditioner.text.clip_skip",
                hint="use 0 (without --clip-skip)",
            )
        parts = [
            part for part, entry in self.index.items() if part.startswith(PARTS[0]) and entry[0]
        ]
        layers = min(_layers(Path(self.place, part, "config.json")) for part in parts)
        most = layers - self.family.fewest_layers
        if not 0 < count <= most:
            raise ConfigError(
                f"clip skip {count}, and the text encoders have {layers} layers",
                where="conditioner.text.clip_skip",
                hint=f"use 0 (nothing is left out) to {most}",
            )

    def word_vectors(self, word: str, count: int) -> dict[str, Tensor]:
        """Return the vectors of a word's pieces, repeated in turn, (count, D) for each encoder.

        Raises:
            ConfigError: if the encoders are not all CLIP's, or the word has more pieces.
        """
        if not self.can_learn:
            raise ConfigError(
                f"the text encoders of {self.index['_class_name']} cannot learn new tokens",
                where="adapter.kind",
                hint=f"those of {' and '.join(LEARNING)} can; use adapter.kind=lora",
            )
        longest = self.capacity - 2  # without the marks at both ends
        if count > longest:
            raise ConfigError(
                f"{count} vectors for a token, and texts have {longest} tokens at most",
                where="adapter.vectors",
                hint="use 1 to 10",
            )
        return initial_vectors(self._pipeline, word, count)

    def with_tokens(self, tokens: Sequence[str]) -> PipelineTextEncoder:
        """Return one that reads new tokens; other texts are encoded as before.

        Raises:
            ConfigError: if a token cannot be read.
        """
        encoder = replace(self, tokens=tuple(tokens), replacements=self.modules())
        assert encoder._pipeline  # loaded at once, so that a token that cannot be read is refused
        return encoder

    def widths(self) -> dict[str, int]:
        """Return the length of a token's vector, by the name of the encoder."""
        return {
            name: int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]
            for name, module in self.modules().items()
        }

    def digest(self) -> str:
        """Return a hash of the encoders' weights, hexadecimal."""
        own = {
            f"{part}.{key}": tensor
            for part, module in self.modules().items()
            for key, tensor in module.state_dict().items()
        }
        return digest(own)

    def reads_new(self, text: str) -> bool:
        """Return whether a text, once truncated, contains one of the new tokens."""
        numbers = self._tokenizer.convert_tokens_to_ids(list(self.tokens))
        return not set(numbers).isdisjoint(self.token_ids(text.removeprefix(NEGATIVE)))

    def encode_by(
        self,
        encoders: Mapping[str, nn.Module],
        vectors: Mapping[str, Tensor],
        texts: Sequence[str],
        device: torch.device,
    ) -> list[TextEmbedding]:
        """Return the embeddings of texts; gradients reach what is given.

        Args:
            encoders: in the place of some of the pipeline's, on `device`.
            vectors: of the new tokens, (n, D) by the name of the encoder; {} without any.
        """
        with with_encoders(self._pipeline, encoders), with_vectors(self._pipeline, vectors):
            return self._embed(texts, device)

    @property
    def can_learn(self) -> bool:
        """Whether gradients reach the encoders' layers and tokens."""
        return self.index["_class_name"] in LEARNING

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more tokens than the encoders read, each vector being one."""
        return super().is_truncated(self._written_out(text))

    def _written_out(self, text: str) -> str:
        """Return a text as the pipeline reads it, with a word for each vector of a new token."""
        if not self.tokens:
            return text
        result: str = self._pipeline.maybe_convert_prompt(text, self._tokenizer)
        return result

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        embeddings = self._embed(texts, device)
        return [TextEmbedding(*(part.cpu() for part in embedding)) for embedding in embeddings]

    @property
    def _encode_prompts(self) -> Encode:
        """How prompts are encoded: perhaps without the encoders' last layers."""
        family, count = self.family, self.config.clip_skip
        if family.without is None or not count:
            return family.encode
        return partial(_without, family.without, count)

    def _embed(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        pipeline, family = self._pipeline.to(device), self.family
        result: dict[str, TextEmbedding] = {}
        for mark, encode in (("", self._encode_prompts), (NEGATIVE, family.encode_negative)):
            chosen = [text for text in texts if text.startswith(NEGATIVE) == bool(mark)]
            if chosen:
                plain = [text.removeprefix(NEGATIVE) for text in chosen]
                result |= zip(chosen, encode(pipeline, plain, device), strict=True)
        return [TextEmbedding(*(part.float() for part in result[text])) for text in texts]


def _without(
    encode: EncodeWithout, count: int, pipeline: Any, texts: list[str], device: torch.device
) -> list[TextEmbedding]:
    return encode(pipeline, texts, device, count)


def _layers(config: Path) -> int:
    """Return the number of layers of a text encoder.

    Raises:
        CheckpointError: if its configuration cannot be read.
    """
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(config), hint="download the whole pipeline"
        ) from None

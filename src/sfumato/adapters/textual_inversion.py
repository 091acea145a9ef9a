"""Textual inversion: new words of a frozen model. Only their vectors in the text encoders' tables
are trained.

Source: Gal et al. 2022 (arXiv:2208.01618).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.adapter import Adapter, Addition, freeze_base
from sfumato.config.bounds import Size
from sfumato.errors import ConfigError

LEARNING_RATE = 1e-3


class LearnedTokens(Addition):
    """The vectors of new tokens in each text encoder; without them, those that they begin with.

    Attributes:
        names: of the tokens.
        rows: their vectors (n, D), by the name of the encoder.
        initial: the vectors at the start; frozen, so that a checkpoint refers to them by hash.
        encoders: a hash of the encoders, frozen for the same reason.
    """

    def __init__(self, names: Sequence[str], initial: Mapping[str, Tensor], digest: str) -> None:
        """Begin with the vectors `initial`, (n, D) for each encoder.

        Args:
            digest: of the encoders, hexadecimal.
        """
        super().__init__()
        self.names = tuple(names)
        self.rows = nn.ParameterDict(
            {name: nn.Parameter(vectors.detach().clone()) for name, vectors in initial.items()}
        )
        self.initial = nn.ParameterDict(
            {
                name: nn.Parameter(vectors.detach().clone(), requires_grad=False)
                for name, vectors in initial.items()
            }
        )
        values = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        self.encoders = nn.Parameter(values, requires_grad=False)

    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors (n, D) by the name of the encoder."""
        return dict((self.rows if self.adapted else self.initial).items())


class TokenLearner(nn.Module, ABC):
    """A conditioner whose text encoders can read new tokens."""

    @abstractmethod
    def word_vectors(self, word: str, count: int) -> dict[str, Tensor]:
        """Return the vectors of a word's pieces, repeated in turn, (count, D) for each encoder.

        Raises:
            ConfigError: if the word has more pieces, or the encoders cannot learn tokens.
        """

    @abstractmethod
    def learn_tokens(self, names: Sequence[str], vectors: Mapping[str, Tensor]) -> None:
        """Let the encoders read tokens whose vectors begin as these, and are trained.

        Args:
            vectors: (n, D) by the name of the encoder.
        Raises:
            ConfigError: if a token cannot be read, the vectors do not fit, or other tokens were
                learned before.
        """

    @abstractmethod
    def reads_learned(self, text: str) -> bool:
        """Return whether a text, once truncated, contains one of the learned tokens."""


@dataclass(frozen=True, kw_only=True)
class TextualInversion(Adapter):
    """A new word for the frozen text encoders of Stable Diffusion (1, 2, XL): only its vectors are
    trained.

    Attributes:
        token: that captions and prompts use for what is learned.
        vectors: number of vectors that it stands for; more hold more detail, and leave less room
            for the rest of a prompt.
        word: whose vectors the new ones begin with: what the images show, in one common word.
    """

    kind: ClassVar[str] = "textual-inversion"
    learning_rate: ClassVar[float | None] = LEARNING_RATE
    keeps_known: ClassVar[bool] = True

    token: str = "<sks>"
    vectors: Size = 1
    word: str = "object"

    @property
    def described(self) -> str:
        """What is trained, in words."""
        several = "a vector" if self.vectors == 1 else f"{self.vectors} vectors"
        return f"textual inversion: {several} for {self.token}, which begin as {self.word!r}"

    @property
    def names(self) -> tuple[str, ...]:
        """The tokens that `token` stands for, as diffusers names them."""
        return (self.token, *(f"{self.token}_{number}" for number in range(1, self.vectors)))

    def apply(self, network: nn.Module, conditioner: nn.Module) -> None:
        """Freeze the network and the conditioner, and let its text encoders read the token.

        Raises:
            ConfigError: if no text encoder can, or the token is not one word.
        """
        if not self.token or self.token.split() != [self.token] or not self.word.strip():
            raise ConfigError(
                f"token = {self.token!r}, word = {self.word!r}",
                where="adapter",
                hint="the token is one new word, such as <sks>; the word is one that the model "
                "knows, such as cat",
            )
        network.requires_grad_(False)
        freeze_base(conditioner)
        learners = _learners(conditioner)
        if not learners:
            raise ConfigError(
                "textual inversion needs a pretrained text encoder, and the model has none",
                where="adapter.kind",
                hint="use adapter.kind=lora",
            )
        for part in learners:
            part.learn_tokens(self.names, part.word_vectors(self.word.strip(), self.vectors))

    def require_data(self, conditioner: nn.Module, captions: Sequence[Sequence[str]]) -> None:
        """Raise ConfigError unless each image's captions have the token.

        Nothing can be learned from the others, since all that they depend on is frozen.
        """
        without = sum(
            not texts or not all(part.reads_learned(text) for text in texts)
            for part in _learners(conditioner)
            for texts in captions
        )
        if without:
            raise ConfigError(
                f"{without} of {len(captions)} training images have a caption without "
                f"{self.token}, or none, and nothing can be learned from them",
                where="adapter.token",
                hint=f'write {self.token} into all captions; data.caption="a photo of '
                f'{self.token}" gives one to images that have none',
            )


def _learners(conditioner: nn.Module) -> list[TokenLearner]:
    return [part for part in conditioner.modules() if isinstance(part, TokenLearner)]

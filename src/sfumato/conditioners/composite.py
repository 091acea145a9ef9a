"""Several conditioners side by side; none at all is the unconditional model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor, nn

from sfumato.adapters import AdaptableConditioner
from sfumato.condition import NO_CONDITION, NO_CONTEXT, Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner


class CompositeConditioner(AdaptableConditioner):
    """Joins the conditions of its parts: vectors and maps along channels, tokens in sequence."""

    def __init__(self, parts: Mapping[str, Conditioner], *, factor: int = 1) -> None:
        """Hold `parts` by the name of the context that each reads.

        Args:
            factor: side of an image over that of the network's input.
        """
        super().__init__()
        self.factor = factor
        self.parts = nn.ModuleDict(parts)
        self._parts = tuple(parts.values())  # the same, with their own types
        self.sizes = reduce(
            ContextSizes.concat_features,
            (part.sizes.pixel_unshuffle(factor) for part in parts.values()),
            NO_CONTEXT,
        )

    def forward(
        self, context: Mapping[str, Any], batch_size: int, *, draws: Tensor | None = None
    ) -> Condition:
        """Return the condition of a batch.

        Args:
            context: values of each image, by the name of the context; a part whose context is
                missing gives its null condition.
            draws: uniform in [0, 1), (B, parts): a part gives its null condition where its draw is
                below its `dropout`; a draw above it decides how captions are augmented. None drops
                and augments nothing.
        """
        conditions = []
        for number, part in enumerate(self._parts):
            condition = part(
                context if draws is None else part.augmented(context, draws[:, number]), batch_size
            )
            if draws is not None:
                dropped = (draws[:, number] < part.dropout).to(
                    next(iter(condition.slots().values())).device
                )
                condition = condition.replace_where(dropped, part.null(batch_size))
            # one by one, so that a part's channels do not depend on the other parts
            conditions.append(condition.pixel_unshuffle(self.factor))
        return reduce(Condition.concat_features, conditions, NO_CONDITION)

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Return the context that training uses: that of the data, and what is derived from images.

        The images are (B, C, H, W). Draws are keyed by the samples' numbers, `first` and following.
        """
        values = dict(context)
        for part in self._parts:
            values |= part.training_context(images, context, seed=seed, first=first)
        return values

    @property
    def user_inputs(self) -> list[str]:
        """Names of the contexts that a request may set."""
        return [
            name for name, part in zip(self.parts, self._parts, strict=True) if part.is_user_input
        ]

    @property
    def over_image(self) -> list[str]:
        """Names of the contexts that give maps over the image."""
        parts = zip(self.parts, self._parts, strict=True)
        return [name for name, part in parts if part.sizes.spatial]

    @property
    def unguided(self) -> list[str]:
        """Names of the contexts that guidance keeps in all predictions."""
        return [name for name, part in zip(self.parts, self._parts, strict=True) if not part.guided]

    def base_parts(self) -> dict[str, str]:
        """Return a hash of each pretrained part that the model's weights do not hold, by name."""
        return {name: digest for part in self._parts for name, digest in part.base_parts().items()}

    def encode_ahead(self, texts: Sequence[str]) -> None:
        """Encode texts by all frozen encoders."""
        for part in self._parts:
            part.encode_ahead(texts)

    def release_encoders(self) -> int:
        """Free the frozen encoders of all parts, and return how many parameters."""
        return sum(part.release_encoders() for part in self._parts)

    def include_text_encoders(self) -> None:
        """Make the text encoders of all parts child modules."""
        for part in self._parts:
            part.include_text_encoders()

    def text_layers(self) -> dict[str, nn.Module]:
        """Return the layers of the text encoders of all parts that can be trained, by name."""
        return {name: layer for part in self._parts for name, layer in part.text_layers().items()}

    def trained_text_encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders of all parts that are child modules, by name."""
        return {
            name: encoder
            for part in self._parts
            for name, encoder in part.trained_text_encoders().items()
        }

    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders of all parts, by name."""
        return {
            name: encoder for part in self._parts for name, encoder in part.text_encoders().items()
        }

    def replace_text_encoders(self, encoders: Mapping[str, nn.Module]) -> None:
        """Use other text encoders in the place of some."""
        for part in self._parts:
            part.replace_text_encoders(encoders)

    def null(self, batch_size: int) -> Condition:
        """Return the null conditions of all parts, joined."""
        return reduce(
            Condition.concat_features,
            (part.null(batch_size).pixel_unshuffle(self.factor) for part in self._parts),
            NO_CONDITION,
        )

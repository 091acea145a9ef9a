"""The interface of contexts: one way to steer a model, from its configuration to its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sfumato.conditioners import (
    Conditioner,
    ConditioningInfo,
    PipelineTextConfig,
    PretrainedTextConfig,
    TextEncoder,
)
from sfumato.data import Dataset
from sfumato.errors import ConfigError

Metric = Callable[[Tensor, Tensor], Tensor]  # of images, for the conditions of these numbers: (n,)
Encoder = Callable[[PretrainedTextConfig | PipelineTextConfig], TextEncoder]


@dataclass(frozen=True, kw_only=True)
class RequestInfo:
    """What a context needs to parse its value in a request for images.

    Attributes:
        info: what the model knows about its training set.
        conditioner: the context's own part of the model.
        size: height and width of the images.
        num: number of images.
    """

    info: ConditioningInfo
    conditioner: Any
    size: tuple[int, int]
    num: int


@dataclass(frozen=True, kw_only=True)
class MetricInputs:
    """What a context's metrics are computed from.

    Attributes:
        values: the context's values for n images.
        real: the images that they belong to, (n, C, H, W) in [-1, 1].
        conditioner: the context's own part of the model.
        classify: predicts the categories (n,) of images; None if there are no categories.
    """

    values: Any
    real: Tensor
    conditioner: Any
    classify: Callable[[Tensor], Tensor] | None


class Context(ABC):
    """Everything about one context.

    A new one is a subclass in its own file, and a line in `contexts/registry.py`.

    Attributes:
        name: in configurations, in data, and of the conditioner's part.
        keyword: of `Pipeline.sample`; the name if it is "".
        negative: keyword of a value that guidance leads away from; "" if there is none.
        config: the dataclass, or union of dataclasses, that configures it; None where data alone
            decide.
        uses_init_image: whether it is derived from the image that sampling starts from: see
            `from_start`.
        is_user_input: whether a request may set it; if not, it only describes what was done to
            training images.
        derived_from_images: whether training derives it from the images themselves, so that
            latents alone are not enough.
        missing_data_hint: what the dataset must have, in the plural, and how to provide it; "" if
            nothing.
    """

    name: ClassVar[str]
    keyword: ClassVar[str] = ""
    negative: ClassVar[str] = ""
    config: ClassVar[Any] = None
    uses_init_image: ClassVar[bool] = False
    is_user_input: ClassVar[bool] = True
    derived_from_images: ClassVar[bool] = False
    missing_data_hint: ClassVar[tuple[str, str]] = ("", "")

    @abstractmethod
    def build(self, config: Any, info: ConditioningInfo, encoder: Encoder) -> Conditioner | None:
        """Build the untrained conditioner for a training set; None if it would have nothing to do.

        Args:
            encoder: where a pretrained text encoder comes from.
        """

    def info_fields(self, config: Any, dataset: Dataset) -> Mapping[str, Any]:
        """Return the fields of `ConditioningInfo` that it needs, from the training set."""
        return {}

    def carried(
        self, config: Any, before: ConditioningInfo, now: ConditioningInfo
    ) -> ConditioningInfo:
        """Return what a conditioner must know that goes on with changed data: `now`, with what its
        weights depend on as it was.

        Args:
            before: what it was built from.
            now: the same of the changed data.
        Raises:
            DataError: if its weights do not fit the changed data.
        """
        return now

    def parse(self, value: Any, request: RequestInfo) -> Any:
        """Return a batch of `request.num` from the value given to `Pipeline.sample`.

        Raises:
            ConfigError, ShapeError: naming what the model does not know.
        """
        raise ConfigError(f"{self.name} cannot be requested", where="sample", hint="leave it out")

    def parse_negative(self, value: Any, request: RequestInfo) -> Any:
        """Return a batch of `request.num` to lead away from, from the value given.

        Raises:
            ConfigError: if the context has no negative.
        """
        raise ConfigError(f"{self.name} has no negative", where="sample", hint="leave it out")

    def from_start(self, start: Tensor, known: Tensor | None, request: RequestInfo) -> Any:
        """Return a batch from the images (n, C, H, W) that sampling starts from.

        `known` is 1 where they are kept. The result is None if the context does not use them.
        """
        return None

    def read(self, text: str, request: RequestInfo) -> Any:
        """Return the value that `parse` takes, from a command line's text or the path of a file.

        Raises:
            DataError: for a file that cannot be used.
        """
        return text

    def preview(self, value: Any, size: tuple[int, int]) -> Tensor | None:
        """Return a value given to `Pipeline.sample` as images in [0, 1]; None for words."""
        return None

    def to_images(self, values: Any, size: tuple[int, int]) -> Tensor | None:
        """Return a batch as images (n, C, h, w) in [-1, 1]; None for words."""
        return None

    def words(self, values: Any, info: ConditioningInfo) -> list[str] | None:
        """Return a batch in words, one text each; None for what is drawn."""
        return None

    def enumerate_values(self, num: int, info: ConditioningInfo) -> Any:
        """Return a batch of all values, repeated in order; None if they cannot be listed."""
        return None

    def known_values(self, info: ConditioningInfo, dataset: Dataset, prompts: Sequence[str]) -> Any:
        """Return a batch of values that the base of a fine-tuning knows and no new image has.

        None if they cannot be listed.

        Args:
            info: of the fine-tuned model.
            dataset: the new images.
            prompts: texts to use instead of the built-in ones; [] for those.
        """
        return None

    def metrics(self, inputs: MetricInputs) -> dict[str, tuple[str, Metric]]:
        """Return metrics of how well images follow the context, by name.

        Each comes after the direction that is better, "higher" or "lower".
        """
        return {}

    @property
    def keywords(self) -> tuple[str, ...]:
        """Keywords of `Pipeline.sample` that the context accepts."""
        return tuple(filter(None, (self.keyword or self.name, self.negative)))

    def require(self, values: object) -> None:
        """Raise ConfigError if `values`, those of the training set, are empty."""
        if not values:
            kind, remedy = self.missing_data_hint
            raise ConfigError(
                f"needs {kind}, but the dataset has none",
                where=f"conditioner.{self.name}",
                hint=f"set conditioner.{self.name}=null, or {remedy}",
            )


def cycle(values: Sequence[Any], num: int, name: str) -> list[Any]:
    """Repeat the values in order until there are `num` of them.

    Args:
        name: of the values, in errors.
    Raises:
        ConfigError: if there are none.
    """
    if not values:
        raise ConfigError(
            f"an empty list of {name}", where="sample", hint="name at least one, or None for none"
        )
    return [values[i % len(values)] for i in range(num)]

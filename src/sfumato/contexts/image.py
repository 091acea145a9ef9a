"""Images as context: a degraded image to restore, or a reference to make variations of."""

from __future__ import annotations

import math

from torch import Tensor

from sfumato.conditioners import (
    ConditioningInfo,
    ImageConditioner,
    ImageConfig,
    ReferenceConditioner,
    ReferenceConfig,
)
from sfumato.contexts.image_inputs import batch_of_images
from sfumato.contexts.protocol import Context, Encoder, Metric, MetricInputs, RequestInfo
from sfumato.data.user_inputs import load_user_image


class DegradedImage(Context):
    """A degraded image to restore: super-resolution, colourization or inpainting.

    It is the image that sampling starts from.
    """

    name = "image"
    config = ImageConfig
    uses_init_image = True
    derived_from_images = True

    def build(
        self, config: ImageConfig, info: ConditioningInfo, encoder: Encoder
    ) -> ImageConditioner:
        """Build the conditioner for images with the channels of the training set."""
        return ImageConditioner(config, channels=info.channels)

    def from_start(self, start: Tensor, known: Tensor | None, request: RequestInfo) -> Tensor:
        """Degrade the images that sampling starts from; NaN where `known` is below 0.5."""
        masked = start if known is None else start.masked_fill(known < 0.5, math.nan)
        degraded: Tensor = request.conditioner.config.degradation.degrade_input(masked)
        return degraded

    def to_images(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images, (n, C, H, W), 0 where a pixel is unknown."""
        return values.nan_to_num(0.0)

    def metrics(self, inputs: MetricInputs) -> dict[str, tuple[str, Metric]]:
        """Return the mean absolute error, over known pixels, of images that are degraded again."""
        degradation, values = inputs.conditioner.config.degradation, inputs.values
        return {
            "error where it is known": (
                "lower",
                lambda x, i: _known_error(degradation.degrade_input(x), values[i]),
            )
        }


class Reference(Context):
    """An image to make variations of."""

    name = "reference"
    config = ReferenceConfig
    derived_from_images = True

    def build(
        self, config: ReferenceConfig, info: ConditioningInfo, encoder: Encoder
    ) -> ReferenceConditioner:
        """Build the conditioner for images with the channels of the training set."""
        return ReferenceConditioner(config, channels=info.channels)

    def parse(self, value: Tensor, request: RequestInfo) -> Tensor:
        """Return images (num, C, H, W) in [-1, 1], from one or several in [0, 1]."""
        return batch_of_images(
            value, (request.info.channels, *request.size), request.num, self.name
        )

    def read(self, text: str, request: RequestInfo) -> Tensor:
        """Load an image file, (C, H, W) in [0, 1]."""
        return read_image(text, request)

    def preview(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the image as it is."""
        return value

    def to_images(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images, (n, C, H, W), 0 where none is given."""
        return values.nan_to_num(0.0)


def read_image(path: str, request: RequestInfo) -> Tensor:
    """Load an image file in the format of the model's images, (C, H, W) in [0, 1]."""
    (height, width), info = request.size, request.info
    return load_user_image(
        path,
        channels=info.channels,
        height=height,
        width=width,
        bits=info.bits,
        alpha=info.alpha,
        value_range=info.value_range,
    )


def _known_error(images: Tensor, reference: Tensor) -> Tensor:
    return (images - reference).abs().flatten(1).nanmean(1).double()

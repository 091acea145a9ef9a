"""Doodles: line drawings, from the data or made from the images."""

from __future__ import annotations

from torch import Tensor

from sfumato.conditioners import ConditioningInfo, DoodleConditioner, DoodleConfig
from sfumato.contexts.adherence_metrics import line_f1, silhouette_iou
from sfumato.contexts.image_inputs import batch_of_images
from sfumato.contexts.protocol import Context, Encoder, Metric, MetricInputs, RequestInfo
from sfumato.data.user_inputs import load_user_image


class Doodle(Context):
    """A line drawing for each image, dark on light."""

    name = "doodle"
    config = DoodleConfig
    derived_from_images = True

    def build(
        self, config: DoodleConfig, info: ConditioningInfo, encoder: Encoder
    ) -> DoodleConditioner:
        """Build the conditioner; every training set will do, since lines are made from images."""
        return DoodleConditioner(config)

    def parse(self, value: Tensor, request: RequestInfo) -> Tensor:
        """Return drawings (num, 1, H, W) in [-1, 1], from one or several in [0, 1]."""
        return batch_of_images(value, (1, *request.size), request.num, self.name)

    def read(self, text: str, request: RequestInfo) -> Tensor:
        """Load an image file as a drawing, (1, H, W) in [0, 1]."""
        height, width = request.size
        return load_user_image(
            text, channels=1, height=height, width=width, alpha=request.info.alpha
        )

    def preview(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the drawing as it is."""
        return value

    def to_images(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the drawings, (n, 1, H, W), 0 where none is given."""
        return values.nan_to_num(0.0)

    def metrics(self, inputs: MetricInputs) -> dict[str, tuple[str, Metric]]:
        """Return the F1 of lines and the IoU of silhouettes, of which higher is better."""
        ink, real = (1 - inputs.values) / 2, inputs.real
        return {
            "F1 of lines": ("higher", lambda x, i: line_f1(x, ink[i])),
            "IoU of silhouettes": ("higher", lambda x, i: silhouette_iou(x, real[i])),
        }

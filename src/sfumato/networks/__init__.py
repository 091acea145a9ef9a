"""Networks: they know tensors and `Condition`, nothing of schedules or targets. One file each."""

from sfumato.networks.backbone import Backbone, NetworkConfig
from sfumato.networks.dit import DiT, DiTConfig
from sfumato.networks.unet import UNet, UNetConfig

__all__ = ["Backbone", "DiT", "DiTConfig", "NetworkConfig", "UNet", "UNetConfig"]

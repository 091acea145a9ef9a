"""Networks: they know tensors and `Condition`, nothing of schedules or targets. One file each."""

from sfumato.networks.unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]

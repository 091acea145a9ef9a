"""Networks, one file each. They know tensors and `Condition`, but no schedules or targets."""

from sfumato.networks.backbone import Backbone, NetworkConfig
from sfumato.networks.diffusers_models import DiffusersConfig
from sfumato.networks.dit import DiT, DiTConfig
from sfumato.networks.unet import UNet, UNetConfig

__all__ = ["Backbone", "DiT", "DiTConfig", "DiffusersConfig", "NetworkConfig", "UNet", "UNetConfig"]

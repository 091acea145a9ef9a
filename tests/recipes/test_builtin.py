"""What every built-in recipe must do."""

from dataclasses import replace

import pytest
import torch

from sfumato.conditioners import ConditioningInfo
from sfumato.networks import DiTConfig, NetworkConfig, UNetConfig
from sfumato.recipes import RECIPES, recipe
from sfumato.runs.preparation import build_model

NETWORKS = [
    UNetConfig(channels=32, multipliers=(1, 2), attention_depths=(1,), head_channels=32),
    *(
        DiTConfig(hidden_size=64, depth=2, head_dim=32, token_conditioning=how)
        for how in ("cross", "joint", "sequence")
    ),
]


@pytest.mark.parametrize("network", NETWORKS, ids=["u-net", "cross", "joint", "sequence"])
@pytest.mark.parametrize("name", RECIPES)
def test_u_net_and_transformer_are_interchangeable(name: str, network: NetworkConfig) -> None:
    """Whatever steers it, and in pixels or latents."""
    run = replace(recipe(name), network=network)
    shape = run.autoencoder.latent_shape(run.data.channels, None)
    info = ConditioningInfo(
        channels=run.data.channels,
        categories=("a", "b"),
        words=("a", "word"),
        dimensions=3 if "solids" in name else 2,
        augmentation=run.data.augment.labels,
        factor=shape.factor,
    )
    side = run.data.resolution // shape.factor
    model = build_model(run, info)
    x = torch.randn(2, shape.channels, side, side)
    assert model.network(x, torch.tensor([10.0, 900.0]), model.conditioner.null(2)).shape == x.shape

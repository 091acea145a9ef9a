"""Run: the root of every configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sfumato.adapters import Adapter, WholeNetwork
from sfumato.config.bounds import require_bounds
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig
from sfumato.diffusion import Linear, LogitNormal, Objective, Warped
from sfumato.distributed.sharding import EngineName
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.networks import NetworkConfig, UNetConfig
from sfumato.recipes.autoencoder_stage import AutoencoderConfig, PixelsConfig
from sfumato.recipes.config_checks import (
    require_finite_loss,
    require_guidable,
    require_sampled,
    require_storage,
)
from sfumato.training import AuxiliaryConfig, PreservationConfig, SweepConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Run(TrainingConfig):
    """All that is needed to repeat a training: data, model, objective, training and sampling.

    Attributes:
        name: of the recipe; the run directory is called after it.
        autoencoder: whose latents the model works in; pixels by default.
        conditioner: what steers the model; nothing by default.
        auxiliary: losses and weights that are trained beside the model; none by default.
        data: images to train on.
        network: the network.
        base: directory of a run whose averaged weights training starts from; "" for random ones. A
            network of diffusers names its own folder.
        adapter: what of the network is trained; all of it by default.
        preservation: keeps what the base of a fine-tuning knew; null for not.
        denoiser: how the network is read as a denoiser.
        objective: the training loss.
        sampling: defaults of sampling.
        sweep: whether settings of sampling are compared when training ends.
        distributed: how several processes share the network: `replicate`, each holds all of it;
            `shard`, each holds a part; `hybrid`, each machine holds all of it, in parts; `auto`, by
            its size.
    """

    name: str
    data: DataConfig = DataConfig()
    autoencoder: AutoencoderConfig = PixelsConfig()
    network: NetworkConfig = UNetConfig()
    base: str = ""
    adapter: Adapter = WholeNetwork()
    preservation: PreservationConfig | None = None
    conditioner: ContextConfig = ContextConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    objective: Objective = Objective(schedule=Warped(schedule=Linear(), warp=LogitNormal()))
    sampling: SamplingConfig = SamplingConfig()
    sweep: SweepConfig = SweepConfig()
    distributed: EngineName = "auto"

    def __post_init__(self) -> None:
        require_bounds(self)
        TrainingConfig.__post_init__(self)
        if self.auxiliary.uncertainty and self.objective.contrastive_weight:
            raise ConfigError(
                "cannot be combined with objective.contrastive_weight: the loss can become negative",
                where="auxiliary.uncertainty",
                hint="use one of the two: auxiliary.uncertainty=false, or "
                "objective.contrastive_weight=0",
            )

        if self.sampling.clip and not isinstance(self.autoencoder, PixelsConfig):
            raise ConfigError(
                "clamps guesses of the image to [-1, 1], and the model works in latents, whose "
                "values have no bounds",
                where="sampling.clip",
                hint="set sampling.clip=false, or autoencoder.kind=pixels",
            )
        if self.preservation is not None and not self.has_base:
            raise ConfigError(
                "keeps what a base knows, and this run has none",
                where="preservation",
                hint="set it to null, or fine-tune a model: sfumato finetune MODEL SOURCE",
            )
        require_sampled(self.denoiser, self.sampling, self.objective.schedule)
        require_finite_loss(self)
        require_guidable(self)
        require_storage(self)

    @property
    def has_base(self) -> bool:
        """Whether training starts from weights that lie outside of the run."""
        return bool(self.base or self.network.origin)

    def from_scratch(self) -> Run:
        """Return the run with random initial weights."""
        return replace(self, base="", preservation=None, network=self.network.from_scratch())

    @property
    def needs_images(self) -> bool:
        """Whether training needs the images themselves where the model works in latents."""
        return self.conditioner.needs_images or self.auxiliary.alignment is not None

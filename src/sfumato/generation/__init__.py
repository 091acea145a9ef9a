"""From a trained model to images: requests, and the pipeline that answers them."""

from sfumato.generation.diffusion_model import DenoiserConfig, Model, SamplingConfig
from sfumato.generation.generated import Generated
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest, SampleRequest

__all__ = [
    "DenoiserConfig",
    "Generated",
    "Model",
    "Pipeline",
    "ResolvedRequest",
    "SampleRequest",
    "SamplingConfig",
]

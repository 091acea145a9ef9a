"""What the calls of diffusers' pipelines do unless they are told otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.diffusion import GuidanceRescale, MatchNorm


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """What the call of one class of pipelines does.

    Attributes:
        guidance: scale of classifier-free guidance, 1 where there is none.
        guidance_rescale: what is done to guided predictions.
        even_times: whether it gives its scheduler even times; see `read_scheduler`.
        unsupported: keys of its scheduler that it uses in its own way.
        remark: a line that users should know.
    """

    guidance: float = 1.0
    guidance_rescale: GuidanceRescale | None = None
    even_times: bool = False
    unsupported: tuple[str, ...] = ()
    remark: str = ""


DISTILLED = "versions distilled for few steps need --guidance 1"

CALLS = {
    "StableDiffusionPipeline": PipelineCall(guidance=7.5),
    "StableDiffusionXLPipeline": PipelineCall(guidance=5.0),
    "StableDiffusion3Pipeline": PipelineCall(guidance=7.0),
    "PixArtSigmaPipeline": PipelineCall(guidance=4.5),
    "DiTPipeline": PipelineCall(guidance=4.0),
    "FluxPipeline": PipelineCall(even_times=True),
    "SanaPipeline": PipelineCall(guidance=4.5),
    "Lumina2Pipeline": PipelineCall(
        guidance=4.0,
        guidance_rescale=MatchNorm(parts="rows"),
        even_times=True,
        # it takes the number of channels for that of tokens
        unsupported=("use_dynamic_shifting",),
    ),
    # its scale w is added to the conditional prediction, which is w + 1 here
    "ZImagePipeline": PipelineCall(guidance=6.0, even_times=True, remark=DISTILLED),
    "QwenImagePipeline": PipelineCall(
        guidance=4.0, guidance_rescale=MatchNorm(parts="cells"), even_times=True
    ),
}


def pipeline_call(name: str) -> PipelineCall:
    """Return what the call of a class of pipelines does."""
    return CALLS.get(name, PipelineCall())

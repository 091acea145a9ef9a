"""A trained model that is ready to generate images: what `sfumato.load` returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.autoencoders import Autoencoder, Pixels
from sfumato.condition import Condition
from sfumato.conditioners import ConditioningInfo
from sfumato.contexts import Category, part_of, trained_categories
from sfumato.diffusion import (
    AutoGuidance,
    ClampX0,
    Denoiser,
    GuidanceRescale,
    GuidanceTerm,
    Inpaint,
    NoiseLevel,
    WithCondition,
)
from sfumato.distributed import current
from sfumato.errors import ConfigError, NonFiniteError, ShapeError
from sfumato.generation.diffusion_model import Model, SamplingConfig
from sfumato.generation.generated import Generated
from sfumato.generation.guidance import guidance_scales, guidance_terms, guided, require_guided
from sfumato.generation.options import ResolvedOptions, SamplingOptions
from sfumato.generation.request import (
    ResolvedRequest,
    SampleRequest,
    keeps_a_part,
    require_size,
    resolve_request,
)
from sfumato.nn.compiling import compile_in_place
from sfumato.observability.image_formats import PixelEncoding
from sfumato.sampling import (
    InterpolatedNoise,
    KeyedNoise,
    SamplerConfig,
    StepInfo,
    grid,
    repeated,
    sample,
)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Makes images. Image i of a seed is the same whatever the number of images or the batch size.

    Attributes:
        model: in evaluation mode, on the device that will run it.
        autoencoder: whose latents the model works in; `Pixels` where those are the images.
        sampling: defaults of `sample`.
        info: what the model's conditioner knows of its training set.
        image_shape: (C, H, W).
        compute_dtype: precision inside the network; bfloat16 is faster and rounds, so images then
            depend on the batch a little.
    """

    model: Model
    autoencoder: Autoencoder
    sampling: SamplingConfig
    info: ConditioningInfo
    image_shape: tuple[int, int, int]
    compute_dtype: torch.dtype = torch.float32

    def compile(self) -> None:
        """Compile the network; on a GPU, it becomes a graph that is replayed.

        The first images take a minute or more, and all others take less time than before.

        Raises:
            ConfigError: if this machine lacks what compiling needs.
        """
        on_gpu = next(self.model.parameters()).is_cuda
        compile_in_place(self.model.network, mode="reduce-overhead" if on_gpu else "default")

    @property
    def categories(self) -> tuple[str, ...]:
        """Names that `category` may take; () for a model that is not steered by categories."""
        return (
            ()
            if part_of(self.model.conditioner, Category) is None
            else trained_categories(self.info)
        )

    @property
    def values(self) -> PixelEncoding:
        """What the values of the generated images mean: channels, bits, alpha and value range."""
        info = self.info
        return PixelEncoding(
            channels=self.image_shape[0],
            bits=info.bits,
            alpha=info.alpha,
            value_range=info.value_range,
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the contexts that steer the model."""
        return tuple(self.model.conditioner.user_inputs)

    def sample(
        self,
        num: int,
        *,
        prompt: str | Sequence[str] | None = None,
        category: str | int | Sequence[str | int] | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        negative: str | None = None,
        doodle: Tensor | None = None,
        points: Tensor | Sequence[Tensor] | None = None,
        reference: Tensor | None = None,
        attributes: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | SamplerConfig | None = None,
        guidance: float | Mapping[str, float] | None = None,
        interval: tuple[float, float] | None = None,
        autoguidance: tuple[Model, float] | None = None,
        clip: bool | None = None,
        resample: int = 1,
        guidance_rescale: float | GuidanceRescale | None = None,
        batch_size: int = 64,
        on_step: Callable[[StepInfo], None] | None = None,
        **contexts: Any,
    ) -> Tensor:
        """Generate images, (num, C, H, W) in [0, 1].

        A context applies to all images, or has several values to cycle through; None leaves it to
        the model.

        Args:
            prompt: texts.
            negative: one text that guidance leads away from.
            category: names.
            image: images to start from, to complete or to restore, (C, H, W) or (n, C, H, W) in [0,
                1].
            mask: where `image` is regenerated, 1 there and 0 where it is kept, (1, H, W) or (n, 1,
                H, W).
            strength: how much of the way to noise `image` is sent before it is denoised: 0 returns
                it, 1 ignores it.
            doodle: line drawings, dark on light, (1, H, W) or (n, 1, H, W) in [0, 1].
            points: a point cloud (N, D), or several.
            reference: images to make variations of, (C, H, W) or (n, C, H, W) in [0, 1].
            attributes: numbers by name.
            size: height and width in pixels; by default those that the model was trained at.
            seed: image i depends on (seed, i) only: its noise exactly, its pixels to float
                rounding.
            steps, sampler, guidance, interval, clip: replace the model's defaults. The names of
                samplers are in `sfumato.sampling.SAMPLERS`. Guidance is one scale for all contexts,
                or one for each by name, which costs a network call each. If a mask is given and no
                sampler, the sampler is `churn`, or `ddpm` if steps are resampled.
            autoguidance: an earlier snapshot of the same run, and the scale at which images are led
                away from its predictions.
            resample: how many times each step is taken where a mask is filled; more agrees better
                with what is known.
            batch_size: images generated at once; it affects memory, not the result.
            on_step: called after each denoising step of each batch.
            contexts: values of custom contexts, by keyword.
        Raises:
            ConfigError: for a context that the model does not read, a value that it does not know,
                or a setting without effect.
            NonFiniteError: if the model's output is not finite.
        """
        request = SampleRequest.of(
            prompt=prompt,
            category=category,
            image=image,
            mask=mask,
            strength=strength,
            negative=negative,
            doodle=doodle,
            points=points,
            reference=reference,
            attributes=attributes,
            size=size,
            **contexts,
        )
        options = SamplingOptions(
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            interval=interval,
            clip=clip,
            autoguidance=autoguidance,
            resample=resample,
            guidance_rescale=guidance_rescale,
        )
        batches = self.batches(
            num, request, options, seed=seed, batch_size=batch_size, on_step=on_step
        )
        return torch.cat([images for _, images in batches])

    def generate(self, num: int, **arguments: Any) -> Generated:
        """Generate images as `sample` does, with the settings that saved files carry.

        Args:
            arguments: arguments of `sample`.
        """
        images = self.sample(num, **arguments)
        mask = arguments.get("mask")
        options = SamplingOptions(
            **{
                field.name: arguments[field.name]
                for field in fields(SamplingOptions)
                if field.name in arguments
            }
        ).resolve(self.sampling, inpainting=keeps_a_part(mask))
        settings = {
            "num": num,
            "seed": 0,
            **{name: value for name, value in arguments.items() if _is_plain(value)},
            **options.settings(),
        }
        return Generated(images=images, settings=settings, values=self.values)

    def sample_request(
        self,
        request: ResolvedRequest,
        *,
        seed: int = 0,
        guidance: float | Mapping[str, float] | None = None,
        batch_size: int = 64,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Generate images as `sample` does, from tensors that are known to fit the model; of several
        processes, each generates some of them.
        """
        world, num = current(), len(request.start)
        span = world.span(num)
        batches = self.batches(
            num,
            request,
            SamplingOptions(guidance=guidance),
            seed=seed,
            batch_size=batch_size,
            skip=[*range(span.start), *range(span.stop, num)],
            on_step=on_step,
        )
        return world.join_spans(torch.cat([images for _, images in batches]), num)

    def batches(
        self,
        num: int,
        request: SampleRequest | ResolvedRequest,
        options: SamplingOptions = SamplingOptions(),
        *,
        seed: int = 0,
        batch_size: int = 64,
        skip: Collection[int] = (),
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Return an iterator that generates images as `sample` does, batch by batch.

        It yields the number of a batch's first image, and the batch's images.

        Args:
            skip: numbers of images that are not generated.
        Raises:
            ConfigError, ShapeError, ScheduleError: as `sample`, at once and not with the first
                batch.
        """
        if num < 1 or batch_size < 1:
            raise ShapeError(
                f"{num} images in batches of {batch_size}",
                where="sample",
                hint="ask for at least 1",
            )
        resolved = self._resolved(request, num)
        settings = self._require_possible(
            options.resolve(self.sampling, inpainting=resolved.is_inpainting)
        )
        solver = repeated(
            settings.sampler, inpainting=resolved.is_inpainting, resample=options.resample
        )
        spans = _spans(num, skip, batch_size)
        scales = self._scales(settings)
        if options.guidance_rescale is not None:
            require_guided(scales, resolved.names)
        if resolved.strength == 0:
            return iter([(span.start, to_unit(resolved.start[span])) for span in spans])
        levels = self._levels(resolved.start, settings.steps, strength=resolved.strength)

        def images(span: slice) -> Tensor:
            part = resolved.rows(span, self._device)
            noise = KeyedNoise(seed, span.start)
            start = self._start(part)
            with torch.no_grad():
                terms = guidance_terms(self.model.conditioner, part, part.names, scales)
                condition = self.model.conditioner(part.context, len(part.start))
                x = sample(
                    solver,
                    self._denoiser(part, start, terms, settings, options.autoguidance),
                    self._first_state(part, start, noise(start), levels.at(0)),
                    levels,
                    condition=condition,
                    noise=noise,
                    on_step=on_step,
                )
            decoded = self.decode(x)
            if part.known is not None:
                decoded = self.autoencoder.paste_known(decoded, part.start, part.known)
            return to_unit(_finite(decoded, span.start)).cpu()

        return ((span.start, images(span)) for span in spans)

    def _resolved(self, request: SampleRequest | ResolvedRequest, num: int) -> ResolvedRequest:
        if isinstance(request, ResolvedRequest):
            return request
        shape = self.image_shape
        if request.size is not None:
            require_size(request.size, self.autoencoder.factor)
            shape = (shape[0], *request.size)
        return resolve_request(request, self.model.conditioner, self.info, shape, num)

    def _start(self, part: ResolvedRequest) -> Tensor:
        """Return the latents that a batch starts from; zeros where pure noise ignores them."""
        if not part.is_image_to_image:
            return self._zeros(part.start)
        with torch.no_grad():
            return self.autoencoder.encode(part.start)

    def _first_state(
        self, part: ResolvedRequest, start: Tensor, noise: Tensor, level: NoiseLevel
    ) -> Tensor:
        """Return the noisy latents that a trajectory begins with, (B, C, H, W).

        Pure noise has the deviation of noisy data at this level, so that it fits schedules that
        stop short of it; where alpha = 0, that is sigma.
        """
        if part.is_image_to_image:
            return level.mix(start, noise)
        return noise / self.model.config.input_scale(level.like(noise))

    def _denoiser(
        self,
        part: ResolvedRequest,
        start: Tensor,
        terms: tuple[GuidanceTerm, ...],
        settings: ResolvedOptions,
        autoguidance: tuple[Model, float] | None,
    ) -> Denoiser:
        """Return the denoiser of one batch: the network, guided, clipped and told what is kept."""
        denoiser = guided(
            self.model.denoiser(self.compute_dtype),
            terms,
            settings.interval,
            settings.guidance_rescale,
        )
        if autoguidance is not None:
            weaker, scale = autoguidance
            condition = weaker.conditioner(part.context, len(part.start))
            bad = WithCondition(denoiser=weaker.denoiser(self.compute_dtype), condition=condition)
            denoiser = AutoGuidance(good=denoiser, bad=bad, scale=scale)
        if settings.clip:
            denoiser = ClampX0(denoiser=denoiser)
        if part.known is not None:
            # a cell of latents is known where all of its pixels are
            cells = -F.max_pool2d(-part.known, self.autoencoder.factor)
            denoiser = Inpaint(denoiser=denoiser, image=start, known=cells)
        return denoiser

    def interpolate(
        self,
        num: int,
        first: SampleRequest,
        last: SampleRequest,
        *,
        seeds: tuple[int, int] = (0, 0),
        steps: int | None = None,
        sampler: str | SamplerConfig | None = None,
        guidance: float | Mapping[str, float] | None = None,
        interval: tuple[float, float] | None = None,
        clip: bool | None = None,
        guidance_rescale: float | GuidanceRescale | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Generate images between two requests and seeds, (num, C, H, W) in [0, 1].

        Both ends are included. Conditions are mixed linearly, and noises on the sphere, so that
        every mixture has unit variance.

        Raises:
            ConfigError, ShapeError: as `sample`, and for a strength other than 1 or a mask.
        """
        if num < 1:
            raise ShapeError(f"{num} images", where="sample", hint="ask for at least 1")
        requests = [
            self._resolved(request, 1).rows(slice(0, 1), self._device) for request in (first, last)
        ]
        if any(request.strength != 1 or request.known is not None for request in requests):
            raise ConfigError(
                "strength and mask are not supported in an interpolation",
                where="sample",
                hint="leave them out: interpolation starts from noise",
            )
        options = SamplingOptions(
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            interval=interval,
            clip=clip,
            guidance_rescale=guidance_rescale,
        )
        settings = self._require_possible(options.resolve(self.sampling, inpainting=False))
        scales = self._scales(settings)
        names = {name for request in requests for name in request.names}
        if guidance_rescale is not None:
            require_guided(scales, names)
        fractions = torch.linspace(0, 1, num, device=self._device)
        levels = self._levels(requests[0].start, settings.steps)
        noise = InterpolatedNoise(KeyedNoise(seeds[0]), KeyedNoise(seeds[1]), fractions.tolist())
        zeros = self._zeros(requests[0].start.expand(num, -1, -1, -1))
        x = self._first_state(requests[0], zeros, noise(zeros), levels.at(0))

        def mixed(a: Condition, b: Condition) -> Condition:
            return a.expand(num).lerp(b.expand(num), fractions)

        with torch.no_grad():
            conditioner = self.model.conditioner
            condition = mixed(*(conditioner(request.context, 1) for request in requests))
            ladders = [guidance_terms(conditioner, part, names, scales) for part in requests]
            terms = tuple(
                GuidanceTerm(mixed(a.condition, b.condition), a.scale)
                for a, b in zip(*ladders, strict=True)
            )
            images = sample(
                settings.sampler,
                self._denoiser(requests[0], x, terms, settings, None),
                x,
                levels,
                condition=condition,
                noise=noise,
                on_step=on_step,
            )
        return to_unit(_finite(self.decode(images), 0)).cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _levels(self, images: Tensor, steps: int, *, strength: float = 1.0) -> NoiseLevel:
        """Return the grid for images of this size, (B, C, H, W)."""
        height, width = (side // self.autoencoder.factor for side in images.shape[2:])
        return grid(
            self.sampling.schedule.at_size(height, width),
            steps,
            strength=strength,
            spacing=self.sampling.spacing,
        )

    def _zeros(self, images: Tensor) -> Tensor:
        """Return zeros in the shape of the latents of images (B, C, H, W)."""
        factor, (height, width) = self.autoencoder.factor, images.shape[2:]
        shape = (len(images), self.autoencoder.latent_channels, height // factor, width // factor)
        return torch.zeros(shape, device=self._device)

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents, or images of a pixel model, to images in [-1, 1], not clamped."""
        with torch.no_grad():
            return self.autoencoder.decode(x)

    def _scales(self, settings: ResolvedOptions) -> dict[str, float]:
        unguided = self.model.conditioner.unguided
        names = [name for name in self.reads if name not in unguided]
        return guidance_scales(settings.guidance, names, self.sampling.guidance)

    def _require_possible(self, settings: ResolvedOptions) -> ResolvedOptions:
        """Return the settings, or refuse clipping in latents."""
        if settings.clip and not isinstance(self.autoencoder, Pixels):
            raise ConfigError(
                "clip needs bounds, which the values of latents do not have",
                where="sample",
                hint="leave clip out: it is for models of pixels",
            )
        return settings


def _spans(num: int, skip: Collection[int], most: int) -> list[slice]:
    """Split the numbers below `num`, without those of `skip`, into runs of at most `most`."""
    spans: list[slice] = []
    skipped = frozenset(skip)
    for number in (number for number in range(num) if number not in skipped):
        if spans and spans[-1].stop == number and number - spans[-1].start < most:
            spans[-1] = slice(spans[-1].start, number + 1)
        else:
            spans.append(slice(number, number + 1))
    return spans


def _finite(images: Tensor, first: int) -> Tensor:
    """Return the images, or raise NonFiniteError if one of them is not finite."""
    bad = torch.nonzero(~images.isfinite().flatten(1).all(1))[:, 0].tolist()
    if bad:
        raise NonFiniteError(
            f"the model's output is not finite ({len(bad)} of {len(images)} images, the first is "
            f"image {first + bad[0]})",
            where="sample",
            hint="use other weights (raw or ema), an earlier checkpoint or precision float32: it "
            "diverged, or its weights are damaged",
        )
    return images


def _is_plain(value: Any) -> bool:
    """Return whether a file can carry a value as it is: tensors and functions are left out."""
    several = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, list | tuple)
        else [value]
    )
    return all(isinstance(one, str | int | float | bool | Mapping) for one in several)


def to_unit(x: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1], clamped."""
    return ((x + 1) / 2).clamp(0, 1)

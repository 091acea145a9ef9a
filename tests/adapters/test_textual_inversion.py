"""Textual inversion: new words of a frozen model, against diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import config as configuration
from sfumato.adapters import TextualInversion, without_adapters
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.embedding import with_embedding
from sfumato.interop.embedding_export import write_embedding
from sfumato.interop.trained_model import TrainedModel
from sfumato.observability.image_formats import settings_of
from sfumato.recipes import Run
from sfumato.recipes.model import build_model
from sfumato.runs.finetuning import choose_finetuning
from sfumato.sampling import KeyedNoise
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import pixart, stable_diffusion, stable_diffusion_xl
from tests.helpers.lora import theirs
from tests.helpers.runs import fingerprint
from tests.parity.test_finetune import SHORT, photos
from tests.training.test_resume import interrupted

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a cat and <sks> by night"
STEPS = 3
ADAPTER = ("adapter.kind=textual-inversion", "adapter.word=q")
TUNED = (
    *SHORT,
    *ADAPTER,
    "sampling.steps=4",
    "validation.samples=2",  # one image at each level
    "data.caption=a photo of <sks>",
    "optimizer.learning_rate=0.05",
)
FAMILIES = {
    "sd": partial(stable_diffusion, steps_offset=1, set_alpha_to_one=False),
    "sdxl": stable_diffusion_xl,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def uncaptioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without captions."""
    return photos(tmp_path_factory.mktemp("images") / "photos", captions=False)


def learning(folder: Path, *, spread: float = 0.0, **settings: Any) -> TrainedModel:
    """A base with a token, whose vectors are moved at random by `spread`."""
    content = read_folder(folder)
    run = replace(content.run, adapter=TextualInversion(**{"word": "q", **settings}))
    model = build_model(run, content.info).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for rows in model.conditioner.parts["text"].learned.rows.values():
            rows += spread * torch.randn(rows.shape, generator=generator)
    pipeline = replace(sfumato.load(folder), model=model)
    return TrainedModel(pipeline=pipeline, run=run, directory=folder.parent / "run", step=7)


def rows_of(trained: TrainedModel) -> dict[str, torch.Tensor]:
    learned = trained.pipeline.model.conditioner.parts["text"].learned
    return dict(learned.rows.items())


def with_rows(folder: Path, rows: dict[str, torch.Tensor], token: str = "<sks>") -> Any:
    """diffusers' pipeline with the vectors of a token."""
    pipeline = theirs(folder)
    for name, vectors in rows.items():
        number = name.removeprefix("text_encoder")
        pipeline.load_textual_inversion(
            vectors.detach().clone(),
            token=token,
            text_encoder=getattr(pipeline, name),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )
    return pipeline


def encoded(pipeline: Any, prompt: str) -> tuple[torch.Tensor, ...]:
    """The tokens of a prompt as diffusers encodes them, and for SDXL the pooled text."""
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    result = pipeline.encode_prompt(prompt, **arguments)
    return tuple(result[number] for number in ((0, 2) if len(result) == 4 else (0,)))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_new_rows_have_gradients_and_they_are_those_of_diffusers(
    folders: dict[str, Path], family: str
) -> None:
    trained = learning(folders[family], vectors=2, spread=0.1)
    model, own = trained.pipeline.model, rows_of(trained)
    condition = model.conditioner({"text": [PROMPT, "a cat"]}, 2)
    slots = [condition.tokens, *([condition.vector] if condition.vector is not None else [])]
    sum(slot[0].square().sum() for slot in slots).backward()
    assert list(own) == ["text_encoder", "text_encoder_2"][: len(own)]
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"conditioner.parts.text.learned.rows.{name}" for name in own}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == reached
    pipeline = with_rows(folders[family], own)
    sum(slot.square().sum() for slot in encoded(pipeline, PROMPT)).backward()
    for name, rows in own.items():
        assert float(rows.grad.abs().max()) > 1e-3
        table = getattr(pipeline, name).get_input_embeddings().weight
        torch.testing.assert_close(rows.grad, table.grad[-2:], rtol=1e-4, atol=1e-5)
    for encoder in model.conditioner.text_encoders().values():
        base = sum(p.numel() for p in encoder.parameters())
        assert base == sum(p.numel() for p in type(encoder)(encoder.config).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_begins_as_its_word_and_the_base_is_left_as_it_was(
    folders: dict[str, Path], family: str
) -> None:
    base = sfumato.load(folders[family])
    start = learning(folders[family]).pipeline
    moved = learning(folders[family], spread=0.3).pipeline
    asked = {"seed": 3, "steps": STEPS}
    word = base.sample(1, prompt=PROMPT.replace("<sks>", "q"), **asked)
    assert float((start.sample(1, prompt=PROMPT, **asked) - word).abs().max()) < 1e-5
    assert float((moved.sample(1, prompt=PROMPT, **asked) - word).abs().max()) > 1e-3
    with without_adapters(moved.model):
        assert float((moved.sample(1, prompt=PROMPT, **asked) - word).abs().max()) < 1e-5
    plain = base.sample(1, prompt="a cat", **asked)
    assert torch.equal(moved.sample(1, prompt="a cat", **asked), plain)
    # the pieces of <sks> mean something else to a model that does not know the token
    assert float((base.sample(1, prompt=PROMPT, **asked) - word).abs().max()) > 1e-3


@pytest.mark.parametrize(("family", "vectors"), [("sd", 1), ("sd", 3), ("sdxl", 2)])
def test_images_are_those_of_diffusers_with_the_same_vectors(
    folders: dict[str, Path], family: str, vectors: int
) -> None:
    trained = learning(folders[family], vectors=vectors, spread=0.2)
    ours = trained.pipeline.model.conditioner({"text": [PROMPT]}, 1).map(torch.Tensor.detach)
    slots = [s.detach() for s in encoded(with_rows(folders[family], rows_of(trained)), PROMPT)]
    assert float((ours.tokens - slots[0]).abs().max()) < 1e-5
    if len(slots) > 1:
        pooled, resizing = ours.vector.split([slots[1].shape[1], 4], dim=1)
        assert float((pooled - slots[1]).abs().max()) < 1e-5
        assert not resizing.any()
    other = with_rows(folders[family], {n: r * 0 for n, r in rows_of(trained).items()})
    assert float((ours.tokens - encoded(other, PROMPT)[0].detach()).abs().max()) > 1e-2


def test_a_word_of_several_pieces_gives_one_to_each_vector_in_turn(
    folders: dict[str, Path],
) -> None:
    trained = learning(folders["sd"], vectors=4, word="cat")
    pipeline = theirs(folders["sd"])
    numbers = pipeline.tokenizer("cat", add_special_tokens=False).input_ids
    table = pipeline.text_encoder.get_input_embeddings().weight
    expected = table[[*numbers, numbers[0]]]
    assert torch.equal(rows_of(trained)["text_encoder"], expected)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"token": "two words"}, "one new word"),
        ({"token": "q</w>"}, "is a token that the model knows"),
        ({"word": "cat"}, "'cat' is 3 pieces to the tokenizer"),
        ({"word": " "}, "one new word"),
        ({"vectors": 76}, "76 vectors for a token, and texts have 75 tokens at most"),
    ],
)
def test_tokens_that_cannot_be_learned_are_refused(
    folders: dict[str, Path], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        learning(folders["sd"], **settings)


def test_encoders_of_other_kinds_are_refused(tmp_path: Path) -> None:
    folder = pixart(tmp_path / "pixart")
    with pytest.raises(ConfigError, match="PixArtSigmaPipeline cannot learn new tokens"):
        learning(folder)


def test_a_long_token_counts_as_its_vectors(folders: dict[str, Path]) -> None:
    text = trained_text(learning(folders["sd"], vectors=4))
    assert not text.is_truncated("<sks> " + "a" * 71)
    assert text.is_truncated("<sks> " + "a" * 72)
    assert not text.reads_learned("a" * 75 + " <sks>")


def trained_text(trained: TrainedModel) -> Any:
    return trained.pipeline.model.conditioner.parts["text"]


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], uncaptioned: Path, tmp_path_factory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    result = cli("finetune", folders["sd"], uncaptioned, *TUNED, "--run", path)
    assert result.code == 0, result.err
    assert "textual inversion: a vector for <sks>, which begin as 'q'" in result.err
    # one image at each level has no interval
    report = (path / "finetuning" / "report.json").read_text()
    assert json.loads(report)["levels"][0]["gain_low"] is None
    assert "no preservation, since nothing that the base knows can change" in result.err
    return path


def test_checkpoints_hold_the_rows_alone_and_images_change(
    run: Path, folders: dict[str, Path]
) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    for name in ("model", "ema"):
        tensors = load_file(newest / f"{name}.safetensors")
        assert list(tensors) == ["conditioner.parts.text.learned.rows.text_encoder"]
    tuned, base = sfumato.load(run), sfumato.load(folders["sd"])
    asked = {"seed": 1, "steps": STEPS}
    before = base.sample(1, prompt="a photo of q", **asked)
    assert float((tuned.sample(1, prompt="a photo of <sks>", **asked) - before).abs().max()) > 1e-4


def test_a_stopped_run_goes_on_bit_for_bit(
    run: Path, folders: dict[str, Path], uncaptioned: Path, tmp_path: Path, monkeypatch
) -> None:
    proposed = choose_finetuning(folders["sd"], str(uncaptioned), TUNED).run
    plain = configuration.with_overrides(
        configuration.plain(proposed), (*TUNED, "checkpoint.every_steps=2")
    )
    settings = configuration.parse(Run, plain)
    first = interrupted(settings, tmp_path / "first", monkeypatch, after=3)
    assert fingerprint(sfumato.resume(first)) == fingerprint(run)


def test_another_base_is_refused(run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """A text encoder that differs is another base, even where the network is the same."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    moved = shutil.copytree(folders["sd"], tmp_path / "base")
    text = (copy / "config.yaml").read_text().replace(str(folders["sd"]), str(moved))
    (copy / "config.yaml").write_text(text)
    same = sfumato.load(copy)
    assert same.reads == ("text",)
    file = moved / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("fc1.weight"))
    save_file({**tensors, name: tensors[name] * 1.01}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="are not those that this run was trained with"):
        sfumato.load(copy)


def test_captions_without_the_token_are_refused_before_work(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    images = photos(tmp_path / "photos")
    result = cli("finetune", folders["sd"], images, *SHORT, *ADAPTER, "--run", tmp_path / "run")
    assert result.code == 2
    assert "have a caption without <sks>" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("family", "vectors"), [("sd", 1), ("sdxl", 2)])
def test_an_exported_embedding_gives_the_same_images_in_diffusers(
    folders: dict[str, Path], tmp_path: Path, family: str, vectors: int
) -> None:
    trained = learning(folders[family], vectors=vectors, spread=0.2)
    file = tmp_path / "embedding.safetensors"
    lines = write_embedding(trained, file, torch.float32)
    assert f"({vectors}, 32)" in lines[0]
    assert "differs from the run's by at most 0.0e+00" in lines[1]
    tensors = load_file(file)
    assert list(tensors) == (["<sks>"] if family == "sd" else ["clip_g", "clip_l"])
    pipeline = theirs(folders[family])
    if family == "sd":
        pipeline.load_textual_inversion(str(file))
    else:
        for name, number in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                tensors[name], token="<sks>",
                text_encoder=getattr(pipeline, f"text_encoder{number}"),
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
            )  # fmt: skip
    ours = trained.pipeline.sample(1, prompt=PROMPT, seed=5, steps=STEPS, guidance=5.0)
    image = pipeline(
        PROMPT, latents=KeyedNoise(5)(torch.empty(1, 4, 16, 16)), num_inference_steps=STEPS,
        output_type="pt", guidance_scale=5.0, height=32, width=32,
    ).images  # fmt: skip
    assert float((ours - image).abs().max()) < 1e-5


def test_the_command_writes_the_embedding_and_refuses_what_would_lose_it(
    run: Path, folders: dict[str, Path]
) -> None:
    result = cli("export", run, "--format", "embedding")
    assert result.code == 0, result.err
    (file,) = (run / "exports").glob("embedding-*.safetensors")
    tuned = sfumato.load(run)
    rows = tuned.model.conditioner.parts["text"].learned.rows["text_encoder"]
    assert torch.equal(load_file(file)["<sks>"], rows)
    assert "textual inversion" in file.with_suffix(".md").read_text()
    result = cli("export", run, "--format", "diffusers")
    assert result.code == 2
    assert "trained was textual inversion" in result.err
    assert "use bundle or embedding" in result.err
    asked = {"prompt": "a photo of <sks>", "seed": 1, "steps": STEPS}
    borrowed = with_embedding(sfumato.load(folders["sd"]), file)
    # the run holds its own copy of the autoencoder, with the statistics inside its weights
    assert float((borrowed.sample(1, **asked) - tuned.sample(1, **asked)).abs().max()) < 1e-5


def test_the_command_line_uses_an_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "my-dog.safetensors"
    save_file({"emb_params": rows}, file)
    asked = ("--prompt", "a my-dog", "--num", 1, "--steps", STEPS, "--seed", 2)
    found = []
    for name, more in (("with", ("--embedding", file)), ("without", ())):
        result = cli("sample", folders["sd"], *asked, *more, "--out", tmp_path / name)
        assert result.code == 0, result.err
        found.append(settings_of(tmp_path / name / "00000.png"))
    assert found[0]["embedding"]["file"] == "my-dog.safetensors"
    assert found[1]["embedding"] is None
    assert found[0]["request"] != found[1]["request"]
    images = [(tmp_path / name / "00000.png").read_bytes() for name in ("with", "without")]
    assert images[0] != images[1]


def test_embeddings_of_others_are_read_or_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    base = sfumato.load(folders["sd"])
    before = base.sample(1, prompt="a dog", steps=STEPS)
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "my-dog.safetensors"
    save_file({"emb_params": rows}, file)
    ours = with_embedding(base, file).model.conditioner({"text": ["a my-dog"]}, 1).tokens.detach()
    pipeline = with_rows(folders["sd"], {"text_encoder": rows}, token="my-dog")
    same = encoded(pipeline, "a my-dog")[0].detach()
    assert float((ours - same).abs().max()) < 1e-5
    assert torch.equal(base.sample(1, prompt="a dog", steps=STEPS), before)
    save_file({"emb_params": torch.zeros(1, 24)}, file)
    with pytest.raises(ConfigError, match="do not fit the text encoders"):
        with_embedding(base, file)
    save_file({"a": rows, "b": rows + 1}, file)
    with pytest.raises(CheckpointError, match="is not an embedding"):
        with_embedding(base, file)

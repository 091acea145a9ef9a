"""`sfumato data cache --encode`: latents and embeddings by part, of which a training makes none again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import sfumato
from sfumato.data import DataConfig, Folder
from sfumato.errors import ConfigError
from sfumato.recipes import Run, autoencoder_stage
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.runs.encoding_ahead import encode_part
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.preparation import open_data
from sfumato.training import latent_cache
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.runs import fingerprint
from tests.parity.test_finetune import SHORT, photos

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SETTINGS = (*SHORT, "data.augment.flip=horizontal")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ahead")
    stable_diffusion(root / "model")
    photos(root / "photos")
    return root


def settings(place: Path) -> Run:
    source = str(place / "photos")
    return choose_finetuning(place / "model", source, SETTINGS).resolved(SETTINGS).run


@pytest.mark.parametrize("order", [(3, 1, 2, 1), pytest.param((1, 2, 3), marks=pytest.mark.slow)])
def test_parts_in_any_order_leave_training_nothing_to_encode(
    order: tuple[int, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.conditioners.pipeline_encoder import PipelineTextEncoder

    monkeypatch.setattr(latent_cache, "CHUNK", 4)  # several chunks of few images
    monkeypatch.setattr("sfumato.runs.text_encoders.TEXTS_AT_ONCE", 5)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "alone"))
    alone = fingerprint(sfumato.train(settings(place), run=tmp_path / "run"))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "parts"))
    found = [encode_part(settings(place), number, 3) for number in order]
    whole = encode_part(settings(place), 1, 1)
    counts = dict(zip(order, found, strict=True))
    assert tuple(map(sum, zip(*counts.values(), strict=True))) == whole
    assert whole[0] >= 3
    assert whole[1] >= 32  # captions, the empty one, and the prompts of preservation
    encoded: list[object] = []
    monkeypatch.setattr(latent_cache, "_moments", lambda *_: encoded.append("an image"))
    real = PipelineTextEncoder._encode

    def encode(self: PipelineTextEncoder, texts: list[str], device: object) -> object:
        encoded.extend(texts)
        return real(self, texts, device)

    monkeypatch.setattr(PipelineTextEncoder, "_encode", encode)
    assert fingerprint(sfumato.train(settings(place), run=tmp_path / "again")) == alone
    assert encoded == []


def test_latents_without_room_are_refused_and_those_that_are_there_need_none(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    run = settings(place)
    run = replace(run, autoencoder=replace(run.autoencoder, statistics="measured"))
    batches, _ = encode_part(run, 1, 1)
    assert batches == 1
    monkeypatch.setattr(autoencoder_stage, "DISK_FRACTION", 0.0)
    monkeypatch.setattr(autoencoder_stage, "_measure_latents", None)  # its result is kept
    assert encode_part(run, 1, 1)[0] == 1
    dataset = open_data(run)
    copy = run.autoencoder._copy(tmp_path / "final", dataset)
    assert autoencoder_stage._have_room(copy, dataset, run.autoencoder.augmented_copies)
    shutil.rmtree(tmp_path / "cache" / "latents")
    with pytest.raises(ConfigError, match="need more than 0% of the free disk space"):
        encode_part(run, 1, 1)


def test_the_command_encodes_a_part(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    run = sfumato.train(settings(place), run=tmp_path / "run")
    result = cli("data", "cache", run, "--encode", "--part", "1/2")
    assert result.code == 0, result.err
    assert "part 1/2: 1 batches of images" in result.out
    refused = cli("data", "cache", run, "--encode", "--engine", "ray")
    assert refused.code == 2
    assert "--engine local" in refused.err


def test_what_cannot_be_encoded_ahead_is_refused(place: Path) -> None:
    data = DataConfig(source=Folder(str(place / "photos")))
    run = Run(name="own", autoencoder=TrainedAutoencoder(), data=data)
    with pytest.raises(ConfigError, match="the run trains its own autoencoder"):
        encode_part(run, 1, 2)
    with pytest.raises(ConfigError, match="nothing that is encoded would be kept"):
        encode_part(Run(name="off", data=DataConfig(cache="off")), 1, 2)
    assert encode_part(Run(name="pixels", data=data), 1, 2) == (0, 0)

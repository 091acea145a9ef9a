"""A network of which a half is frozen: only the rest is trained, averaged and saved in checkpoints;
the half is kept once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato import load
from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.config.bounds import Seed, Size
from sfumato.contexts import ContextConfig
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.diffusion_model import Model
from sfumato.networks import Backbone, NetworkConfig
from sfumato.recipes import Run
from sfumato.runs import prepare, resume, train
from sfumato.runs.training import build_trainer
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import (
    Budget,
    MuonConfig,
    OptimizerConfig,
    PostHocEMAConfig,
    PowerEMA,
    Trainer,
    ema,
)
from sfumato.training.parameters import count, describe, trainable
from sfumato.training.state import TrainingState
from sfumato.training.tasks.protocol import OptimizedPart
from tests.helpers.runs import fingerprint, images, tiny_run

FROZEN = {f"network.encoder.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
FEATURES = 32  # of the frozen half, which is all that the trained half sees of its size


class HalfFrozen(Backbone):
    """A frozen encoder, whose weights stand for pretrained ones, and a trained decoder."""

    def __init__(
        self, config: HalfFrozenConfig, *, image_channels: int, context: ContextSizes
    ) -> None:
        super().__init__(image_channels=image_channels, context=context)
        self.encoder = nn.Sequential(
            nn.Conv2d(image_channels, config.width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(config.width, FEATURES, 1),
        )
        self.steer = nn.Linear(1 + context.vector, FEATURES)
        self.hidden = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.decoder = nn.Conv2d(FEATURES, image_channels, 1)
        with torch.no_grad():
            for parameter in self.encoder.parameters():
                generator = torch.Generator().manual_seed(config.pretrained)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        (self if config.everything else self.encoder).requires_grad_(False)

    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        known = [] if condition.vector is None else [condition.vector]
        shift = self.steer(torch.cat([noise_input[:, None], *known], dim=1))
        h = self.encoder(x) + shift[:, :, None, None]
        return self.decoder(torch.relu(h + self.hidden(torch.relu(h))))


@dataclass(frozen=True, kw_only=True)
class HalfFrozenConfig(NetworkConfig):
    """Of the tests.

    Attributes:
        pretrained: which frozen weights.
        width: of the frozen half, inside.
        everything: whether the other half is frozen too.
    """

    pretrained: Seed = 0
    width: Size = 8
    everything: bool = False

    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> HalfFrozen:
        return HalfFrozen(self, image_channels=image_channels, context=context)


class Crash(BaseException):
    """The process is gone: nothing catches this."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def half_frozen(folder: Path, **changes) -> Run:
    return tiny_run(folder, **{"network": HalfFrozenConfig(), **changes})


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    return train(half_frozen(folder), run=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run, ended by force after eight of its fourteen steps."""
    real = Trainer.train_step

    def step(self, batch):
        if self.state.counters.step == 8:
            raise Crash
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        with pytest.raises(Crash):
            train(half_frozen(folder), run=tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return prepare(half_frozen(folder)).trainable_model()


def pretrained(which: int = 0) -> dict[str, Tensor]:
    network = HalfFrozenConfig(pretrained=which).build(image_channels=1)
    return {
        f"network.encoder.{name}": value for name, value in network.encoder.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def frozen_files(run: Path) -> list[Path]:
    return list(run.rglob("frozen-*"))


@pytest.mark.parametrize(
    "config",
    [OptimizerConfig(), OptimizerConfig(muon=MuonConfig()), OptimizerConfig(mup_base_width=16)],
)
def test_optimizers_hold_the_trainable_parameters_each_once(
    model: Model, config: OptimizerConfig
) -> None:
    optimizers = config.build(model)
    held = [
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(held) == sorted(
        id(p) for name, p in model.named_parameters() if name not in FROZEN
    )
    assert len(optimizers) == (2 if config.muon else 1)


def test_averages_share_the_frozen_tensors_and_follow_the_others(model: Model) -> None:
    profile = PowerEMA(0.2)
    state = TrainingState.new(
        model, lambda m: [OptimizedPart("model", m, OptimizerConfig())], [profile]
    )
    assert state.frozen == FROZEN
    before = {name: value.clone() for name, value in state.average.state_dict().items()}
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(1.0)
    averages = {
        state.average: state.pairs,
        state.tracked_averages[profile]: state.tracked_pairs[profile],
    }
    for average, pairs in averages.items():
        ema.update(pairs, profile, 2)
        found = dict(average.named_parameters())
        for name, parameter in model.named_parameters():
            assert (
                found[name].untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            ) == (name in FROZEN)
            assert torch.equal(found[name], before[name]) == (name in FROZEN), name
    assert same({name: model.state_dict()[name] for name in FROZEN}, pretrained())


def test_averages_take_over_buffers_such_as_a_batch_norm_s_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = TrainingState.new(model, lambda m: [OptimizedPart("model", m, OptimizerConfig())])
    model(torch.randn(8, 1, 4, 4) + 3)
    ema.update(state.pairs, PowerEMA(0.2), 5)
    assert model[1].num_batches_tracked == 1
    for kept, buffer in zip(state.average.buffers(), model.buffers(), strict=True):
        assert torch.equal(kept, buffer)
        assert kept.data_ptr() != buffer.data_ptr()


def test_checkpoints_hold_what_is_trained_and_nothing_frozen(whole: Path, folder: Path) -> None:
    names = {name for name, _ in prepare(half_frozen(folder)).model.named_parameters()} - FROZEN
    found = checkpoint.paths(whole / "checkpoints")
    assert len(found) == 2
    for path in found:
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        assert tensors.keys() == {"model", "ema", "optimizer"}
        assert tensors["model"].keys() == tensors["ema"].keys() == names
        assert {key.rpartition("/")[0] for key in tensors["optimizer"]} == names


def test_frozen_parameters_are_one_file_under_the_hash_of_what_it_holds(whole: Path) -> None:
    (file,) = frozen_files(whole)
    tensors = load_file(file)
    assert same(tensors, pretrained())
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(
            f"{name} torch.float32 {tuple(tensors[name].shape)}\n".encode()
            + tensors[name].numpy().tobytes()
        )
    assert file == whole / "checkpoints" / f"frozen-{hashed.hexdigest()}.safetensors"
    for path in checkpoint.paths(whole / "checkpoints"):
        assert json.loads((path / "state.json").read_text())["frozen"] == hashed.hexdigest()


def test_the_file_is_written_once_in_a_run_s_life(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = frozen_files(interrupted)
    real, seen = Trainer.train_step, [file.stat().st_ino]

    def step(self, batch):
        seen.append(file.stat().st_ino)  # another one where it was written again
        return real(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step)
    resume(interrupted)
    resume(interrupted, overrides=["budget.steps=16"])
    assert len(seen) > 8
    assert {*seen, file.stat().st_ino} == {seen[0]}
    assert frozen_files(interrupted) == [file]


def test_a_resumed_run_equals_the_uninterrupted_one(interrupted: Path, whole: Path) -> None:
    assert fingerprint(interrupted)["step"] != fingerprint(whole)["step"]
    assert fingerprint(resume(interrupted)) == fingerprint(whole)
    for weights in ("ema", "raw"):
        assert same(
            *(load(run, weights=weights).model.state_dict() for run in (interrupted, whole))
        )


def test_a_loaded_model_has_the_frozen_weights_of_its_run(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what they were made from has changed since."""
    before, own = load(whole), pretrained()
    real = HalfFrozenConfig.build
    monkeypatch.setattr(
        HalfFrozenConfig, "build", lambda self, **sizes: real(replace(self, pretrained=7), **sizes)
    )
    after = load(whole)
    assert same({name: after.model.state_dict()[name] for name in FROZEN}, own)
    assert not same(pretrained(), own)
    assert torch.equal(
        after.sample(2, category="odd", steps=3), before.sample(2, category="odd", steps=3)
    )
    assert not any(parameter.requires_grad for parameter in after.model.parameters())


def test_other_frozen_weights_are_refused_and_the_run_stays_as_it_is(
    interrupted: Path, whole: Path
) -> None:
    before = (interrupted / "config.yaml").read_text()
    with pytest.raises(
        CheckpointError, match="the 4 frozen parameters of the model are not those"
    ) as caught:
        resume(interrupted, overrides=["network.pretrained=1"])
    assert "pretrained weights" in caught.value.hint
    assert (interrupted / "config.yaml").read_text() == before
    assert fingerprint(resume(interrupted)) == fingerprint(whole)


def test_more_frozen_layers_than_before_are_refused(interrupted: Path) -> None:
    with pytest.raises(
        CheckpointError, match="the 10 frozen parameters of the model are not those"
    ):
        resume(interrupted, overrides=["network.everything=true"])


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_frozen_file_that_is_not_whole_is_named(interrupted: Path, damage: str) -> None:
    (file,) = frozen_files(interrupted)
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="frozen parameters") as caught:
        load(interrupted)
    assert caught.value.where == str(file)


def test_disk_space_counts_frozen_parameters_once(folder: Path, tmp_path: Path) -> None:
    post_hoc = PostHocEMAConfig(widths=(0.1, 0.2), num=3)

    def trainer(width: int) -> Trainer:
        run = half_frozen(
            folder,
            network=HalfFrozenConfig(width=width),
            post_hoc_ema=post_hoc,
            budget=Budget(steps=300),
        )
        return build_trainer(prepare(run), RunDirectory.create(tmp_path / str(width)))

    small, large = trainer(8), trainer(64)
    numbers = [count(one.state.frozen_tensors().values()) for one in (small, large)]
    assert numbers == [
        count(p for p in one.state.model.parameters() if not p.requires_grad)
        for one in (small, large)
    ]
    assert numbers[1] > numbers[0]
    assert large.saver.disk_bytes() - small.saver.disk_bytes() == 4 * (numbers[1] - numbers[0])
    for one in (small, large):
        one.saver.save_now()
        one.resume()
    assert large.saver.disk_bytes() == small.saver.disk_bytes()  # they are on the disk already


def test_what_is_printed_says_how_many_are_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(999, 1000), nn.Linear(999, 3000))
    assert describe(model) == "4.00M parameters"
    model[0].requires_grad_(False)
    assert describe(model) == "4.00M parameters, 3.00M of them trained"
    build_trainer(prepare(half_frozen(folder)), RunDirectory.create(tmp_path / "half"))
    assert "0.01M parameters, 0.01M of them trained" in " ".join(capsys.readouterr().err.split())
    build_trainer(prepare(tiny_run(folder)), RunDirectory.create(tmp_path / "none"))
    assert "of them trained" not in " ".join(capsys.readouterr().err.split())


def test_a_model_that_is_all_frozen_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all parameters of Linear are frozen"):
        OptimizerConfig().build(nn.Linear(2, 2).requires_grad_(False))
    run = half_frozen(
        folder, network=HalfFrozenConfig(everything=True), conditioner=ContextConfig()
    )
    with pytest.raises(ConfigError, match="all parameters of Model are frozen") as caught:
        train(run, run=tmp_path / "run")
    assert "requires_grad" in caught.value.hint


def test_what_steers_a_frozen_network_may_be_trained_alone(folder: Path, tmp_path: Path) -> None:
    run = half_frozen(folder, network=HalfFrozenConfig(everything=True), budget=Budget(steps=3))
    newest = checkpoint.paths(train(run, run=tmp_path / "run") / "checkpoints")[0]
    trained = load_file(newest / "model.safetensors")
    assert trained
    assert all(name.startswith("conditioner.") for name in trained)

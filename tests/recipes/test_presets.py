"""The preset follows from the data and the machine, says why, and gives way to whatever is set."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import config as configuration
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Folder, Listing
from sfumato.data.listing import Entry, Inline
from sfumato.data.sources import solids
from sfumato.diffusion import Linear, LogitNormal, Warped
from sfumato.errors import ConfigError, DataError
from sfumato.recipes.presets import Choice, choose
from sfumato.recipes.resolver import is_preset, resolve
from sfumato.runs.preparation import build_model


def photo(width: int = 64, height: int = 64, *, mode: str = "RGB") -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def listing(
    count: int, *, image: bytes | None = None, categories: int = 0, captions: float = 0.0
) -> Listing:
    """`count` images, dealt out to the categories in turn, the first share of them with a
    caption.
    """
    blob = Inline(photo() if image is None else image)
    return Listing(
        entries=[
            Entry(
                name=f"{number}.png", image=blob,
                category=f"kind-{number % categories}" if categories else None,
                captions=(f"some words on {number}",) if number < captions * count else (),
            )
            for number in range(count)
        ]
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A folder that the listing may be said to come from."""
    (tmp_path / "my images").mkdir()
    (tmp_path / "my images" / "1.png").write_bytes(photo())
    return str(tmp_path / "my images")


@pytest.fixture(params=["cpu", "gpu"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    on(monkeypatch, request.param)
    return request.param


def on(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine == "gpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imagined 9000")


def said(choice: Choice) -> str:
    return "\n".join(choice.reasons)


# --- how large ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "gpu"), [(10, 96), (2_000, 96), (5_000, 128), (100_000, 128)])
def test_larger_sets_and_machines_get_larger_networks(
    place: str, count: int, gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU gets a narrow one and Muon, whatever the set: in an hour, that is what pays."""
    for machine, width in (("cpu", 32), ("gpu", gpu)):
        on(monkeypatch, machine)
        choice = choose(place, listing(count))
        assert choice.run.network.channels == width
        assert (choice.run.optimizer.muon is not None) == (machine == "cpu")
        assert choice.reasons[0].startswith(f"{count} images on ")
        assert f"U-Net of {width} channels" in choice.reasons[0]


def test_the_reason_names_the_machine(place: str, machine: str) -> None:
    assert ("Imagined 9000" if machine == "gpu" else "CPU cores") in choose(
        place, listing(10)
    ).reasons[0]


@pytest.mark.parametrize("count", [10, 1_000, 4_999])
def test_small_sets_are_augmented_and_dropped_out(place: str, machine: str, count: int) -> None:
    choice = choose(place, listing(count))
    assert choice.run.data.augment.karras == 0.12
    assert choice.run.network.dropout == 0.1
    assert "hold off memorizing" in said(choice)


@pytest.mark.parametrize("count", [5_000, 100_000])
def test_large_sets_are_not(place: str, machine: str, count: int) -> None:
    choice = choose(place, listing(count))
    assert choice.run.data.augment.is_off
    assert choice.run.network.dropout == 0
    assert "memorizing" not in said(choice)


@pytest.mark.parametrize(
    ("side", "cpu", "gpu"),
    [(5, 8, 8), (8, 8, 8), (15, 8, 8), (31, 24, 24), (32, 32, 32), (64, 32, 64), (900, 32, 64)],
)
def test_the_resolution_is_the_images_up_to_what_the_machine_trains(
    place: str, side: int, cpu: int, gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine, resolution in (("cpu", cpu), ("gpu", gpu)):
        on(monkeypatch, machine)
        choice = choose(place, listing(3, image=photo(2 * side, side)))
        assert choice.run.data.resolution == resolution
        assert f"{resolution} px" in said(choice)
        assert f"shorter sides are {side} px" in said(choice)
        why = (
            "what this machine trains in reasonable time" if side > resolution and side > 64 else ""
        )
        assert why in said(choice)


@pytest.mark.parametrize(
    ("resolution", "factor"),
    [(64, 1), (95, 1), (96, 8), (97, 1), (98, 1), (100, 4), (128, 8), (200, 8), (256, 8), (512, 8)],
)
def test_large_images_are_diffused_in_latents(
    place: str, machine: str, resolution: int, factor: int
) -> None:
    choice = choose(place, listing(10, categories=2), resolution=resolution)
    run = choice.run
    assert run.data.resolution == resolution
    assert run.autoencoder.latent_shape(3, None).factor == factor
    assert ("of an autoencoder of its own" in said(choice)) == (factor > 1)
    channels, side = run.autoencoder.latent_shape(3, None).channels, resolution // factor
    info = ConditioningInfo(
        channels=3, categories=("a", "b"), augmentation=run.data.augment.labels, factor=factor
    )
    with torch.device("meta"):
        model = build_model(run, info)
        shape = (2, channels, side, side)
        assert (
            model.network(torch.empty(shape), torch.empty(2), model.conditioner.null(2)).shape
            == shape
        )


@pytest.mark.parametrize(
    ("side", "factor"),
    [
        (16, 1.0),
        (32, 1.0),
        (64, (3 * 64 * 64 / 4096) ** 0.5),
        (128, 1.0),
        (256, (16 * 32 * 32 / 4096) ** 0.5),
    ],
)
def test_many_values_are_given_more_noise(place: str, side: int, factor: float) -> None:
    """Of pixels, or of latents; in training and in sampling alike."""
    choice = choose(place, listing(60, image=photo(side, side)), resolution=side)
    t = torch.tensor([0.3], dtype=torch.float64)
    plain, trained, sampled = (
        Linear()(t),
        choice.run.objective.schedule(t),
        choice.run.sampling.schedule(t),
    )
    middle = Warped(schedule=Linear(), warp=LogitNormal())(t)
    for found, unshifted in ((sampled, plain), (trained, middle)):
        moved = (unshifted.logsnr() - found.logsnr()) / 2
        assert float(moved) == pytest.approx(np.log(factor), abs=0.01)
    assert any("timestep shift" in reason for reason in choice.reasons) == (factor > 1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of four images of 40 pixels."""
    folder = tmp_path / "small"
    (folder / "a").mkdir(parents=True)
    for number in range(4):
        (folder / "a" / f"{number}.png").write_bytes(photo(40 + number, 40))
    return folder


def test_a_resolution_that_is_asked_for_decides_on_latents(small: Path, tmp_path: Path) -> None:
    settings = resolve(str(small), ["data.resolution=128"])
    assert settings.autoencoder.latent_shape(3, None).factor == 8
    assert (
        resolve(str(small), {"data": {"resolution": 64}}).autoencoder.latent_shape(3, None).factor
        == 1
    )
    (tmp_path / "mine.yaml").write_text(
        f"recipe: {small}\ndata: {{resolution: 128}}\nbatch_size: 5\n"
    )
    written = resolve(tmp_path / "mine.yaml")
    assert replace(written, batch_size=settings.batch_size) == settings
    asked = resolve(tmp_path / "mine.yaml", ["data.resolution=64"])
    assert replace(asked, batch_size=settings.batch_size) == resolve(
        str(small), ["data.resolution=64"]
    )


@pytest.mark.parametrize(
    ("settings", "factor", "values"),
    [
        (["autoencoder.kind=pixels"], 1, 3 * 128 * 128),
        (["autoencoder.network.latent_channels=4"], 8, 4 * 16 * 16),
        (
            ["autoencoder.network.channels=[16,32,64]", "autoencoder.network.latent_channels=16"],
            4,
            16 * 32 * 32,
        ),
    ],
)
def test_an_autoencoder_that_is_asked_for_decides_how_much_noise_and_how_deep(
    small: Path, settings: list[str], factor: int, values: int
) -> None:
    run = resolve(str(small), ["data.resolution=128", *settings])
    assert run.autoencoder.latent_shape(3, None).factor == factor
    t = torch.tensor([0.3], dtype=torch.float64)
    moved = (Linear()(t).logsnr() - run.sampling.schedule(t).logsnr()) / 2
    assert float(moved) == pytest.approx(np.log(max(1, values / 4096) ** 0.5), abs=0.01)
    assert 128 // factor // 2 ** (len(run.network.multipliers) - 1) >= 4


@pytest.mark.parametrize("name", ["digits", "solids"])
def test_built_in_sets_are_trained_on_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe of that name, or by what is chosen for them; a few solids stand for all, which
    take minutes to render.
    """
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    render = solids._write
    monkeypatch.setattr(solids, "_write", lambda file, count, size: render(file, count=60, size=8))
    run = resolve(name)
    assert type(run.data.source).__name__ == name.capitalize()
    assert is_preset(name) == (name == "solids")


@pytest.mark.parametrize("side", range(8, 72, 8))
def test_a_network_is_built_that_fits_the_resolution(place: str, machine: str, side: int) -> None:
    run = choose(place, listing(10, image=photo(side, side), categories=2)).run
    assert run.data.resolution % 2 ** (len(run.network.multipliers) - 1) == 0
    shape = (2, 3, run.data.resolution, run.data.resolution)
    with torch.device("meta"):  # shapes only
        model = build_model(
            run,
            ConditioningInfo(
                channels=run.data.channels,
                categories=("a", "b"),
                words=("a",),
                augmentation=run.data.augment.labels,
            ),
        )
        assert (
            model.network(torch.empty(shape), torch.empty(2), model.conditioner.null(2)).shape
            == shape
        )


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("RGB", 3), ("L", 1), ("1", 1), ("LA", 1), ("RGBA", 3), ("P", 3), ("I;16", 1)],
)
def test_gray_sets_have_one_channel(place: str, mode: str, channels: int) -> None:
    image = photo(mode=mode) if mode != "I;16" else sixteen_bits()
    choice = choose(place, listing(4, image=image))
    assert choice.run.data.channels == channels
    assert (
        f"{channels} channel(s): "
        f"{'all sampled images are gray' if channels == 1 else 'the images are in colour'}"
        in said(choice)
    )


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (40, 40), dtype=np.uint16)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


# --- what it is steered by ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 1_000, 100_000])
def test_without_categories_it_is_unconditional_and_says_so(place: str, count: int) -> None:
    choice = choose(place, listing(count))
    assert choice.run.conditioner.names == ()
    assert choice.run.sampling.guidance == 1
    assert "no categories" in said(choice)


@pytest.mark.parametrize(("count", "categories"), [(10, 2), (1_000, 10), (100_000, 1_000)])
def test_with_categories_it_is_steered_by_them(place: str, count: int, categories: int) -> None:
    choice = choose(place, listing(count, categories=categories))
    assert choice.run.conditioner is not None
    assert choice.run.sampling.guidance > 1
    assert (
        f"steered by {categories} categories, from {count // categories} to "
        f"{count // categories} images each" in said(choice)
    )


@pytest.mark.parametrize(("count", "categories"), [(10, 3), (100_000, 1_001), (10, 1)])
def test_too_many_categories_or_a_single_one_are_left_aside(
    place: str, count: int, categories: int
) -> None:
    choice = choose(place, listing(count, categories=categories))
    assert choice.run.conditioner.names == ()
    assert ("too many" if categories > 1 else "no categories") in said(choice)


def test_captions_are_mentioned_whether_they_are_read_or_not(place: str) -> None:
    assert "90% of the images (9 of 10) have captions: steered by text" in said(
        choose(place, listing(10, captions=0.9))
    )
    assert "10% of the images (1 of 10) have captions: the text is not used" in said(
        choose(place, listing(10, captions=0.1))
    )
    assert "captions" not in said(choose(place, listing(10)))


# --- odd sources ----------------------------------------------------------------------------------


def test_images_that_cannot_be_looked_at_leave_a_preset_all_the_same(place: str) -> None:
    choice = choose(place, listing(5, image=b"damaged"))
    assert "no image could be read" in said(choice)
    assert choice.run.data.resolution == (64 if torch.cuda.is_available() else 32)


def test_no_more_than_a_few_hundred_images_are_opened(place: str) -> None:
    opened: list[int] = []

    class Counted:
        def read(self) -> bytes:
            opened.append(1)
            return image

    image = photo()
    entries = [Entry(name=f"{number}.png", image=Counted()) for number in range(10_000)]
    choose(place, Listing(entries=entries))
    assert 100 <= len(opened) < 401


def test_a_source_that_is_none_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, folder or built-in set"):
        choose(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no images"):
        choose(str(tmp_path))


def test_the_run_is_called_after_the_folder(place: str) -> None:
    assert choose(place).run.name == "my images"
    assert choose(place + "/").run.name == "my images"
    assert choose(place).run.data.source == Folder(place)


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "network.channels=128",
        "data.resolution=16",
        "data.channels=1",
        "batch_size=7",
        "budget.minutes=3",
        "data.augment.karras=0",
    ],
)
def test_what_is_set_wins_over_what_is_chosen(place: str, override: str) -> None:
    key, _, value = override.partition("=")
    changed = configuration.plain(resolve(place, [override]))
    chosen = configuration.plain(resolve(place))
    for part in key.split(".")[:-1]:
        changed, chosen = changed[part], chosen[part]
    last = key.rpartition(".")[2]
    assert changed.pop(last) == float(value) != chosen.pop(last)
    assert changed == chosen


def test_overrides_may_be_a_mapping_and_a_wrong_key_names_the_nearest(place: str) -> None:
    assert resolve(place, {"batch_size": 9}).batch_size == 9
    with pytest.raises(ConfigError, match=r"did you mean `network\.channels`"):
        resolve(place, ["network.chanels=48"])


def test_the_same_data_and_machine_give_the_same_preset(place: str, machine: str) -> None:
    made = listing(50, categories=3)
    assert choose(place, made) == choose(place, made)

"""From a name, a YAML file, a folder of images or a run directory to a configuration."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.data import Listing, Source, files, listed, sampled, source_at
from sfumato.data.frames import expand_frames
from sfumato.data.missing_labels import fill_missing
from sfumato.data.pixel_format import MAX_BANDS
from sfumato.data.sources.detect import BUILT_IN
from sfumato.errors import ConfigError
from sfumato.foreign_models import refuse_diffusers
from sfumato.recipes.budget_overrides import replace_limits
from sfumato.recipes.builtin import RECIPES, recipe
from sfumato.recipes.presets import Choice, choose
from sfumato.recipes.run import Run
from sfumato.recipes.run_config import read_run_config

SETTLED: dict[str, Container[int]] = {"channels": range(1, MAX_BANDS + 1), "bits": (8, 16)}
Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A configuration and how it came about.

    Attributes:
        notes: a line for each limit of the source that a limit among the overrides replaced.
        choice: what was chosen for a source of images, with the reasons; None for a recipe, a YAML
            file or a run.
        listed: a source that was listed already, and listing: what it holds.
    """

    run: Run
    notes: tuple[str, ...] = ()
    choice: Choice | None = None
    listed: Source | None = None
    listing: Listing | None = None

    @property
    def reasons(self) -> list[str]:
        """Why a preset is as it is; [] if the configuration is not a preset."""
        return (
            [] if self.choice is None else [f"chosen: {reason}" for reason in self.choice.reasons]
        )

    def listing_of(self, run: Run) -> Listing | None:
        """Return the listing of a run's source, if that source was already listed."""
        return self.listing if run.data.source == self.listed else None


def resolve(source: str | Path | Run, overrides: Overrides = ()) -> Run:
    """Return the configuration of a recipe, a YAML file, a folder of images or a run directory.

    Raises:
        ConfigError, DataError: naming the key, file or folder that is wrong.
    """
    return resolve_config(source, overrides).run


def resolve_config(source: str | Path | Run, overrides: Overrides = ()) -> ResolvedConfig:
    """Resolve a configuration, and say how it came about; a source of images is listed once.

    Raises:
        ConfigError, DataError: see `resolve`.
    """
    settings = configuration.with_overrides({}, overrides)
    if not isinstance(source, Run):
        refuse_diffusers(Path(source))
    listing = _listed(source, settings) if is_preset(source) and _is_source(source) else None
    choice = None if listing is None else _choose_preset(source, settings, listing)
    base, where = (
        (configuration.plain(choice.run), str(source)) if choice else _plain(source, settings)
    )
    base, notes = replace_limits(base, settings)
    run = configuration.parse(Run, configuration.with_overrides(base, overrides), where=where)
    return ResolvedConfig(
        run=run,
        notes=tuple(notes),
        choice=choice,
        listed=None if choice is None else choice.run.data.source,
        listing=listing,
    )


def is_preset(source: str | Path | Run) -> bool:
    """Return whether the configuration is chosen from the data.

    This is so if `source` is images, and no recipe, run or YAML file.
    """
    if (
        isinstance(source, Run)
        or str(source) in RECIPES
        or Path(source).suffix in (".yaml", ".yml")
    ):
        return False
    return not (Path(source) / "config.yaml").is_file()


def _is_source(source: str | Path | Run) -> bool:
    return files.exists(str(source)) or str(source).startswith("hub:") or str(source) in BUILT_IN


def _plain(
    source: str | Path | Run, settings: Mapping[str, Any], above: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str]:
    """Return the configuration of `source` as plain data, and where it is written.

    If it is images, some of the given settings decide about other settings too.

    Args:
        above: the YAML files that name this one as their recipe.
    """
    if isinstance(source, Run):
        return configuration.plain(source), source.name
    path = Path(source)
    refuse_diffusers(path)
    if (path / "config.yaml").is_file():
        return read_run_config(path), str(path / "config.yaml")
    if str(source) in RECIPES:
        return configuration.plain(recipe(str(source))), str(source)
    if path.suffix in (".yaml", ".yml"):
        here = str(path.resolve())
        if here in above:
            raise ConfigError(
                "is its own recipe",
                where=str(path),
                hint="name another recipe: `sfumato recipes` lists them",
            )
        data = configuration.load_yaml_file(path)
        name = data.pop("recipe", None)
        below = (
            {}
            if name is None
            else _plain(str(name), configuration.merge(data, settings), (*above, here))[0]
        )
        return configuration.merge(replace_limits(below, data)[0], data), str(path)
    if _is_source(source):
        return configuration.plain(
            _choose_preset(source, settings, _listed(source, settings)).run
        ), str(source)
    return configuration.plain(recipe(str(source))), str(source)


def _listed(source: str | Path | Run, settings: Mapping[str, Any]) -> Listing:
    """List a source; as it was listed before, unless settings of the data forbid it."""
    data = settings.get("data")
    data = data if isinstance(data, Mapping) else {}
    trusts = data.get("cache") != "off" and data.get("verify") != "always"
    return listed(source_at(str(source)), trusts=trusts)


def preset(place: str, overrides: Overrides, listing: Listing) -> Run:
    """Return the configuration chosen for a listed source, with the overrides applied."""
    settings = configuration.with_overrides({}, overrides)
    base = configuration.plain(_choose_preset(place, settings, listing).run)
    return configuration.parse(Run, configuration.with_overrides(base, overrides), where=place)


def _choose_preset(
    source: str | Path | Run, settings: Mapping[str, Any], listing: Listing
) -> Choice:
    """Choose the preset of a source.

    Settings of its images, or of an autoencoder, decide about other settings too.
    """
    data: Any = settings.get("data")
    data = data if isinstance(data, dict) else {}
    known: dict[str, Any] = {
        name: data[name]
        for name, legal in SETTLED.items()
        if isinstance(data.get(name), int) and data[name] in legal
    }
    caption, category = data.get("caption"), data.get("category")
    listing = fill_missing(
        listing,
        caption=caption if isinstance(caption, str) else None,
        category=category if isinstance(category, str | int) else None,
    )
    if data.get("frames") in ("all", "max"):
        listing = expand_frames(listing, data["frames"])
    if data.get("wait") != "ready" and isinstance(limit := data.get("limit"), int):
        listing = sampled(listing, limit)
    chosen = partial(choose, str(source), listing, resolution=_sides(data), **known)
    if "autoencoder" not in settings:
        return chosen()
    plain = configuration.merge(
        configuration.plain(chosen().run), {"autoencoder": settings["autoencoder"]}
    )
    return chosen(space=configuration.parse(Run, plain, where=str(source)).autoencoder)


def _sides(data: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width, if they are set to possible values.

    Impossible ones are refused when the whole configuration is read.
    """
    resolution, size = data.get("resolution"), data.get("size")
    match size if isinstance(size, list | tuple) else [resolution, resolution]:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None

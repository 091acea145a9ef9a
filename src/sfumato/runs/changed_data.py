"""A run that goes on: what its weights were trained to mean stays as it was, also with changed data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from sfumato import config as configuration
from sfumato.conditioners import ConditioningInfo
from sfumato.contexts import CONTEXTS
from sfumato.data import Dataset
from sfumato.data.holdout import place_of
from sfumato.errors import CheckpointError, ConfigError, DataError
from sfumato.observability.progress import console
from sfumato.recipes.run import Run
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a run was trained with so far.

    Attributes:
        info: what its conditioner was built from.
        fingerprint: of its data.
        value_range: of these; see `ConditioningInfo`, which has that of the base in a fine-tuning.
        accepts_data: whether it goes on if these have changed.
    """

    info: ConditioningInfo
    fingerprint: str
    value_range: tuple[float, float] | None
    accepts_data: bool

    @classmethod
    def of(cls, directory: RunDirectory, *, accepts_data: bool) -> Continued | None:
        """Read what the newest checkpoint of a run says; None if none can be read, which restoring
        the run will refuse.
        """
        for path in checkpoint.paths(directory.checkpoints):
            with suppress(CheckpointError, ConfigError):
                state = checkpoint.state_of(path)
                info = configuration.parse(ConditioningInfo, state.get("facts"), where=str(path))
                record, found = directory.data_record(), info.value_range
                if record.get("fingerprint") == state.get("data"):
                    found = record.get("value_range", found)
                return cls(
                    info=info,
                    fingerprint=str(state.get("data")),
                    value_range=None if found is None else (float(found[0]), float(found[1])),
                    accepts_data=accepts_data,
                )
        return None

    def adjusted(
        self, run: Run, dataset: Dataset, open_: Callable[[Run], Dataset]
    ) -> tuple[Run, Dataset]:
        """Return a run and its changed data with the numbers of categories and the range of values
        that it began with.

        Args:
            dataset: as the configuration of the run says.
            open_: indexes the data of a configuration.
        Raises:
            DataError: if the values of the images are others than the run began with.
        """
        if not self.accepts_data or dataset.fingerprint == self.fingerprint:
            return run, dataset
        data, before, now = run.data, self.value_range, dataset.scale.range
        if now != before and data.range == "auto":
            if before is None or now is None:
                raise DataError(
                    "the numbers in the images are of another kind: black and white were "
                    f"{_limits(before)} when the run began, and are {_limits(now)}",
                    where=place_of(data.source),
                    hint="set data.range=[BLACK, WHITE], or train a new run",
                )
            data = replace(data, range=before)
        if "category" in run.conditioner.names and dataset.categories != self.info.categories:
            data = replace(data, categories=self.info.categories)
        if data == run.data:
            return run, dataset
        run = replace(run, data=data)
        return run, open_(run)

    def carried(self, run: Run, dataset: Dataset, now: ConditioningInfo) -> ConditioningInfo:
        """Return what the conditioner of the run must know: of the data as they are, and for its
        weights what it was built from.

        Args:
            dataset: as `adjusted` returns it.
            now: what follows from it.
        Raises:
            DataError: if the weights do not fit changed data.
        """
        try:
            result = carried_info(run, self.info, now)
        except DataError:
            if self.accepts_data:
                raise
            return now  # with which restoring the run will be refused
        if new := sorted(set(now.words) - set(result.words)):
            console().print(
                f"{len(new)} words of the captions, such as {new[0]}, are new to the model, which "
                "spells them",
                markup=False,
            )
        return result


def _limits(value_range: tuple[float, float] | None) -> str:
    return (
        "the ends of their type"
        if value_range is None
        else f"{value_range[0]:g} and {value_range[1]:g}"
    )


def carried_info(run: Run, before: ConditioningInfo, now: ConditioningInfo) -> ConditioningInfo:
    """Return what a conditioner must know that goes on with changed data.

    Args:
        before: what it was built from.
        now: the same of the changed data.
    Raises:
        DataError: if its weights do not fit the changed data.
    """
    for name in run.conditioner.names:
        now = CONTEXTS[name].carried(getattr(run.conditioner, name), before, now)
    return replace(now, more={**now.more, **before.more}, added_categories=before.added_categories)

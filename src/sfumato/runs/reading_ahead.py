"""`data.wait=ready`: training begins with a sample of the images, and goes on with more as soon as
another process has read them.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from sfumato.data import Dataset, Listing, is_indexed, listed
from sfumato.distributed import current
from sfumato.errors import ConfigError, redact_secrets
from sfumato.observability.progress import console
from sfumato.platform import die_with_parent
from sfumato.process import signals
from sfumato.process.signals import Interrupted
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.recipes.run import Run
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Trainer

FIRST, TIMES = 10_000, 4  # images to begin with, and how many times as many come next
LOG = "reading.log"
NICENESS = 10  # training comes first
STOP_S, POLL_S = 30.0, 1.0  # that reading has to end; of waiting for it


def with_first_sample(run: Run, listing: Listing | None) -> Run:
    """Return a new run as it begins: with a sample of its images, if it does not wait for all.

    Args:
        listing: of its source, if it was made already.
    Raises:
        ConfigError: if the run cannot go on with more images.
    """
    if run.data.wait == "all":
        return run
    for key, obstacle in _obstacles(run):
        raise ConfigError(
            f"data.wait=ready cannot be used where {obstacle}",
            where=key,
            hint="use data.wait=all; `sfumato data cache` reads images ahead of training",
        )
    if run.data.limit or is_indexed(run.data, annotations=run.conditioner.names):
        return run
    found = listing or listed(run.data.source, trusts=run.data.verify == "auto")
    if len(found.entries) <= 2 * FIRST:
        return run
    console().print(
        f"data.wait=ready: training begins with {FIRST:,} of {len(found.entries):,} images, an even "
        f"sample, and goes on with {TIMES} times as many whenever these are read",
        markup=False,
    )
    return replace(run, data=replace(run.data, limit=FIRST))


def _obstacles(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the settings with which a run cannot go on with more images, and why."""
    if current().size > 1:
        yield "distributed", "several processes train together"
    if isinstance(run.autoencoder, TrainedAutoencoder):
        yield "autoencoder", "an autoencoder is trained first"
    if run.budget.epochs is not None:
        yield "budget.epochs", "the budget counts epochs, which grow with the images"
    if run.data.cache == "off":
        yield "data.cache", "decoded images are not kept"
    if run.conditioner.attributes is not None:
        yield (
            "conditioner.attributes",
            "attributes steer the model: their names and means are those of all images",
        )
    place = str(getattr(run.data.source, "path", ""))
    if redact_secrets(place) != place:
        yield "data.source", "the address has a secret, which a run does not store"


@dataclass
class ReadingAhead:
    """A process that reads more images than a run is trained with.

    Attributes:
        limit: how many it reads; 0 for all.
        process: None where all images are read.
        log: what it says.
    """

    limit: int = 0
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()
    _warned: bool = False

    @property
    def is_running(self) -> bool:
        """Whether it is reading."""
        return self.process is not None and self.process.poll() is None

    def is_done(self) -> bool:
        """Return whether it has read all that it was to read; warn, once, if it has failed."""
        code = None if self.process is None else self.process.poll()
        if code and not self._warned:
            self._warned = True
            console().print(f"warning: no more images could be read; see {self.log}", markup=False)
        return code == 0

    def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            Interrupted: if a signal has asked this process to stop.
        """
        while self.is_running:
            assert self.process is not None
            signals.poll()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(POLL_S)


@contextmanager
def reading_ahead(run: Run, dataset: Dataset, directory: RunDirectory) -> Iterator[ReadingAhead]:
    """Read more images of a run, if there are more, while the block trains it.

    The process is that of `sfumato data cache RUN`; what it says is in `reading.log`.

    Args:
        dataset: that the run is trained with.
    """
    count, beyond = len(dataset.entries), dataset.ledger.beyond
    if run.data.wait == "all" or not beyond:
        yield ReadingAhead()
        return
    for _, obstacle in _obstacles(run):
        console().print(f"no more images are read, since {obstacle}", markup=False)
        yield ReadingAhead()
        return
    more = TIMES * run.data.limit
    limit = more if 2 * more < count + beyond else 0
    place = str(directory.path)
    command = [sys.executable, "-m", "sfumato", "data", "cache", place, f"data.limit={limit}"]
    path = directory.path / LOG
    with path.open("ab") as log:
        # in a session of its own: what is typed at a terminal is for the training, which ends it
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if os.name == "posix" else None,
        )
    with suppress(OSError, AttributeError):  # it may have ended; other systems have no priorities
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    try:
        yield ReadingAhead(limit, process, path)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)  # what it has read is kept
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def train_while_reading(trainer: Trainer, directory: RunDirectory) -> int | None:
    """Train, while more images are read if the run wants more; return how many it is to go on with,
    0 for all; None at its end.
    """
    run, counters = cast(Run, trainer.config), trainer.state.counters
    with reading_ahead(run, trainer.dataset, directory) as ahead:
        ended = trainer.run(pauses=ahead.is_done)
        stopped = ended and counters.stopped and trainer.progress < 1  # by a verdict
        if stopped and ahead.is_running:
            console().print(
                f"stopped, as {counters.stopped}: the run goes on when more images are read",
                markup=False,
            )
            directory.write_status("running", counters.step)
            try:
                ahead.wait()
            except Interrupted as signal:
                signal.is_said = True
                console().print(
                    f"{signal}: `sfumato resume {directory.root}` goes on from there", markup=False
                )
                raise
            if not ahead.is_done():
                directory.write_status("finished", counters.step)
        return ahead.limit if ahead.is_done() and (not ended or stopped) else None


def free_memory() -> None:
    """Free what only cycles of references hold, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

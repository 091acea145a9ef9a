"""Looks at held-out images while a run trains, spaced by views, and the verdict that they give."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sfumato.distributed import current, seconds
from sfumato.generation.diffusion_model import Model
from sfumato.observability.metrics_file import MetricsFile, read_lines
from sfumato.storage import checkpoint
from sfumato.storage.atomic import write_text
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.base_comparison import BaseComparison
from sfumato.training.best_weights import keep_best, step_of
from sfumato.training.copy_search import CopySearch
from sfumato.training.evidence import Look
from sfumato.training.hooks import Hook, Session
from sfumato.training.monitors import LOOK_BINS, Validator
from sfumato.training.stopping import (
    FEWEST_HELD_OUT,
    HARMFUL,
    STOP_AT,
    State,
    StoppingVerdict,
    best,
    next_mark,
    verdict,
)

if TYPE_CHECKING:
    from sfumato.training.trainer import Trainer

# of the training time that looks may take, so that with the last one, which is never left out, they
# stay below 5 %; and seconds in any case
SHARE, FREE_S = 0.045, 10.0
# views from which copies are searched: at each doubling from the first, at the end from the second
MIN_VIEWS, MIN_LAST_VIEWS = 8.0, 2.0
MIN_LOOKS = 8  # however long they take
ERRORS_SHARE = 0.6  # of the time of looks, for errors; the rest is for samples, half of it the last
# ratio of held-out to training errors from which the model begins to memorize, and times the views
# after which that is surely seen: the looks that are left are spread over these
WATCHED, WATCHED_SPAN = 1.1, 4.0


class Looks(Hook):
    """Measures the averaged model at 1, 2, 4 and 8 views of each image, then at each 1.2 times more.

    Without a validator, nothing is held out: only copies, and the comparison with the base of a
    fine-tuning, can be measured. Looks are kept in looks.jsonl, the weights of the best one and the verdict in `best/`. A run
    that is resumed continues with the looks up to its checkpoint, and begins again with other data.
    """

    name = "looks"

    def __init__(
        self,
        validator: Validator | None,
        search: CopySearch,
        directory: RunDirectory,
        comparison: BaseComparison | None = None,
    ) -> None:
        self.validator, self.search, self.comparison = validator, search, comparison
        self.directory = directory
        self._looks: list[Look] | None = None
        self._state: State | None = None
        self._sample_s, self._fitted = 0.0, False
        self._before = 0  # looks at other data
        self._errors_s: list[float] = []  # of the looks of this process, without their samples

    def looks(self, trainer: Trainer) -> list[Look]:
        """Return the looks up to the step that the trainer has reached."""
        if self._looks is None:
            lines = current().on_first(partial(read_lines, self.directory.looks))
            step, begins = trainer.state.counters.step, trainer.plan.begins
            known = [Look.read(line) for line in lines if line["step"] <= step]
            self._looks = [look for look in known if look.begins == begins]
            self._before = len(known) - len(self._looks)
            self._state = verdict(self._looks).state if self._looks else None
        return self._looks

    def go_back(self, trainer: Trainer) -> None:
        """Read the looks again, up to the step that training has gone back to."""
        self._looks = None

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Return True when enough views have passed since the last look, and at the end."""
        counters, looks = trainer.state.counters, self.looks(trainer)
        if counters.step <= trainer.plan.begins or (looks and looks[-1].step == counters.step):
            return False
        if finished or trainer.timetable.due(self.name, trainer.config.validation):
            return True
        return trainer.views >= self._next_views(trainer, looks)

    def _next_views(self, trainer: Trainer, looks: list[Look]) -> float:
        """Return the views at which the next look is due.

        Where looks at all marks would take too long, those that there is time for are spread evenly
        over the logarithm of the views that are left, or of those in which the model begins to
        memorize. The last look of the run is always taken.
        """
        last = looks[-1].views if looks else 0.0
        if not looks or not (look_s := self._look_s(trainer, looks)):
            return next_mark(last)
        allowed = max(MIN_LOOKS, ERRORS_SHARE * self._allowed_s(trainer) / look_s - self._before)
        left = allowed - len(looks) - 1
        if left < 1:
            return math.inf
        end = trainer.views + trainer.epochs * (1 / max(trainer.progress, 1e-9) - 1)
        if self._state not in HARMFUL and last < (soon := self._memorizes_by(looks)):
            end = min(end, soon)
        return max(next_mark(last), last * math.pow(max(1.0, end / last), 1 / left))

    @staticmethod
    def _memorizes_by(looks: list[Look]) -> float:
        """Return the views by which it is surely seen that the model memorizes, if it begins to; 0 if
        not.
        """
        watched = list(itertools.takewhile(lambda look: look.ratio.mean > WATCHED, reversed(looks)))
        return WATCHED_SPAN * watched[-1].views if watched else 0.0

    def _look_s(self, trainer: Trainer, looks: list[Look]) -> float:
        """Return about how long the errors of a look take; after a resume, with its samples."""
        if self._errors_s:
            return sum(self._errors_s) / len(self._errors_s)
        return trainer.state.counters.looks_s / (self._before + len(looks))

    @staticmethod
    def _allowed_s(trainer: Trainer) -> float:
        """Return the seconds that all looks of the run may take."""
        whole_s = trainer.state.counters.seconds / max(trainer.progress, 1e-9)
        return max(FREE_S, SHARE * whole_s)

    def run(self, trainer: Trainer, session: Session) -> None:
        """Look, write what was found, and print the verdict where its state has changed."""
        counters, looks, begun = trainer.state.counters, self.looks(trainer), seconds()
        average = cast(Model, trainer.state.average)
        before = self._state
        with trainer.timetable.recording(self.name):
            with trainer.uncompiled():
                looks.append(self._look(trainer, average, session))
            self._errors_s.append(seconds() - begun)
            looks[-1] = self._with_samples(looks[-1], trainer, looks[:-1])
            current().on_first(partial(self._write, looks[-1]))
            found = verdict(looks)
            self._state = found.state
            if best(looks) is looks[-1]:
                self._keep(trainer, looks)
        counters.looks_s += seconds() - begun
        self._announce(found, trainer, session, changed=found.state != before)

    def _write(self, look: Look) -> None:
        with MetricsFile(self.directory.looks, after_step=look.step - 1) as file:
            file.write(look.plain())

    def _look(self, trainer: Trainer, average: Model, session: Session) -> Look:
        """Measure errors, and what the base of a fine-tuning says to them."""
        step, held_out, seen, base = trainer.state.counters.step, None, None, None
        if self.validator is not None:
            if not self._fitted:
                self._fit(self.validator, trainer, average, session)
            held_out, seen = self.validator.look_errors(average)
        if self.comparison is not None:
            base, figures = self.comparison.compare(average, held_out)
            session.write({"step": step, **figures})
        return Look(
            step=step,
            views=trainer.views,
            held_out=() if held_out is None else tuple(held_out.by_image().tolist()),
            seen=() if seen is None else tuple(seen.by_image().tolist()),
            base=base,
            begins=trainer.plan.begins,
        )

    def _fit(
        self, validator: Validator, trainer: Trainer, average: Model, session: Session
    ) -> None:
        """Let looks meet so few images that MIN_LOOKS of them fit into their time.

        A run that is resumed goes on with as many as before.
        """
        self._fitted, looks = True, self.looks(trainer)
        if looks:
            validator.look_images = max(len(looks[0].held_out), len(looks[0].seen))
            return
        look_s = ERRORS_SHARE * self._allowed_s(trainer) / MIN_LOOKS
        most = int(look_s / validator.prediction_s(average) / (2 * LOOK_BINS))
        whole = len(validator.look_triples.x0)
        validator.look_images = max(FEWEST_HELD_OUT, most)
        if validator.look_images < whole:
            session.bar.say(
                f"looks meet {validator.look_images} of {whole} held-out images: more would take above "
                f"{SHARE:.1%} of the time"
            )

    def _with_samples(self, look: Look, trainer: Trainer, looks: list[Look]) -> Look:
        """Return a look with what samples show, if it is time to draw some and they cost little."""
        last = next((look.views for look in reversed(looks) if look.copies is not None), 0.0)
        most = trainer.config.validation.copy_samples
        left_s, spare_s = self._left_for_samples(trainer, looks)
        needed, numbers = max(MIN_VIEWS, 2 * last), [most // 3]
        if trainer.finished:  # these samples say most
            needed, numbers = MIN_LAST_VIEWS, [most, most // 3]
        sample_s = self._sample_s or self._expected_sample_s(trainer)
        num = next((number for number in numbers if sample_s * number <= left_s), 0)
        if not num or trainer.views < needed:
            return look
        begun = seconds()
        images = self.search.images(cast(Model, trainer.state.average), num)
        copies = self.search.copies(images)
        taken_s = seconds() - begun
        self._sample_s = taken_s / num
        figures = self.search.figures(images, left_s=min(left_s, spare_s) - taken_s)
        return replace(look, copies=copies, samples=figures)

    def _left_for_samples(self, trainer: Trainer, looks: list[Look]) -> tuple[float, float]:
        """Return the seconds that samples of this look may take, and what is left of the time of all
        looks: half of the time for samples is kept for the last, which have what errors leave, too.
        """
        allowed_s, taken_s = self._allowed_s(trainer), trainer.state.counters.looks_s
        spare_s = allowed_s - taken_s - self._errors_s[-1]
        samples_s = (1 - ERRORS_SHARE) * allowed_s
        left_s = samples_s - max(
            0.0, taken_s - (self._before + len(looks)) * self._look_s(trainer, looks)
        )
        return (max(spare_s, left_s) if trainer.finished else left_s - samples_s / 2), spare_s

    def _expected_sample_s(self, trainer: Trainer) -> float:
        """Return about how long a sample takes: a prediction is a quarter of a training step."""
        counters = trainer.state.counters
        return self.search.predictions * counters.seconds / max(1, counters.samples_seen) / 4

    def _keep(self, trainer: Trainer, looks: list[Look]) -> None:
        """Keep these weights, and those that a run resumed from a checkpoint would still name."""
        needed = set()
        for path in checkpoint.paths(self.directory.checkpoints):
            known = [look for look in looks if look.step <= step_of(path)]
            if known:
                needed.add(best(known).step)
        keep_best(trainer, self.directory, also=needed)

    def _write_verdict(self, plain: dict[str, Any]) -> None:
        self.directory.verdict.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.directory.verdict, json.dumps(plain, indent=1))

    def _announce(
        self, found: StoppingVerdict, trainer: Trainer, session: Session, *, changed: bool
    ) -> None:
        plain = {"step": found.step, **found.plain()}
        current().on_first(partial(self._write_verdict, plain))
        self.directory.remark(verdict=plain)
        session.bar.label(found.state)
        figures = [] if found.base is None else found.base.figures()
        if changed or figures:
            session.bar.say(f"step {found.step}: {'; '.join((*figures, found.sentence))}")
        if found.state in STOP_AT[trainer.config.stop]:
            trainer.state.counters.stopped = found.state

"""The verdict on a fine-tuning: which step to use, and whether training longer is of use."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato.storage.atomic import write_text

# Change of the predicted noise, over the base's own error on the same images, above which the model
# has forgotten. Measured on digits without 7, tuned on ten 7s: docs/fine-tuning.md.
DRIFT_LIMIT = 0.1
# what null stands for in a file: a single image gives no interval
UNBOUNDED = {"gain": None, "gain_low": -math.inf, "gain_high": math.inf, "drift": None}
UNMEASURED = (
    "nothing is held out, so that neither the gain on new images nor memorization can be measured: "
    "look at the samples"
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One comparison with the base.

    Attributes:
        step: of training.
        gain, gain_low, gain_high: error of the base minus that of the model on held-out new
            images, with its 95 % interval, over the error of the base; above 0 where the model is
            better. The gain is None if nothing is held out.
        drift: mean squared change of the predicted noise on images of what the base knew, over
            the base's error on them; None where nothing of the kind is known.
    """

    step: int
    gain: float | None = None
    gain_low: float = -math.inf
    gain_high: float = math.inf
    drift: float | None

    @property
    def forgets(self) -> bool:
        """Whether the drift is above its limit."""
        return self.drift is not None and self.drift > DRIFT_LIMIT

    def figures(self) -> list[str]:
        """Return what was measured, in words."""
        gain = self.gain
        return [
            *(
                []
                if gain is None
                else [
                    f"gain on new images {gain:+.1%} [{self.gain_low:+.1%}, {self.gain_high:+.1%}]"
                ]
            ),
            *([] if self.drift is None else [f"change of what the base knew {self.drift:.1%}"]),
        ]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which look is recommended, and whether training longer is of use.

    Attributes:
        best: the look with the largest gain that does not forget; None if all forget.
        chosen: the latest look whose gain lies within the interval of the best, and that does not
            forget; None if all forget. Without gains it is the latest that does not forget.
        last: the last look.
    """

    best: Look | None = None
    chosen: Look | None = None
    last: Look | None = None

    def after(self, look: Look) -> Verdict:
        """Return the verdict after one more look."""
        if look.forgets:
            return Verdict(best=self.best, chosen=self.chosen, last=look)
        if look.gain is None:
            return Verdict(best=look, chosen=look, last=look)
        best = self.best
        if best is None or best.gain is None or look.gain > best.gain:
            best = look
        chosen = look if look.gain >= best.gain_low else self.chosen
        return Verdict(best=best, chosen=chosen, last=look)

    @property
    def stop(self) -> bool:
        """Whether the last look is worse than the chosen one."""
        return self.last is not None and self.last != self.chosen

    def sentence(self) -> str:
        """Return the verdict in words."""
        if self.last is None:
            return "not compared with the base yet"
        if self.chosen is None:
            return (
                f"stop: the model has forgotten what its base knew at every look (change "
                f"{self.last.drift:.0%} of the base's error, limit {DRIFT_LIMIT:.0%}); use a lower "
                "learning rate, fewer steps or preservation"
            )
        use = f"use step {self.chosen.step}"
        if self.chosen.gain is None and not self.stop:
            return f"{UNMEASURED}; {use}"
        if not self.stop:
            return f"keep on: the last look is as good as the best; {use}"
        if self.last.forgets:
            return (
                f"stop: the model forgets what its base knew (change {self.last.drift:.0%} of the "
                f"base's error, limit {DRIFT_LIMIT:.0%}); {use}"
            )
        return (
            f"stop: held-out new images are predicted worse than at step {self.chosen.step} (gain "
            f"{self.last.gain or 0:+.1%}, best {(self.best and self.best.gain) or 0:+.1%}); {use}"
        )

    def plain(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        looks = {name: _finite(look) for name, look in asdict(self).items()}
        return {
            **looks,
            "best_step": None if self.chosen is None else self.chosen.step,
            "use_best": self.chosen is not None,
            "stop": self.stop,
            "sentence": self.sentence(),
        }

    @classmethod
    def read(cls, path: Path) -> Verdict:
        """Read what `plain` returned from a JSON file; a new verdict if there is none."""
        try:
            plain = json.loads(path.read_text())
        except OSError:
            return cls()
        looks = {
            name: None if plain[name] is None else Look(**{**UNBOUNDED, **_given(plain[name])})
            for name in ("best", "chosen", "last")
        }
        return cls(**looks)

    def write(self, path: Path) -> None:
        """Write the verdict to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.plain(), indent=1))


def _finite(look: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a look without infinite ends of an interval, which JSON lacks."""
    if look is None:
        return None
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in look.items()
    }


def _given(look: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a look that are not null."""
    return {key: value for key, value in look.items() if value is not None}

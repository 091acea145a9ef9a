"""Random faults for as long as you like, and at the end of each run the comparison with the run that
was left alone.

    python -m tests.faults.soak [--minutes 60] [--seed 0]

The faults: SIGKILL, SIGTERM, SIGUSR1, a disk that is full for a while, the newest checkpoint damaged,
an image that is gone while the run is, readers that are killed, a bit of the cache flipped, a cut
config.yaml. In all runs, also in the one that is left alone, one step is not finite and one window of
steps is poisoned, so that training goes back.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from sfumato import config
from sfumato.storage import checkpoint
from sfumato.training import (
    Budget,
    CheckpointConfig,
    PreviewConfig,
    ValidationConfig,
    saving,
    trainer,
)
from tests.faults.injector import Child, Lab, flip, has_step, leftovers
from tests.helpers.runs import fingerprint, images, tiny_run

STEPS, EVERY = 400, 20
BAD_STEP, WINDOW = 70, range(200, 220)


def poisoned() -> None:
    """Make one step, and one window of steps, not finite; and wait briefly for a full disk."""
    real = trainer.Trainer._backward

    def backward(self, batch, dtype):  # type: ignore[no-untyped-def]
        losses = real(self, batch, dtype)
        step = self.state.counters.step
        bad = step == BAD_STEP or step in WINDOW
        return losses._replace(per_sample=losses.per_sample * (math.nan if bad else 1.0))

    trainer.Trainer._backward = backward  # type: ignore[method-assign]
    trainer.LAST_WAITS_S = (0.1,) * 50
    saving.RETRY_S = 0.1


def full_for_a_while() -> None:
    """Let writes of tensors fail for two seconds of this process's life."""
    poisoned()
    real, begun = checkpoint.save_file, time.monotonic()

    def full(*arguments, **options):  # type: ignore[no-untyped-def]
        if 1.0 < time.monotonic() - begun < 3.0:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    checkpoint.save_file = full


def strike(name: str, child: Child, run: Path, cache: Path, folder: Path) -> None:
    """Do what a fault is named for; the child has ended afterwards."""
    if name in ("SIGTERM", "SIGUSR1"):
        child.send(getattr(signal, name))
        if name == "SIGUSR1":
            time.sleep(0.3)
        else:
            child.wait()
    if name == "readers":
        path = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        for pid in path.read_text().split() if path.exists() else ():
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(2.0)
    image = sorted(folder.rglob("*.png"))[3]
    if name == "image":
        image.rename(image.with_suffix(".away"))
        time.sleep(0.5)
        image.with_suffix(".away").rename(image)
    child.kill()
    found = checkpoint.paths(run / "checkpoints")
    if name == "checkpoint" and len(found) > 1:
        flip(found[0] / f"{random.choice(FILES)}.safetensors")
    if name == "cache":
        for file in cache.glob("pixels/*/segment-*/pixels-*.bin"):
            flip(file, random.random())
    if name == "config" and found:
        os.truncate(run / "config.yaml", (run / "config.yaml").stat().st_size // 2)


FILES = ("model", "ema", "optimizer")
FAULTS = (
    "SIGKILL", "SIGTERM", "SIGUSR1", "readers", "image", "checkpoint", "cache", "config", "disk",
)  # fmt: skip


def main() -> None:
    """Run until the time is over, and print the table."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--minutes", type=float, default=60.0)
    asked.add_argument("--seed", type=int, default=0)
    options = asked.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    folder, lab = images(place / "images", size=8), Lab(place)
    settings = replace(
        tiny_run(folder),
        budget=Budget(steps=STEPS),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep=3),
        validation=ValidationConfig(every_steps=150, samples=8, copy_samples=0),
        preview=PreviewConfig(every_steps=150, num=2),
    )
    recipe = place / "recipe.yaml"
    recipe.write_text(config.dump_yaml(config.plain(settings)))
    os.environ["SFUMATO_CACHE"] = str(place / "cache-alone")
    code, said = lab.call("train", recipe, "--run", place / "alone", patch=poisoned)
    assert code == 0, said
    end = fingerprint(place / "alone")
    random.seed(options.seed)
    done, outcomes, over = Counter[str](), Counter[str](), time.monotonic() + 60 * options.minutes
    while time.monotonic() < over:
        number = outcomes.total()
        run, cache = place / f"run-{number}", place / f"cache-{number}"
        os.environ["SFUMATO_CACHE"] = str(cache)
        result = one(lab, recipe, run, cache, folder, done)
        if result == "ended" and (run / "bad_samples.jsonl").exists():
            result = "ended with images replaced, as listed"  # gone while the cache was damaged
        if result == "ended" and fingerprint(run) != end:
            result = "ended otherwise"
        if result == "ended" and leftovers(run, cache):
            result = "left something over"
        outcomes[result] += 1
        print(f"{run.name}: {result}; faults so far {sum(done.values())}", flush=True)  # noqa: T201
    print(f"faults: {dict(done)}\nruns: {dict(outcomes)}", flush=True)  # noqa: T201


def one(lab: Lab, recipe: Path, run: Path, cache: Path, folder: Path, done: Counter[str]) -> str:
    """Train one run under faults until it ends; return how it ended."""
    for _ in range(200):
        fault = random.choice(FAULTS)
        readers = ["data.cache=off", "data.memory_gib=0", "data.workers=2"]
        child = lab.start(
            "train", recipe, "--run", run, "--resume", *(readers if fault == "readers" else ()),
            patch=full_for_a_while if fault == "disk" else poisoned,
        )  # fmt: skip
        if fault != "disk":
            until = time.monotonic() + random.uniform(0.2, 3.0)
            child.until(lambda until=until: time.monotonic() > until, every_s=0.01)
        elif child.wait() == 0:
            done[fault] += 1
        if child.poll() is None:
            done[fault] += 1
            strike(fault, child, run, cache, folder)
        if child.code == 0:
            return "ended"
        if child.code not in (-9, -15, 143, 2):  # -15: before there was anything to save
            return f"exit {child.code}: {child.said().strip().splitlines()[-2:]}"
        if child.code == 2:
            return f"refused: {child.said().strip().splitlines()[-2:]}"
    return "did not end" if not has_step(run, STEPS) else "ended"


if __name__ == "__main__":
    main()

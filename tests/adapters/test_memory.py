"""What LoRA costs beside its base: memory and disk in the size of the adapter, not of the base.

The peak of a process is that of a whole life, so it is reset once the base is there; only Linux can.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.storage import checkpoint

pytest.importorskip("diffusers")

PEAK, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(
    not os.access(RESET, os.W_OK), reason="the peak of a process can be reset on Linux only"
)

PROGRAM = """
import copy, dataclasses, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sfumato.adapters import LoRA
from sfumato.contexts import ContextConfig
from sfumato.networks import DiffusersConfig
from sfumato.runs.preparation import prepare
from sfumato.runs.training import build_trainer
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget, CheckpointConfig, PreviewConfig, ValidationConfig
from tests.helpers.runs import images, tiny_run

SETTINGS = {
    "sample_size": 8, "layers_per_block": 4, "block_out_channels": [128, 256, 320],
    "norm_num_groups": 8, "attention_head_dim": 64,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}

def mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def reset():
    Path("/proc/self/clear_refs").write_text("5")

folder = Path(sys.argv[1])
network = DiffusersConfig(architecture="UNet2DModel", settings=SETTINGS)
if not (folder / "unet").is_dir():  # in a process of its own, whose memory does not count
    torch.manual_seed(0)
    network.build(image_channels=1).implementation.save_pretrained(folder / "unet")
    sys.exit()
storage = sys.argv[2]
settings = tiny_run(
    images(folder / "set", count=12),
    network=dataclasses.replace(network, path=str(folder / "unet"), base_dtype=storage),
    conditioner=ContextConfig(),
    adapter=LoRA(rank=4, convolutions=True),
    batch_size=2,
    micro_batch=None,
    budget=Budget(steps=3),
    checkpoint=CheckpointConfig(every_steps=2),
    validation=ValidationConfig(every_steps=3, samples=2, copy_samples=0),
    preview=PreviewConfig(every_steps=3, num=1),
)
before = mib("VmRSS")
reset()
prepared = prepare(settings)
loading, base = mib("VmHWM") - before, mib("VmRSS") - before
reset()
start = mib("VmRSS")
if sys.argv[3] == "copy":  # what the test would see if there were a second base
    another = copy.deepcopy(prepared.model)
    print(json.dumps({"above": mib("VmHWM") - start}))
    sys.exit()
directory = RunDirectory.create(folder / storage)
with directory.locked():
    trainer = build_trainer(prepared, directory)
    trainer.run()
above = mib("VmHWM") - start
print(json.dumps({
    "parameters": sum(p.numel() for p in prepared.model.parameters()),
    "base": base, "loading": loading, "above": above,
    "bytes": sum(p.numel() * p.itemsize for p in prepared.model.parameters()) / 2**20,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


def measured(folder: Path, storage: str, work: str = "train") -> dict[str, float]:
    """MiB of a run of LoRA, or of a mere copy of its model, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(folder), storage, work]
    # freed memory goes back to the system, so that what is measured is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for _ in range(1 if (folder / "unet").is_dir() else 2):
        said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "share"), [("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.5)])
def test_a_run_of_lora_needs_little_beside_its_base(
    folder: Path, storage: str, share: float
) -> None:
    found = measured(folder, storage)
    whole = 4 * found["parameters"] / 2**20
    assert found["parameters"] > 45e6
    assert found["bytes"] < share * whole + 10
    assert found["above"] < 0.2 * whole + 64
    newest = checkpoint.paths(folder / storage / "checkpoints")[0]
    size = sum(path.stat().st_size for path in newest.iterdir()) / 2**20
    assert size < 0.1 * whole  # weights, average and two moments of the adapter
    assert not list((folder / storage / "checkpoints").glob("frozen-*"))


@pytest.mark.slow
def test_a_second_base_would_be_seen(folder: Path) -> None:
    assert measured(folder, "float32", "copy")["above"] > 180

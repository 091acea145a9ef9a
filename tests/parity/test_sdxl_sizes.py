"""SDXL is told how each training image was resized and cropped, and samples that nothing was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.data.batch_plan import BatchPlan
from sfumato.data.loader import batches
from sfumato.data.resizing import resizing
from sfumato.networks import Backbone
from sfumato.recipes.resolver import resolve
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.preparation import PreparedRun, prepare
from tests.helpers.diffusers_models import stable_diffusion_xl

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES = ((64, 48), (32, 32), (40, 100), (20, 16))  # width and height
# original height and width, top and left of the crop, target height and width
SIX = {
    (64, 48): (48, 64, 0, 5, 32, 32),
    (32, 32): (32, 32, 0, 0, 32, 32),
    (40, 100): (100, 40, 24, 0, 32, 32),
    (20, 16): (16, 20, 0, 4, 32, 32),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedRun:
    model = stable_diffusion_xl(tmp_path_factory.mktemp("model") / "model")
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        width, height = SIZES[number % len(SIZES)]
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a thing number {number}")
    overrides = ["adapter.rank=2", "data.cache=off"]
    run = choose_finetuning(model, str(folder), overrides).run
    return prepare(resolve(run, overrides))


def told(network: Backbone, call: object) -> Tensor:
    """What the time embedding of the six numbers is given while `call` runs, (n, 6)."""
    seen: list[Tensor] = []
    layer = network.implementation.add_time_proj
    hook = layer.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments: seen.append(arguments[0].clone())
    )
    with torch.no_grad():
        call()  # type: ignore[operator]
    hook.remove()
    return torch.cat(seen).reshape(-1, 6)


def test_a_batch_tells_the_network_the_sizes_of_its_own_images(prepared: PreparedRun) -> None:
    dataset, model = prepared.dataset, prepared.model.eval()
    plan = BatchPlan(seed=0, shapes=dataset.shapes[dataset.epoch], batch_size=len(dataset.epoch))
    (group,) = next(batches(dataset, plan, start=0)).groups
    sizes = []
    for text in group.context["text"]:
        with Image.open(Path(dataset.config.source.path) / f"{text[-1]}.png") as image:  # type: ignore[union-attr]
            sizes.append(image.size)
    assert len(set(sizes)) > 1
    count = len(group)
    context = model.conditioner.training_context(group.images, group.context, seed=0, first=0)
    condition = model.conditioner(context, count)
    x = torch.randn(count, 4, 16, 16)
    level = torch.full((count,), 300.0)
    found = told(model.network, lambda: model.network(x, level, condition))
    assert torch.equal(found, torch.tensor([SIX[size] for size in sizes], dtype=torch.float32))
    # it matters
    with torch.no_grad():
        own = model.network(x, level, condition)
        plain = {"text": group.context["text"]}
        other = model.network(x, level, model.conditioner(plain, count))
    changed = (own - other).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [size != (32, 32) for size in sizes]


def test_samples_are_told_the_size_that_they_have(prepared: PreparedRun) -> None:
    model = prepared.model.eval()
    condition = model.conditioner({"text": ["a thing"]}, 1)
    null = model.conditioner.null(1)
    for given in (condition, null):
        x, level = torch.randn(1, 4, 8, 24), torch.tensor([300.0])
        found = told(model.network, lambda x=x, level=level, c=given: model.network(x, level, c))
        assert found.tolist() == [[16, 48, 0, 0, 16, 48]]
    assert "resizing" not in model.conditioner.user_inputs


def test_what_a_crop_cuts_off_is_counted_in_pixels_of_the_target() -> None:
    assert resizing((1024, 1024), (512, 512)) == (512, 512, 0, 0)
    assert resizing((2048, 1024), (512, 512)) == (512, 1536, 0, 256)
    assert resizing((1000, 3000), (512, 512)) == (2488, 488, 512, 0)
    assert resizing((256, 256), (512, 512)) == (-256, -256, 0, 0)
    assert resizing((1200, 800), (512, 768)) == (288, 432, 0, 0)

"""The report's image of diffusers, from the exported folder, beside our own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.adapters import ControlNet
from sfumato.interop import diffusers_parity
from sfumato.interop.diffusers_parity import compare_with_diffusers
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.trained_models import tuned

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a red cat on a mat"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("base") / "model", steps_offset=1)


def test_both_images_are_equal_and_another_folder_gives_another(base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "run")
    parity = compare_with_diffusers(model, PROMPT, folder=tmp_path)
    assert parity.difference is not None
    assert 0 < parity.difference < 1e-5
    assert parity.sentence().startswith("diffusers makes the same image from the exported folder")
    assert parity.images is not None
    assert parity.images.shape == (2, 3, 32, 32)
    assert float((parity.images[0] - parity.images[1]).abs().max()) == parity.difference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing is left
    without_lora = diffusers_parity._compared(model, base, PROMPT)
    assert without_lora.difference is not None
    assert without_lora.difference > 1e-3


def test_where_a_scheduler_is_replaced_here_both_are_ddim(base: Path, tmp_path: Path) -> None:
    config = base / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    plain = json.loads(before) | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    config.write_text(json.dumps(plain))
    parity = compare_with_diffusers(tuned(base, tmp_path / "run"), PROMPT, folder=tmp_path)
    config.write_text(before)
    assert parity.note == "4 steps, both by DDIM in the place of PNDMScheduler"
    assert parity.difference is not None
    assert parity.difference < 1e-4


def test_why_there_is_no_comparison_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(base, tmp_path / "run")
    control = replace(model, run=replace(model.run, adapter=ControlNet()))
    parity = compare_with_diffusers(control, PROMPT, folder=tmp_path)
    assert parity.sentence() == (
        "not compared with diffusers: what adapter.kind=controlnet trains is not part of a "
        "pipeline's folder"
    )
    monkeypatch.setattr(diffusers_parity, "total_memory", lambda: 1 << 10)
    parity = compare_with_diffusers(model, PROMPT, folder=tmp_path)
    assert (parity.difference, parity.images) == (None, None)
    assert "it would take about" in parity.note
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    parity = compare_with_diffusers(model, PROMPT, folder=tmp_path / "file")
    assert "Not a directory" in parity.note

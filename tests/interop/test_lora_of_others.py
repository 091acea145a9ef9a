"""LoRA files of diffusers and peft, read by us as their own programs read them, or better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.adapters import Factors
from sfumato.interop.lora_files import read_lora
from sfumato.interop.lora_names import LayerNames, underscored
from sfumato.interop.lora_writing import write_diffusers, write_kohya
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.lora import (
    by_comfyui_rule,
    change,
    largest_difference,
    of_peft,
    random_changes,
    theirs,
)

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of peft, where diffusers misleads it
]
F32 = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "model")


def test_alpha_tensors_beside_several_ranks_would_be_misread_by_diffusers(
    folder: Path, tmp_path: Path
) -> None:
    """Why they are left out (negative control, diffusers 0.42)."""
    names = LayerNames(theirs(folder).unet)
    changes = {"unet": random_changes(theirs(folder).unet)}
    write_kohya(tmp_path / "k.safetensors", changes, names, dtype=F32, header={})
    tensors = load_file(tmp_path / "k.safetensors")
    assert not any(key.endswith(".alpha") for key in tensors)
    ranks = {key.split(".")[0]: len(value) for key, value in tensors.items() if "lora_down" in key}
    with_alpha = tensors | {f"{name}.alpha": torch.tensor(float(r)) for name, r in ranks.items()}
    save_file(with_alpha, tmp_path / "alpha.safetensors")
    reader = theirs(folder)
    reader.load_lora_weights(str(tmp_path / "alpha.safetensors"))
    own = {name: change(f.down, f.up) for name, f in changes["unet"].items()}
    assert largest_difference(of_peft(reader.unet), own) > 0.1
    read = read_lora(tmp_path / "alpha.safetensors", names).changes["unet"]
    assert largest_difference({name: f.delta() for name, f in read.items()}, own) == 0.0


def as_theirs(folder: Path, own: dict[str, Factors], rank: int, alpha: float):
    """A pipeline of diffusers with a LoRA of peft that has the same factors, not yet scaled."""
    pipeline = theirs(folder)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(own), init_lora_weights=False
    )
    pipeline.unet.add_adapter(config)
    for name, layer in pipeline.unet.named_modules():
        if name in own:
            layer.lora_A["default"].weight.data = own[name].down.clone()
            layer.lora_B["default"].weight.data = own[name].up.clone()
    return pipeline


def test_files_of_diffusers_own_writer_lose_layers_and_are_too_strong_by_its_readers_rules(
    folder: Path, tmp_path: Path
) -> None:
    """What our files are for: these defects are seen in diffusers 0.42 (negative controls)."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

    unet = theirs(folder).unet
    own = random_changes(unet, ranks=(4,))
    scaled = {name: change(f.down, f.up) / 4 for name, f in own.items()}
    pipeline = as_theirs(folder, own, rank=4, alpha=1)
    assert largest_difference(of_peft(pipeline.unet), scaled) == 0.0
    state = peft.get_peft_model_state_dict(pipeline.unet)
    layers = convert_state_dict_to_diffusers(state)
    metadata = _collate_lora_metadata({"unet": pipeline.unet})
    pipeline.save_lora_weights(tmp_path / "plain", unet_lora_layers=layers)
    pipeline.save_lora_weights(tmp_path / "described", unet_lora_layers=layers, **metadata)
    factors = {}
    for kind in ("plain", "described"):
        reader = theirs(folder)
        reader.load_lora_weights(tmp_path / kind)
        found = of_peft(reader.unet)
        # nothing is raised
        assert scaled.keys() - found.keys() == {name for name in scaled if ".attn" in name}
        factors[kind] = {float(found[n].norm() / scaled[n].norm()) for n in found}
    assert min(factors["plain"]) == pytest.approx(4)
    assert max(factors["described"]) == pytest.approx(1)
    spelled = convert_state_dict_to_kohya(layers)
    save_file(
        {key: value.contiguous() for key, value in spelled.items()}, tmp_path / "k.safetensors"
    )
    by_rule = by_comfyui_rule(tmp_path / "k.safetensors", ("lora_down", "lora_up"))
    assert by_rule
    for name, found in by_rule.items():
        path = name.removeprefix("lora_unet_")
        own_change = next(value for key, value in scaled.items() if underscored(key) == path)
        assert float(found.norm() / own_change.norm()) == pytest.approx(4)
    # we read the described file whole, attention included, and with its scale
    names = LayerNames(unet)
    read = read_lora(tmp_path / "described" / "pytorch_lora_weights.safetensors", names)
    assert (
        largest_difference({n: f.delta() for n, f in read.changes["unet"].items()}, scaled) < 1e-7
    )


def test_attention_in_the_spelling_of_2023_is_read_as_diffusers_reads_it(
    folder: Path, tmp_path: Path
) -> None:
    pipeline = theirs(folder)
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    names = LayerNames(modules["unet"], lambda: {"text_encoder": modules["text_encoder"]})
    tensors = {}
    for part, module in modules.items():
        for name, factors in random_changes(module, ranks=(4,)).items():
            path, _, layer = name.rpartition("attn")
            if not path:
                continue
            old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
            last = layer.split(".")[1]
            middle = f"{layer[0]}.processor" if part == "unet" else ""
            start = "text_model." if part == "text_encoder" else ""
            key = f"{part}.{start}{path}attn{middle}.{old.get(last, last)}_lora"
            tensors |= {f"{key}.down.weight": factors.down, f"{key}.up.weight": factors.up}
    save_file(tensors, tmp_path / "f.safetensors")
    read = read_lora(tmp_path / "f.safetensors", names)
    pipeline.load_lora_weights(str(tmp_path / "f.safetensors"))
    for part, module in modules.items():
        found = {name: f.delta() for name, f in read.changes[part].items()}
        assert len(found) == (32 if part == "unet" else 8)
        assert largest_difference(of_peft(module), found) == 0.0


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_configurations_of_peft_are_obeyed(folder: Path, settings: dict, tmp_path: Path) -> None:
    unet = theirs(folder).unet
    config = peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k", "proj_in", "conv1", "ff.net.2"],
        rank_pattern={"to_k": 2, r"down_blocks\..*\.conv1": 3},
        alpha_pattern={"to_k": 8, r"mid_block\..*to_q": 1},
        init_lora_weights=False,
        **settings,
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(unet, config)
    model.save_pretrained(tmp_path / "peft")
    expected = of_peft(model)
    names = LayerNames(theirs(folder).unet)
    for place in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        read = read_lora(place, names).changes["unet"]
        assert largest_difference({n: f.delta() for n, f in read.items()}, expected) < 1e-6
    # the same in the header of a file of diffusers
    from diffusers.training_utils import _collate_lora_metadata

    state = peft.get_peft_model_state_dict(model)
    layers = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    pipeline = theirs(folder)
    metadata = _collate_lora_metadata({"unet": model})
    pipeline.save_lora_weights(tmp_path / "d", unet_lora_layers=layers, **metadata)
    read = read_lora(tmp_path / "d", names).changes["unet"]
    assert largest_difference({n: f.delta() for n, f in read.items()}, expected) < 1e-6


def test_a_pipeline_with_loras_is_that_of_diffusers_and_its_base_stays_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    pipeline = theirs(folder)
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    names = LayerNames(modules["unet"], lambda: {"text_encoder": modules["text_encoder"]})
    files = []
    for number, ranks in enumerate([(4,), (2, 3)]):
        changes = {part: random_changes(module, ranks) for part, module in modules.items()}
        files.append(tmp_path / f"{number}.safetensors")
        write_diffusers(files[-1], changes, names, dtype=F32, header={"format": "pt"})
    base = sfumato.load(folder)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    asked = {"prompt": "a thing", "steps": 3, "guidance": 1.0}
    plain = base.sample(1, seed=4, **asked)
    ours = sfumato.with_lora(sfumato.with_lora(base, files[0]), files[1], 0.5)
    changed = ours.sample(1, seed=4, **asked)
    assert float((changed - plain).abs().max()) > 0.02
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(base.sample(1, seed=4, **asked), plain)
    shared = ours.model.network.state_dict()
    key = "network.model.conv_in.weight"
    assert shared[key.removeprefix("network.")].data_ptr() == after[key].data_ptr()
    for number, file in enumerate(files):
        pipeline.load_lora_weights(str(file), adapter_name=f"lora{number}")
    pipeline.set_adapters(["lora0", "lora1"], [1.0, 0.5])
    condition = ours.model.conditioner({"text": ["a thing"]}, 1)
    tokens = pipeline.encode_prompt("a thing", "cpu", 1, False)[0]
    assert float((condition.tokens - tokens).abs().max() / tokens.abs().max()) < 1e-5
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = pipeline.unet(x, torch.tensor([500.0]), encoder_hidden_states=tokens)[0]
        found = ours.model.network(x, torch.tensor([500.0]), condition)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    nothing = sfumato.with_lora(base, files[0], 0.0).sample(1, seed=4, **asked)
    assert float((nothing - plain).abs().max()) < 1e-6

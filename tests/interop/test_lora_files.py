"""LoRA files of all spellings, read for our own networks; what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.adapters import Factors, adaptable_layers, add_product, sharing_tensors
from sfumato.errors import CheckpointError, ShapeError
from sfumato.interop.lora_files import read_lora
from sfumato.interop.lora_names import LayerNames, underscored
from sfumato.interop.lora_writing import rounded, write_diffusers, write_kohya, write_peft
from sfumato.networks import DiTConfig, UNetConfig
from tests.helpers.lora import change, largest_difference, random_changes

NETWORKS = {
    "unet": UNetConfig(
        channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
    ),
    "transformer": DiTConfig(hidden_size=32, depth=2, patch_size=2, head_dim=16),
}
F32 = torch.float32


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS["unet"].build(image_channels=3)


@pytest.fixture(scope="module")
def names(unet: nn.Module) -> LayerNames:
    return LayerNames(unet)


@pytest.fixture(scope="module")
def factors(unet: nn.Module) -> dict[str, Factors]:
    return random_changes(unet, ranks=(4,))


def deltas(read: dict[str, Factors]) -> dict[str, Tensor]:
    return {name: layer.delta() for name, layer in read.items()}


def products(layers: dict[str, Factors], scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * change(layer.down, layer.up) for name, layer in layers.items()}


@pytest.mark.parametrize("ranks", [(4,), (2, 3, 5)])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("part", NETWORKS)
def test_files_of_our_own_networks_are_read_back_exactly(
    part: str, form: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    network = NETWORKS[part].build(image_channels=3)
    names, layers = LayerNames(network), random_changes(network, ranks)
    path = tmp_path / ("p" if form == "peft" else "f.safetensors")
    changes, options = {part: layers}, {"dtype": F32, "header": {"format": "pt"}}
    if form == "peft":
        write_peft(path, changes, names, base="ours", **options)
    else:
        {"diffusers": write_diffusers, "kohya": write_kohya}[form](path, changes, names, **options)
    read = read_lora(path, names)
    assert list(read.changes) == [part]
    assert largest_difference(deltas(read.changes[part]), products(layers)) == 0.0
    assert f"{len(layers)} of {len(layers)} layers" in read.remarks[0]


PREFIXES = [
    "",
    "unet.",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "base_model.model.unet._orig_mod.",
]
ENDS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
]


def spelled(
    layers: dict[str, Factors], prefix: str = "unet.", ends: tuple[str, str] = ENDS[0]
) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.{end}": factor
        for name, layer in layers.items()
        for end, factor in zip(ends, (layer.down, layer.up), strict=True)
    }


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_and_ending_is_known(
    prefix: str, ends: tuple[str, str], names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    save_file(spelled(factors, prefix, ends), tmp_path / "f.safetensors")
    read = read_lora(tmp_path / "f.safetensors", names)
    assert largest_difference(deltas(read.changes["unet"]), products(factors)) == 0.0


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(1.0),
        torch.tensor([1.0]),
        torch.tensor(1),
        torch.tensor([[1]], dtype=torch.int32),
        torch.tensor(1.0, dtype=torch.bfloat16),
        torch.tensor(1.0, dtype=torch.float64),
    ],
)
def test_alpha_tensors_of_any_type_and_shape_divide_by_the_layers_own_rank(
    alpha: Tensor, unet: nn.Module, names: LayerNames, tmp_path: Path
) -> None:
    layers = random_changes(unet, ranks=(2, 4, 8))
    tensors = {}
    for name, layer in layers.items():
        path = f"lora_unet_{underscored(name)}"
        tensors[f"{path}.lora_down.weight"] = layer.down
        tensors[f"{path}.lora_up.weight"] = layer.up
        tensors[f"{path}.alpha"] = alpha.clone()
    header = {"ss_network_alpha": "64", "ss_network_dim": "8"}  # which has no say
    save_file(tensors, tmp_path / "f.safetensors", metadata=header)
    read = read_lora(tmp_path / "f.safetensors", names).changes["unet"]
    expected = {name: change(f.down, f.up) / f.rank for name, f in layers.items()}
    assert largest_difference(deltas(read), expected) == 0.0


def test_without_alpha_the_scale_is_one_whatever_the_header_of_kohya_says(
    names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    header = {"ss_network_alpha": "1", "ss_network_dim": "4"}
    save_file(spelled(factors), tmp_path / "f.safetensors", metadata=header)
    read = read_lora(tmp_path / "f.safetensors", names).changes["unet"]
    assert largest_difference(deltas(read), products(factors)) == 0.0


def test_factors_of_another_precision_and_1_x_1_convolutions_as_linear_layers(
    unet: nn.Module, names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    some = {name: f for name, f in factors.items() if f.down.ndim == 2}
    tensors = {
        key: (value[:, :, None, None] if number % 2 else value).to(torch.bfloat16)
        for number, (key, value) in enumerate(spelled(some).items())
    }
    save_file(tensors, tmp_path / "f.safetensors")
    read = read_lora(tmp_path / "f.safetensors", names).changes["unet"]
    rounded_ = {name: f.map(lambda factor: factor.bfloat16().float()) for name, f in some.items()}
    assert largest_difference(deltas(read), products(rounded_)) == 0.0


def peft_folder(folder: Path, layers: dict[str, Factors], **settings: object) -> Path:
    folder.mkdir()
    save_file(spelled(layers, "base_model.model."), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"peft_type": "LOHA"}, "is of the kind LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a changed base"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"r": 8}, "has rank 4, and the configuration says 8"),
        ({"rank_pattern": {"out": 2}}, "has rank 4, and the configuration says 2"),
        ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"lora_alpha": "much"}, "cannot be understood"),
    ],
)
def test_configurations_of_peft_that_cannot_be_followed_are_refused(
    settings: dict, sentence: str, names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        read_lora(peft_folder(tmp_path / "p", factors, **settings), names)
    assert sentence in str(error.value)


def first(layers: dict[str, Factors]) -> str:
    return next(iter(layers))


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"dora_scale": (32, 1)}, "DoRA"),
        ({"lora_magnitude_vector.weight": (32,)}, "DoRA"),
        ({"lora_mid.weight": (4, 4, 3, 3)}, "Tucker"),
        ({"lora_B.bias": (32,)}, "biases of a LoRA"),
        ({"diff": (32,)}, "full differences"),
        ({"diff_b": (32,)}, "full differences"),
        ({"hada_w1_a": (4, 4), "hada_w2_b": (4, 4)}, "LoHa"),
        ({"lokr_w1": (4, 4)}, "LoKr"),
        ({"oft_blocks": (4, 4, 4)}, "OFT"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_relatives_of_lora_are_refused_by_name(
    more: dict, kind: str, alone: bool, names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    extra = {f"unet.{first(factors)}.{end}": torch.ones(shape) for end, shape in more.items()}
    save_file(extra if alone else {**spelled(factors), **extra}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path / "f.safetensors", names)
    assert kind in str(error.value)
    assert next(iter(extra)) in str(error.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"emb_params": (2, 8)},
        {"clip_l": (2, 8), "clip_g": (2, 12)},
        {"<a-toy>": (8,)},
        {"string_to_param": (2, 8), "x.name": (1,)},
    ],
)
def test_an_embedding_is_called_one(tensors: dict, names: LayerNames, tmp_path: Path) -> None:
    save_file(
        {key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "e.safetensors"
    )
    with pytest.raises(CheckpointError, match="is an embedding"):
        read_lora(tmp_path / "e.safetensors", names)


def test_bundled_embeddings_and_unknown_tensors_are_named_and_left_out_only_if_asked(
    names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    more = {
        "bundle_emb.toy.string_to_param.*": torch.ones(2, 8),
        "unet.nowhere.lora_A.weight": torch.ones(4, 8),
        "unet.nowhere.lora_B.weight": torch.ones(8, 4),
        "something": torch.ones(1),
    }
    save_file({**spelled(factors), **more}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path / "f.safetensors", names)
    count, total = len(factors), 2 * len(factors)
    said = f"{count} of {count + 1} layers ({total} of {total + 4} tensors) fit the model, and 4"
    assert said in str(error.value)
    for name in ("bundle_emb.toy", "unet.nowhere", "something", "--partial"):
        assert name in str(error.value)
    read = read_lora(tmp_path / "f.safetensors", names, partial=True)
    assert largest_difference(deltas(read.changes["unet"]), products(factors)) == 0.0
    assert "4 tensors are left out" in read.remarks[0]


@pytest.mark.parametrize("partial", [False, True])
def test_a_lora_of_another_base_is_refused(
    partial: bool, names: LayerNames, tmp_path: Path
) -> None:
    other = UNetConfig(
        channels=64, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
    ).build(image_channels=5)
    save_file(spelled(random_changes(other)), tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path / "f.safetensors", names, partial=partial)
    assert "0 of " in str(error.value)
    assert "it was made for another model" in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda key, t: {key: t[:0]}, "has rank 0"),
        (lambda key, t: {key: t[:3]}, "cannot be multiplied"),
        (lambda key, t: {}, "tensor is missing"),
        (lambda key, t: {key: t * float("nan")}, "not finite"),
        (lambda key, t: {key: t.to(torch.int8)}, "values of type torch.int8"),
        (lambda key, t: {key: t, key.replace("lora_A", "lora_down"): t.clone()}, "twice"),
        (
            lambda key, t: {key: t, f"{key.removesuffix('.lora_A.weight')}.alpha": torch.ones(2)},
            "alpha has 2 values",
        ),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    spoil, sentence: str, names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    tensors = spelled(factors)
    key = f"unet.{first(factors)}.lora_A.weight"
    tensors |= {name: t.contiguous() for name, t in spoil(key, tensors.pop(key)).items()}
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path / "f.safetensors", names)
    assert sentence in str(error.value)


def test_one_layer_under_two_names_is_refused(
    names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    one = {first(factors): factors[first(factors)]}
    twice = {**spelled(one), **spelled({k: v.map(torch.clone) for k, v in one.items()}, "module.")}
    save_file(twice, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="are the same layer"):
        read_lora(tmp_path / "f.safetensors", names)


def test_an_alpha_that_contradicts_the_configuration_is_refused(
    names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    name = first(factors)
    tensors = spelled({name: factors[name]}) | {f"unet.{name}.alpha": torch.tensor(1.0)}
    said = json.dumps({"unet.r": 4, "unet.lora_alpha": 4})
    save_file(tensors, tmp_path / "f.safetensors", metadata={"lora_adapter_metadata": said})
    with pytest.raises(CheckpointError, match=r"gives a scale of 0.25, its configuration 1"):
        read_lora(tmp_path / "f.safetensors", names)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "pointer of git-lfs",
        ),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
        (b"\n<html>404</html>", "is a web page"),
        (b"PK\x03\x04" + bytes(40), "is a pickle or a zip archive"),
        (b"\x80\x04\x95" + bytes(40), "is a pickle under another name"),
        (b"GGUF" + bytes(40), "is a GGUF file"),
        (b"", "is cut"),
        (b"\x10", "is cut"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "is not a safetensors file"),
        (b"never a file of weights", "is not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_called_what_it_is(
    content: bytes, sentence: str, names: LayerNames, tmp_path: Path
) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path / "f.safetensors", names)
    assert sentence in str(error.value)
    assert error.value.hint


def test_a_cut_file_is_said_to_be_cut_wherever_it_ends(
    names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(spelled(factors), whole)
    content = whole.read_bytes()
    for length in (7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "f.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is cut"):
            read_lora(tmp_path / "f.safetensors", names)


def test_folders_without_a_file_to_read_say_what_they_lack(
    names: LayerNames, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        read_lora(tmp_path, names)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"there is adapter_model.bin, a pickle"):
        read_lora(tmp_path, names)
    with pytest.raises(CheckpointError, match="is a pickle, by its name"):
        read_lora(tmp_path / "adapter_model.bin", names)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_lora(tmp_path / "missing.safetensors", names)


def test_the_header_says_clip_skip_and_trigger(
    names: LayerNames, factors: dict, tmp_path: Path
) -> None:
    header = {"ss_clip_skip": "2", "modelspec.trigger_phrase": "a sks toy"}
    save_file(spelled(factors), tmp_path / "f.safetensors", metadata=header)
    remarks = " ".join(read_lora(tmp_path / "f.safetensors", names).remarks)
    assert "clip skip 2" in remarks
    assert "'a sks toy'" in remarks


def test_products_add_up_in_a_copy_that_shares_the_weights(unet: nn.Module, factors: dict) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    copy = sharing_tensors(unet)
    layers = adaptable_layers(copy)
    for name, layer in factors.items():
        add_product(layers[name], layer)
        add_product(layers[name], layer.times(-0.5))
    assert not any("lora_" in name for name in unet.state_dict())
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in before.items())
    for name, layer in factors.items():
        assert layers[name].weight.data_ptr() == unet.get_submodule(name).weight.data_ptr()
        assert torch.allclose(layers[name].delta(), 0.5 * change(layer.down, layer.up), atol=1e-6)
    assert not any(
        parameter.requires_grad for name, parameter in copy.named_parameters() if "lora" in name
    )
    with pytest.raises(ShapeError, match="do not fit"):
        add_product(layers[first(factors)], Factors(torch.ones(2, 7), torch.ones(7, 2)))


def test_no_infinity_is_written(factors: dict) -> None:
    large = factors[first(factors)].map(lambda factor: 1e6 * factor)
    with pytest.raises(CheckpointError) as error:
        rounded(large, torch.float16, "unet.somewhere")
    assert "unet.somewhere: has values up to" in str(error.value)
    assert "infinite in float16" in str(error.value)
    assert torch.isfinite(rounded(large, torch.bfloat16, "unet.somewhere").down).all()

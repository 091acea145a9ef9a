"""A text encoder and a tokenizer of CLIP's kind for a few thousand captioned images, from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.training.precision import default_device

LENGTH = 24  # tokens of a caption
MARKS = ("<|startoftext|>", "<|endoftext|>")
TEMPERATURE = 0.07  # of the contrastive loss


def train_tokenizer(texts: Iterable[str], folder: Path, *, words: int) -> Any:
    """Train a tokenizer of CLIP's kind: pairs of bytes are merged inside words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained.train_from_iterator(
        [text.lower() for text in texts],
        trainers.BpeTrainer(
            vocab_size=words - len(MARKS), initial_alphabet=alphabet, end_of_word_suffix="</w>"
        ),
    )
    pairs = json.loads(trained.to_str())["model"]["merges"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in pairs]
    entries = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    entries += [merge.replace(" ", "") for merge in merges] + [*MARKS]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(entries))}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": MARKS[0],
        "eos_token": MARKS[1], "unk_token": MARKS[1], "pad_token": MARKS[1],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


class ImageEncoder(nn.Sequential):
    """The other half of the contrast, which is not kept: latents (B, C, h, w) -> (B, size)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 64, 3, padding=1), nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.GroupNorm(8, 128), nn.GELU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.GroupNorm(8, 256), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(1024, size),
        )  # fmt: skip


def train_text_encoder(
    captions: Sequence[Sequence[str]],
    latents: Tensor,
    tokenizer: Any,
    *,
    width: int,
    layers: int,
    steps: int,
) -> Any:
    """Train CLIP's text encoder so that a caption is close to its image's latents, and to no others.

    Args:
        captions: of each image, one or more.
        latents: of the images, (N, C, h, w).
        width, layers: of the encoder.
        steps: in batches of 128.
    Source: Radford et al. 2021 (arXiv:2103.00020), fig. 3.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    device = default_device()
    torch.manual_seed(0)
    last = len(tokenizer) - 1
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(1, width // 32),
            num_hidden_layers=layers, vocab_size=len(tokenizer), bos_token_id=last - 1,
            eos_token_id=last, pad_token_id=last, max_position_embeddings=LENGTH,
            projection_dim=width,
        )
    ).to(device)  # fmt: skip
    latents = latents.to(device)
    images = ImageEncoder(latents.shape[1], width).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *images.parameters()], weight_decay=0.1)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randperm(len(latents), generator=draw)[:128]
        picks = torch.randint(0, 2**31, (len(chosen),), generator=draw).tolist()
        texts = [
            captions[i][pick % len(captions[i])]
            for i, pick in zip(chosen.tolist(), picks, strict=True)
        ]
        # all are padded to the full length, as the pipeline does
        ids = tokenizer(
            texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        loss = contrast(encoder(ids).pooler_output, images(latents[chosen.to(device)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 100 == 99:
            print(f"text encoder: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    return encoder.eval().cpu()


def contrast(texts: Tensor, images: Tensor) -> Tensor:
    """Return the loss of choosing each caption's image in the batch, and each image's caption."""
    alike = F.normalize(texts, dim=1) @ F.normalize(images, dim=1).T / TEMPERATURE
    own = torch.arange(len(alike), device=alike.device)
    return (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2

"""How the text-to-image pipelines of diffusers encode prompts: by their own `encode_prompt`.

A table names every pipeline that can be used. Classes are looked up in it, so that a file never
chooses what is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners.pretrained_text import TextEmbedding

Encode = Callable[[Any, list[str], torch.device], list[TextEmbedding]]
EncodeWithout = Callable[[Any, list[str], torch.device, int], list[TextEmbedding]]


def _adds_none(pipeline: Any) -> int:
    return 0


@dataclass(frozen=True)
class TextPipeline:
    """How one class of pipelines encodes text.

    Attributes:
        encode: (pipeline, texts, device) -> embeddings.
        negative: the same for texts to lead away from, where those are encoded in another way.
        without: the same for prompts, without a number of the encoders' last layers (clip skip);
            None where that is not possible.
        fewest_layers: of the encoders, that must be left.
        tokenizer: the one that reads the longest texts.
        length: tokens that it reads; 0 for the tokenizer's own limit.
        added_tokens: how many of them the pipeline adds to a text.
        pooled: whether the condition has a vector.
        masked: whether texts differ in length, which a mask says; other pipelines pad them, and
            padding counts.
        zero_null: whether the null condition is zeros, unless model_index.json says otherwise.
        nothing: the text that stands for none.
    """

    encode: Encode
    negative: Encode | None = None
    without: EncodeWithout | None = None
    fewest_layers: int = 1
    tokenizer: str = "tokenizer"
    length: int = 0
    added_tokens: Callable[[Any], int] = _adds_none
    pooled: bool = False
    masked: bool = False
    zero_null: bool = False
    nothing: str = ""

    @property
    def encode_negative(self) -> Encode:
        """How texts are encoded that guidance leads away from."""
        return self.negative or self.encode


def _encode_sd(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    return _without_padding(pipeline.encode_prompt(texts, device, 1, False)[0], None)


def _encode_sd_without(
    pipeline: Any, texts: list[str], device: torch.device, clip_skip: int
) -> list[TextEmbedding]:
    """Encode prompts without the last layers, with the norm after them.

    It is what `encode_prompt` does, which fails for this with transformers 5 (diffusers 0.42).
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    written = [pipeline.maybe_convert_prompt(text, tokenizer) for text in texts]
    inputs = tokenizer(
        written, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    ).to(device)  # fmt: skip
    mask = inputs.attention_mask if encoder.config.to_dict().get("use_attention_mask") else None
    states = encoder(inputs.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    norms = (one for name, one in encoder.named_modules() if name.endswith("final_layer_norm"))
    return _without_padding(next(norms)(states[-(clip_skip + 1)]), None)


def _encode_sdxl(
    pipeline: Any, texts: list[str], device: torch.device, clip_skip: int | None = None
) -> list[TextEmbedding]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, device=device, do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    return [TextEmbedding(*pair) for pair in zip(pooled, tokens, strict=True)]


def _encode_sd3(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, device=device, do_classifier_free_guidance=False,
        max_sequence_length=PIPELINES["StableDiffusion3Pipeline"].length,
    )  # fmt: skip
    return [TextEmbedding(*pair) for pair in zip(pooled, tokens, strict=True)]


def _encode_pixart(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, mask, _, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, device=device, clean_caption=False,
        max_sequence_length=PIPELINES["PixArtSigmaPipeline"].length,
    )  # fmt: skip
    return _without_padding(tokens, mask)


def _encode_flux(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, pooled, _ = pipeline.encode_prompt(
        texts, device=device, max_sequence_length=PIPELINES["FluxPipeline"].length
    )
    return [TextEmbedding(*pair) for pair in zip(pooled, tokens, strict=True)]


def _encode_sana(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    """Encode prompts after the instruction to the language model that the call has by default."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    tokens, mask, _, _ = pipeline.encode_prompt(
        texts, False, device=device,
        max_sequence_length=PIPELINES["SanaPipeline"].length,
        complex_human_instruction=parameters["complex_human_instruction"].default,
    )  # fmt: skip
    return _without_padding(tokens, mask)


def _encode_lumina2(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, mask, _, _ = pipeline.encode_prompt(
        texts, False, device=device, max_sequence_length=PIPELINES["Lumina2Pipeline"].length
    )
    return _without_padding(tokens, mask)


def _encode_as_negative(
    pipeline: Any, texts: list[str], device: torch.device
) -> list[TextEmbedding]:
    """Encode texts without what the pipeline writes before a prompt."""
    _, _, tokens, mask = pipeline.encode_prompt(
        texts, True, negative_prompt=texts, device=device,
        max_sequence_length=PIPELINES[type(pipeline).__name__].length,
    )  # fmt: skip
    return _without_padding(tokens, mask)


def _encode_z_image(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, _ = pipeline.encode_prompt(
        list(texts), device=device, do_classifier_free_guidance=False,
        max_sequence_length=PIPELINES["ZImagePipeline"].length,
    )  # fmt: skip
    return [TextEmbedding(part.mean(0), part) for part in tokens]


def _encode_qwen(pipeline: Any, texts: list[str], device: torch.device) -> list[TextEmbedding]:
    tokens, mask = pipeline.encode_prompt(
        texts, device, max_sequence_length=PIPELINES["QwenImagePipeline"].length
    )
    return _without_padding(tokens, mask)


def _without_padding(tokens: Tensor, mask: Tensor | None) -> list[TextEmbedding]:
    """Return the tokens of each text that the mask keeps; without a mask, all tokens."""
    if mask is None:
        mask = tokens.new_ones(tokens.shape[:2])
    valid = [part[counts.bool()] for part, counts in zip(tokens, mask, strict=True)]
    return [TextEmbedding(part.mean(0), part) for part in valid]


def _lumina2_adds(pipeline: Any) -> int:
    return _added(pipeline, lambda text: f"{pipeline.system_prompt} <Prompt Start> {text}")


def _z_image_adds(pipeline: Any) -> int:
    def chat(text: str) -> str:
        result: str = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
            enable_thinking=True,
        )  # fmt: skip
        return result

    return _added(pipeline, chat)


def _qwen_adds(pipeline: Any) -> int:
    added = _added(pipeline, pipeline.prompt_template_encode.format)
    return added - int(pipeline.prompt_template_encode_start_idx)


def _added(pipeline: Any, write: Callable[[str], str]) -> int:
    """Return how many tokens a text has more after `write`."""
    before, after = (len(pipeline.tokenizer(text).input_ids) for text in ("a", write("a")))
    return after - before


PIPELINES = {
    "StableDiffusionPipeline": TextPipeline(_encode_sd, without=_encode_sd_without),
    # it leaves out one layer anyway
    "StableDiffusionXLPipeline": TextPipeline(
        _encode_sdxl, without=_encode_sdxl, fewest_layers=2, pooled=True, zero_null=True
    ),
    "StableDiffusion3Pipeline": TextPipeline(
        _encode_sd3, tokenizer="tokenizer_3", length=256, pooled=True
    ),
    "PixArtSigmaPipeline": TextPipeline(_encode_pixart, length=300, masked=True),
    "FluxPipeline": TextPipeline(_encode_flux, tokenizer="tokenizer_2", length=512, pooled=True),
    "SanaPipeline": TextPipeline(
        _encode_sana, negative=_encode_as_negative, length=300, masked=True
    ),
    "Lumina2Pipeline": TextPipeline(
        _encode_lumina2,
        negative=_encode_as_negative,
        length=256,
        added_tokens=_lumina2_adds,
        masked=True,
    ),
    "ZImagePipeline": TextPipeline(
        _encode_z_image, length=512, added_tokens=_z_image_adds, masked=True
    ),
    # its call needs a negative prompt for guidance, for which its authors name a space
    "QwenImagePipeline": TextPipeline(
        _encode_qwen, length=512, added_tokens=_qwen_adds, masked=True, nothing=" "
    ),
}

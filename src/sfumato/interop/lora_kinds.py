"""What a file's tensors are: a LoRA, one of its relatives, which are refused by name, or something
else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sfumato.errors import CheckpointError

# how the tensors of a layer end
TENSOR = re.compile(
    r"(?P<layer>.+?)\."
    r"(?:(?:lora_|lora\.|lora_linear_layer\.)(?P<side>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
# as diffusers wrote attention layers in 2023: of networks with, of text encoders without `processor`
OLD = re.compile(r"\.(processor|self_attn)\.(to_q|to_k|to_v|to_out)_lora\.")
OLD_LAYERS = {
    "processor": {"to_out": "to_out.0"},
    "self_attn": {
        "to_q": "self_attn.q_proj",
        "to_k": "self_attn.k_proj",
        "to_v": "self_attn.v_proj",
        "to_out": "self_attn.out_proj",
    },
}
# what is not supported, by the ends of tensors' names; those in `WHOLE` change what others mean
UNSUPPORTED = {
    r"(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)": "DoRA",
    r"lora_mid\.weight": "Tucker decomposition (lora_mid)",
    r"lora_(B|up)(\.default)?\.bias": "biases of a LoRA (lora_bias)",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"(oft_\w+|oft_\w+\.weight|boft_\w+)": "OFT",
    r"(a1|a2|b1|b2)\.weight": "GLoRA",
    r"(lora_embedding_[AB]|lora_embedding_[AB]\.\w+)": "LoRA of an embedding layer",
    r"(diff|diff_b|set_weight|w_norm|b_norm)": "full differences of weights (.diff)",
    r"(on_input|ia3_l)": "IA3",
    r"(vera_lambda_\w+|reshape_weight)": "a variant of LoRA",
}
WHOLE = (
    "DoRA",
    "Tucker decomposition (lora_mid)",
    "biases of a LoRA (lora_bias)",
    "a variant of LoRA",
)
BUNDLED = ("bundle_emb.", "lora_controlnet")
EMBEDDING_NAMES = {"emb_params", "string_to_param", "clip_l", "clip_g", "*"}


def require_lora(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error that names the kind of a file which is not a LoRA, or not a supported one."""
    kinds: dict[str, list[str]] = {}
    for key in tensors:
        if kind := kind_of(key):
            kinds.setdefault(kind, []).append(key)
    fixed = [kind for kind in kinds if kind in WHOLE]
    if not any(match and not match["alpha"] for match in map(match_tensor, tensors)):
        if kinds:
            raise _unsupported(path, kinds)
        if _is_embedding(tensors):
            raise CheckpointError(
                "is an embedding (textual inversion), not a LoRA",
                where=str(path),
                hint="give it as one: sfumato sample --embedding FILE, or sfumato.with_embedding",
            )
        raise CheckpointError(
            f"holds no LoRA; its {len(tensors)} tensors are such as {_some(tensors)}",
            where=str(path),
            hint="name a LoRA file; a whole model is sampled by its own name",
        )
    if fixed:
        raise _unsupported(path, {kind: kinds[kind] for kind in fixed})


def match_tensor(key: str) -> re.Match[str] | None:
    """Return the groups `layer`, and `side` or `alpha`, of a tensor's name; None for others."""
    if key.startswith(BUNDLED):
        return None
    return TENSOR.fullmatch(OLD.sub(lambda m: f".{OLD_LAYERS[m[1]].get(m[2], m[2])}.lora.", key))


def kind_of(key: str) -> str:
    """Return which kind that is not supported a tensor belongs to; "" for none of them."""
    if key.startswith(BUNDLED):
        return "bundled with the LoRA"
    found = (kind for end, kind in UNSUPPORTED.items() if re.search(rf"(^|\.){end}$", key))
    return next(found, "")


def _is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    return bool(EMBEDDING_NAMES & tensors.keys()) or (
        0 < len(tensors) <= 8
        and all(tensor.ndim <= 2 for tensor in tensors.values())
        and not any("." in key for key in tensors)
    )


def _unsupported(path: Path, kinds: Mapping[str, list[str]]) -> CheckpointError:
    said = "; ".join(
        f"{kind} ({len(keys)} tensors, e.g. {keys[0]})" for kind, keys in kinds.items()
    )
    return CheckpointError(
        f"is of a kind that is not supported: {said}",
        where=str(path),
        hint="only plain LoRA is read; other programs can convert it to one",
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")

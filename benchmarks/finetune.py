"""LoRA training of a U-Net of diffusers: sfumato's trainer beside the loop of diffusers' example with
peft, and what our wrapper adds to a call of the network.

    python benchmarks/finetune.py [--quick] [--json FILE] [--shapes tiny,mid] [--rounds 7]

Both train the same random weights from the same folder: LoRA of rank 16 on the attention layers,
AdamW, gradients clipped to 1, the same batch and precision. Both encode images and captions before
the first step, so that no step decodes, encodes or tokenizes (the example of diffusers does at each
step; here it frees its encoders instead). Ours also averages the weights and keys its noise
by sample; theirs does not. Each lives in a process of its own; they take steps in turn. Memory is
the peak of the process, loading and encoding included, less what it held when all was imported (on
a GPU, the most that was allocated), and the most that tensors take during a step.

`--shapes sdxl` is for a GPU: the sizes of SDXL at 1024 px, batch 1, base in bfloat16, activations
recomputed, products in bfloat16, in both.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import interleaved, machine, options, paired_ratio, report, seconds
from PIL import Image
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sfumato.condition import Condition
from sfumato.training.precision import default_device

RANK, IMAGES, FACTOR = 16, 8, 8
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TENSORS = (torch.Tensor, torch.nn.Parameter)
SIZES = (1024, 1024, 0, 0, 1024, 1024)  # that SDXL is told


@dataclass(frozen=True)
class Shape:
    """A U-Net, what it is trained on, and how.

    Attributes:
        steps: of a round.
        low: whether base and products are bfloat16 and activations are recomputed.
        sdxl: whether there are two text encoders.
    """

    unet: dict[str, Any]
    batch: int
    steps: int
    low: bool = False
    sdxl: bool = False


def _unet(widths: tuple[int, ...], side: int, cross: int, **changes: Any) -> dict[str, Any]:
    inner = len(widths) - 1
    return {
        "sample_size": side, "block_out_channels": widths, "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * inner + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * inner,
        "cross_attention_dim": cross, "attention_head_dim": 8, **changes,
    }  # fmt: skip


SHAPES = {
    "tiny": Shape(_unet((32, 64), 8, 64, norm_num_groups=8), batch=4, steps=10),
    "mid": Shape(_unet((128, 256, 384), 16, 256), batch=2, steps=1),
    "sdxl": Shape(
        _unet(
            (320, 640, 1280), 128, 2048,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, use_linear_projection=True,
        ),
        batch=1, steps=5, low=True, sdxl=True,
    ),
}  # fmt: skip


def write_pipeline(shape: Shape, folder: Path) -> None:
    """Write a pipeline of random weights, with text encoders of two layers and a narrow VAE."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**shape.unet)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=2, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    names = _tokenizer(folder.with_name("tokenizer"))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **TABLE)
    parts = {"vae": vae, "unet": unet.to(torch.bfloat16) if shape.low else unet}
    if shape.sdxl:
        diffusers.StableDiffusionXLPipeline(
            **parts, scheduler=scheduler, tokenizer=names, tokenizer_2=names,
            text_encoder=_encoder("CLIPTextModel", 768),
            text_encoder_2=_encoder("CLIPTextModelWithProjection", 1280), add_watermarker=False,
        ).save_pretrained(folder)  # fmt: skip
        return
    diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, tokenizer=names,
        text_encoder=_encoder("CLIPTextModel", shape.unet["cross_attention_dim"]),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def _tokenizer(folder: Path) -> Any:
    """A tokenizer of CLIP's kind that reads letter by letter."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *marks]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": marks[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def _encoder(kind: str, size: int) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=size, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        max_position_embeddings=77, projection_dim=size,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def write_images(shape: Shape, folder: Path) -> None:
    """Write images of noise with captions; their content has no part in the time."""
    folder.mkdir()
    side = FACTOR * shape.unet["sample_size"]
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of number {number}")


def our_step(shape: Shape, folder: Path) -> Callable[[], object]:
    """A step of our trainer, on batches that were read before."""
    from sfumato.data import batches
    from sfumato.recipes.resolver import resolve_config
    from sfumato.runs.cost import trial_trainer
    from sfumato.runs.finetuning import choose_finetuning
    from sfumato.runs.preparation import prepare

    run = choose_finetuning(folder / "model", str(folder / "images")).run
    changes = [
        f"batch_size={shape.batch}", "preservation=null", "compile=off",
        "adapter.layers=[to_k, to_q, to_v, to_out]", f"adapter.rank={RANK}",
        f"precision={'bfloat16' if shape.low else 'float32'}",
        f"network.base_dtype={'bfloat16' if shape.low else 'float32'}",
        f"network.activation_checkpointing={str(shape.low).lower()}",
    ]  # fmt: skip
    trainer = trial_trainer(prepare(resolve_config(run, changes).run), folder / "run")
    supply = batches(trainer.dataset, trainer.plan, start=0)
    ready = [next(supply) for _ in range(4)]
    taken = iter(range(10**9))
    return lambda: trainer.train_step(ready[next(taken) % len(ready)])


def their_step(shape: Shape, folder: Path) -> Callable[[], object]:
    """A step of diffusers' example of LoRA for text to image, rewritten after its documentation.

    What is kept because it costs time there: noise drawn on the device, a fresh `.item()` of the
    loss, gradients clipped, a schedule of the learning rate. Left out is what is not the loop's:
    accelerate, trackers, and the encoding at each step.
    Source: https://huggingface.co/docs/diffusers/training/text2image
    """
    import diffusers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    device, dtype = default_device(), torch.bfloat16 if shape.low else torch.float32
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "model/unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    unet.to(device)
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*TARGETS])
    )
    if shape.low:
        cast_training_params(unet, dtype=torch.float32)
        unet.enable_gradient_checkpointing()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    rates = get_scheduler("constant", optimizer)
    scheduler = diffusers.DDPMScheduler(**TABLE)
    latents, tokens, added = Encoders(shape, folder, device, dtype).encode()
    unet.train()

    def step() -> float:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (shape.batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=shape.low):
            output = unet(noisy, timesteps, tokens, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Encoders:
    """What diffusers' example encodes images and captions with."""

    def __init__(
        self, shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        import diffusers
        import transformers

        model, self.folder = folder / "model", folder
        self.shape, self.device, self.dtype = shape, device, dtype
        self.vae = diffusers.AutoencoderKL.from_pretrained(model / "vae").to(device)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(model / "tokenizer")
        kinds = {"text_encoder": transformers.CLIPTextModel}
        if shape.sdxl:
            kinds["text_encoder_2"] = transformers.CLIPTextModelWithProjection
        self.text = [
            kind.from_pretrained(model / name).to(device, dtype) for name, kind in kinds.items()
        ]

    @torch.no_grad()
    def encode(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
        """Return latents and embeddings of the first batch of images and captions."""
        paths = sorted((self.folder / "images").glob("*.png"))[: self.shape.batch]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
        x = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device)
        latents = self.vae.encode(x).latent_dist.sample() * self.vae.config.scaling_factor
        captions = [path.with_suffix(".txt").read_text() for path in paths]
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        states = [
            encoder(ids.input_ids.to(self.device), output_hidden_states=True)
            for encoder in self.text
        ]
        if not self.shape.sdxl:
            return latents.to(self.dtype), states[0].last_hidden_state, None
        tokens = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
        sizes = torch.tensor([SIZES] * self.shape.batch, device=self.device)
        added = {"text_embeds": states[1].text_embeds, "time_ids": sizes}
        return latents.to(self.dtype), tokens, added


def wrapper(shape: Shape, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of a call without gradients: of our wrapper, and of the network inside it."""
    from sfumato.networks import DiffusersConfig
    from sfumato.networks.diffusers_models import require_family

    settings = json.loads((folder / "model/unet/config.json").read_text())
    config = DiffusersConfig(
        architecture="UNet2DConditionModel", settings=settings, path=str(folder / "model/unet")
    )
    context = require_family(config.architecture).context_sizes(settings)
    device, side = default_device(), shape.unet["sample_size"]
    network = config.build(image_channels=4, context=context).to(device).eval()
    x, level = torch.randn(1, 4, side, side, device=device), torch.full((1,), 500.0, device=device)
    tokens = torch.randn(1, 77, context.tokens, device=device)
    mask = torch.ones(1, 77, dtype=torch.bool, device=device)
    condition, bare = Condition(tokens=tokens, token_mask=mask), network.implementation
    with torch.no_grad():
        times = interleaved(
            {
                "ours": lambda: network(x, level, condition),
                "bare": lambda: bare(x, level, encoder_hidden_states=tokens, return_dict=False),
            },
            20 * rounds,
        )
    difference = [a - b for a, b in zip(times["ours"], times["bare"], strict=True)]
    return {
        "ours_ms": 1000 * statistics.median(times["ours"]),
        "bare_ms": 1000 * statistics.median(times["bare"]),
        "added_ms": 1000 * statistics.median(difference),
    }


MAKERS = {"ours": our_step, "peft": their_step}


def resident(key: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS), or the most so far (VmHWM).

    `getrusage` would begin with the memory of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def tensors(step: Callable[[], object]) -> int:
    """The most bytes of tensors during a step on a CPU, as `max_memory_allocated` is on a GPU: those that
    there are before it, weights that are mapped from a file included, and what it adds at most.
    """
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in TENSORS]
    before = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
    return before + max(itertools.accumulate(sizes))


def serve(name: str, shape: Shape, folder: Path) -> None:
    """Take as many steps as each line of the input says, and say how long they took; at last, for 0, how
    much their tensors take.
    """
    import diffusers
    import peft
    import transformers

    import sfumato.runs.finetuning

    # what the example imports too; its modules are no part of the memory of training
    _ = [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDPMScheduler]
    _ = [diffusers.StableDiffusionPipeline, peft.LoraConfig, transformers.CLIPTextModel, sfumato]
    # as the example does, if it is installed, when it makes a pipeline of the model to validate it
    _ = [diffusers.OnnxRuntimeModel]
    before = resident("VmRSS")
    step, gpu = MAKERS[name](shape, folder), torch.cuda.is_available()
    for line in sys.stdin:
        taken = [seconds(step) for _ in range(int(line))]
        peak = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM") - before
        if not taken:
            peak = peak if gpu else tensors(step)
        print(json.dumps({"seconds": taken, "peak_mib": peak / 2**20}), flush=True)


class Candidate:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, shape: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--one", name, "--shapes", shape]
        self.process = subprocess.Popen(
            [*command, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def take(self, steps: int) -> dict[str, Any]:
        """Seconds of each step, and the peak so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Steps a second and peak memory of both, in turn."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pipeline(shape, folder / "model")
        write_images(shape, folder / "images")
        candidates = {key: Candidate(key, name, folder) for key in MAKERS}
        times: dict[str, list[float]] = {key: [] for key in MAKERS}
        peaks: dict[str, float] = {}
        for number in range(rounds + 1):
            for key, candidate in candidates.items():
                result = candidate.take(shape.steps)
                peaks[key] = result["peak_mib"]
                if number:  # the first warms up
                    times[key].append(statistics.median(result["seconds"]))
        most = {key: candidate.take(0)["peak_mib"] for key, candidate in candidates.items()}
        for candidate in candidates.values():
            candidate.close()
        weights = sum(path.stat().st_size for path in (folder / "model/unet").glob("*.safetensors"))
        called = {} if shape.sdxl else wrapper(shape, folder, rounds)
    return {
        "base_mib": weights / 2**20,
        "batch": shape.batch,
        "steps_per_s": {key: 1 / statistics.median(taken) for key, taken in times.items()},
        "ratio": paired_ratio(times["ours"], times["peft"]),
        "peak_mib": peaks,
        "peak_of_tensors_mib": most,
        "call": called,
    }


def main() -> None:
    """Compare the shapes that were named."""
    asked = options(__doc__.splitlines()[0], shapes="tiny,mid", rounds=7, one="", folder="")
    if asked.one:
        serve(asked.one, SHAPES[asked.shapes], Path(asked.folder))
        return
    rounds = 3 if asked.quick else asked.rounds
    rows: dict[str, Any] = {}
    for name in asked.shapes.split(",")[: 1 if asked.quick else None]:
        rows[name] = compare(name, rounds)
        print(name, json.dumps(rows[name]), flush=True)
    report({"machine": machine(), "rank": RANK, "rounds": rounds, "shapes": rows}, asked.json)


if __name__ == "__main__":
    main()

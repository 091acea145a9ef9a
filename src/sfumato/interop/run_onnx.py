"""Make an image with an exported model; needs numpy, onnxruntime and pillow. See --help."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image


def sample(folder: Path, noise: Any, rows: list[int], guidance: float | None = None) -> Any:
    """Return images (n, C, H, W) in [0, 1] from normal noise (draws, n, c, h, w)."""
    plan, net = dict(np.load(folder / "sampling.npz")), InferenceSession(folder / "network.onnx")
    scale, known = plan["guidance"] if guidance is None else guidance, list(noise)
    for k, level in enumerate(plan["noise_input"].astype("f4")):
        x, guess = np.tensordot(plan["mix"][k, : len(known)], np.stack(known), 1), []
        for chosen in [rows, [-1] * len(rows)][: 1 + bool(plan["guided"][k] and scale != 1)]:
            feed = {slot.name: plan[slot.name][chosen] for slot in net.get_inputs()[2:]}
            feed["x"] = (x * plan["input_scale"][k]).astype("f4")
            output = net.run(None, {**feed, "noise_input": np.full(len(x), level)})[0]
            guess.append(plan["of_output"][k] * output + plan["of_state"][k] * x)
        x0 = guess[-1] + scale * (guess[0] - guess[-1]) if len(guess) > 1 else guess[0]
        known.append(x0.clip(-1, 1) if plan["clip"] else x0)
    images = np.tensordot(plan["mix"][-1], np.stack(known), 1).astype("f4")
    if (folder / "decoder.onnx").is_file():
        images = InferenceSession(folder / "decoder.onnx").run(None, {"z": images})[0]
    return ((images + 1) / 2).clip(0, 1)


if __name__ == "__main__":
    plan, parser = np.load(Path(__file__).with_name("sampling.npz")), argparse.ArgumentParser()
    parser.add_argument("--name", choices=plan["names"].tolist())
    parser.add_argument("--seed", type=int, default=0)
    asked, shape = parser.parse_args(), (plan["draws"], 1, *plan["shape"])
    row = plan["names"].tolist().index(asked.name) if asked.name else -1
    noise = np.random.default_rng(asked.seed).normal(size=shape)
    image = sample(Path(__file__).parent, noise, [row])[0].transpose(1, 2, 0)
    Image.fromarray((image * 255).round().astype("u1").squeeze()).save("image.png")

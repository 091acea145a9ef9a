#!/bin/sh
# All that is measured on a GPU, in under eight minutes: training steps and sampling of DiT-S, B, XL and a U-Net on 256 px latents, as they
# are and compiled, beside diffusers; the default U-Net's step and sampling beside diffusers; memory.
#     sh benchmarks/gpu.sh [FOLDER for the JSON files, default .]      (QUICK=--quick for a rehearsal without a GPU)
set -e
out=${1:-.}
python=${PYTHON:-python}
here=$(dirname "$0")
mkdir -p "$out"
"$python" "$here/transformer.py" ${QUICK:-} --json "$out/transformer.json"
"$python" "$here/train_step.py" ${QUICK:-} --batch 256 --json "$out/train_step.json"
"$python" "$here/sampling.py" ${QUICK:-} --batch 256 --json "$out/sampling.json"
"$python" "$here/memory.py" ${QUICK:-} --budget 80 --json "$out/memory.json"
# one process beside one for each GPU; with a single GPU, or none, beside two on the CPU: it has what gloo has to show, not NCCL
if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ]; then export CUDA_VISIBLE_DEVICES=; fi
"$python" "$here/processes.py" ${QUICK:-} --rounds 2 --json "$out/processes.json"
# not part of the eight minutes: LoRA on random weights of SDXL's sizes at 1024 px, batch 1, rank 16, base in bfloat16, activations
# recomputed, beside diffusers with peft (extras diffusers, text, peft; 15 GB of memory while the weights are made, 5 GB of disk):
#     python benchmarks/finetune.py --shapes sdxl --json finetune.json

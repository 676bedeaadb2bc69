#!/usr/bin/env bash
# GPT-2 learns Shakespeare twice, with AdamW and with SGD-SaI, side by side; then the two are compared.
#
#   without a GPU   bytes, 4 layers of 128 channels, 0.8 M parameters, 240 updates of 1,024 tokens: in the simulator, one
#                   core each, about 2 minutes
#   with a GPU      GPT-2's tokens, d12 (124 M parameters), 300 updates of 65,536 tokens, one after the other: 6 N FLOP a
#                   token make 1.5e16 FLOP a run, a minute on an H100 at 40% of its peak
#
# Called by `make demo`, which builds the programs. DEVICE=gpu|sim. The result lies in runs/demo-DEVICE/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
device=${DEVICE:-sim}
out=runs/demo-$device

if [ "$device" = gpu ]; then
  data=data/shakespeare_gpt2 tokenizer=gpt2
  shared=(--model d12 --seq-len 1024 --batch-size 16 --total-batch 65536 --steps 300 --warmup-steps 40
          --val-every 50 --val-sequences 64 --sample-every 150)
  adamw=(--learning-rate 6e-4) sgd_sai=(--learning-rate 3e-3)
else
  data=data/shakespeare_bytes tokenizer=bytes
  shared=(--layers 4 --channels 128 --heads 2 --vocab-size 256 --seq-len 128 --batch-size 8 --steps 240
          --warmup-steps 20 --val-every 40 --val-sequences 64 --sample-every 240)
  adamw=(--learning-rate 4e-3) sgd_sai=(--learning-rate 3e-3)
fi

$python data/shakespeare.py --tokenizer "$tokenizer" --output "$data"

# An earlier demo is kept under another name, the newest one only.
if [ -e "$out" ]; then rm -rf "$out.previous"; mv "$out" "$out.previous"; fi
$python scripts/compare.py --device "$device" --precision bf16 --output "$out" \
  --adamw "${adamw[*]}" --sgd_sai "${sgd_sai[*]}" \
  -- --train-data "$data/train_*.bin" --val-data "$data/val_*.bin" "${shared[@]}"

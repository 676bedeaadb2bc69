#!/usr/bin/env bash
# Ten updates of a tiny model by the program in BUILD, as a smoke test under the simulator's checks.
#     dev/test/train_ten_steps.sh build/sim-bf16-adamw-race
# Two micro-steps an update, validation and recomputation are in; any complaint of a check fails it.
set -euo pipefail
build=$1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python3 - "$out" <<'PYTHON'
import random, struct, sys
random.seed(1)
for name, tokens in (("train", 20000), ("val", 3000)):
    with open(f"{sys.argv[1]}/{name}.bin", "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, tokens, 96, *[0] * 252))
        file.write(struct.pack(f"<{tokens}H", *(random.randrange(96) // random.randint(1, 9) for _ in range(tokens))))
PYTHON
for recompute in none block; do
  "$build/train_gpt2" --train-data "$out/train.bin" --val-data "$out/val.bin" --output-dir "$out/$recompute" --layers 2 \
    --channels 64 --heads 1 --vocab-size 96 --seq-len 48 --batch-size 2 --total-batch 192 --steps 10 --val-every 5 \
    --val-sequences 3 --recompute $recompute
done
echo "2 passed, 0 failed"

# shellcheck shell=bash
# What run_124m.sh .. run_1558m.sh share; they source it. It prints what the run takes, builds the program
# and starts it.
#
#   scripts/run_124m.sh [adamw|sgd_sai] [--dry-run] [flags of train_gpt2, which override the script's]
#
#   OPTIMIZER=adamw|sgd_sai   instead of the argument
#   DATA=DIR                  holds *train_*.bin and *val_*.bin: data/text.py's shards, or llm.c's as they are
#   DRY_RUN=1                 instead of --dry-run: prints the arithmetic and the memory plan, and stops.
#                             Without a GPU the simulator does that, for a GPU of SIM_MEMORY_BYTES (80e9)
#   MFU=0.4  PRICE=2.5        assumed share of an H100's dense bf16 peak, and dollars an hour
#   DEVICE=gpu|sim            otherwise a GPU
#
# Before sourcing: name, model, parameters, layers, channels, batch (sequences a micro-step), total (tokens an
# update), steps, and the arrays adamw and sgd_sai with each optimizer's own flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seq_len=1024
h100_flops=989e12 # dense bf16

stop() {
  echo "$0: $1" >&2
  exit 1
}

# The lines that stand in the scripts' heads, computed anew.
print_arithmetic() {
  LC_ALL=C awk -v N="$parameters" -v L="$layers" -v C="$channels" -v T=$seq_len -v total="$total" \
    -v steps="$steps" -v peak=$h100_flops -v mfu="${MFU:-0.4}" -v price="${PRICE:-2.5}" '
    function commas(n, text) {
      for (text = ""; n >= 1000; n = int(n / 1000)) text = sprintf(",%03d", n % 1000) text
      return int(n) text
    }
    function short(x, text) { text = sprintf("%.3g", x); sub(/e\+0*/, "e", text); return text }
    BEGIN {
      tokens = steps * total; flop = 6 * N + 6 * L * C * T; hours = tokens * flop / (peak * mfu) / 3600
      printf "parameters   %s (%d layers, %d channels)\n", commas(N), L, C
      printf "tokens       %s: %s updates of %s; %.0f a parameter\n",
             short(tokens), commas(steps), commas(total), tokens / N
      printf "FLOP         %s a token (6 N + 6 L C T), %s in all\n", short(flop), short(tokens * flop)
      printf "time         %.3g hours on one H100 at %.0f%% of its %.0f TFLOP/s: $%s at $%.2f an hour\n",
             hours, 100 * mfu, peak / 1e12, commas(int(hours * price + 0.5)), price
    }'
}

optimizer=${OPTIMIZER:-adamw}
case ${1:-} in
  adamw | sgd_sai) optimizer=$1 && shift ;;
  -* | '') ;;
  *) stop "'$1': wanted adamw, sgd_sai or a flag of train_gpt2" ;;
esac
case $optimizer in
  adamw) own=("${adamw[@]}") ;;
  sgd_sai) own=("${sgd_sai[@]}") ;;
  *) stop "OPTIMIZER=$optimizer: wanted adamw or sgd_sai" ;;
esac

case ${DRY_RUN:-0} in
  0) ;;
  1) set -- "$@" --dry-run ;;
  *) stop "DRY_RUN=$DRY_RUN: wanted 0 or 1" ;;
esac
dry=0
for argument in "$@"; do [ "$argument" != --dry-run ] || dry=1; done

if [ -z "${DEVICE:-}" ]; then
  if nvidia-smi >/dev/null 2>&1; then DEVICE=gpu
  elif [ $dry = 1 ]; then DEVICE=sim
  else stop "no GPU answers here (nvidia-smi); --dry-run shows what the run would take, in the simulator"; fi
fi
[ "$DEVICE$dry" != sim1 ] || export SIM_MEMORY_BYTES=${SIM_MEMORY_BYTES:-80000000000}

data=${DATA:-data/openwebtext}
if [ $dry = 0 ] && ! compgen -G "$data/*train_*.bin" >/dev/null; then
  stop "no $data/*train_*.bin. Make shards of your own download:
  .venv/bin/python data/text.py FOLDER --output $data
or give a folder that has some, llm.c's too: DATA=FOLDER $0 $optimizer"
fi

echo "GPT-2 $name with $optimizer"
print_arithmetic
"${MAKE:-make}" -s setup
"${MAKE:-make}" -s "build/$DEVICE-bf16-$optimizer/train_gpt2"

exec "build/$DEVICE-bf16-$optimizer/train_gpt2" \
  --train-data "$data/*train_*.bin" --val-data "$data/*val_*.bin" --output-dir "runs/$name-$optimizer" \
  --model "$model" --seq-len $seq_len --batch-size "$batch" --total-batch "$total" \
  --steps "$steps" --warmup-steps 700 --val-every 250 --val-sequences 1024 "${own[@]}" "$@"

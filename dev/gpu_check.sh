#!/usr/bin/env bash
# What is done on a GPU machine, a stage a command, each under 8 minutes:
#
#     dev/gpu_check.sh smoke       two programs are built, and d12 makes 20 steps with each optimizer: the loss falls
#     dev/gpu_check.sh build       all programs and kernel tests; any of them may have been built beforehand
#     dev/gpu_check.sh test        every kernel's test, and test_gpt2 in all four builds
#     dev/gpu_check.sh sanitize    compute-sanitizer's memcheck over the kernels' tests, racecheck over some
#     dev/gpu_check.sh kernels     every kernel's --bench: best of 32 algorithms against the first for the products
#     dev/gpu_check.sh bench_d12   train_gpt2 and PyTorch's torch.compile on the same GPU, alternating; the ratio
#     dev/gpu_check.sh bench_d48   the same for 1558M
#     dev/gpu_check.sh profile     where a step's time goes, both sizes and optimizers, beside dev/roofline.py's prediction
#     dev/gpu_check.sh bench       kernels, bench_d12, bench_d48;     all: everything above
#     dev/gpu_check.sh headers     elsewhere, before: copies what a GPU machine may lack (cxxopts, nlohmann-json) to carry/
#
# --list after a stage prints its commands instead. A row a command is appended to $OUT/gpu_check.tsv as it ends: time,
# GPU, commit, stage, name, seconds, status, result; its output lies beside. OUT is build/gpu_check. The last line is
# "N passed, N failed". DEVICE=sim runs smoke and test on a small model in the simulator. PYTHON: the one with PyTorch.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

STAGE=${1:-}
LIST=${2:-}
DEVICE=${DEVICE:-gpu}
OUT=${OUT:-build/gpu_check}
PYTHON=${PYTHON:-python3}
STAGE_SECONDS=460
TSV=$OUT/gpu_check.tsv
WORK=build/gpu_check/work  # shards and runs, beside what is kept
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ "$DEVICE" = sim ] && GPU=simulator
COMMIT=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
INCLUDES=${EXTRA_INCLUDES:-}
[ -d carry/include ] && INCLUDES="$INCLUDES -Icarry/include"
KERNELS=$(cd dev/kernels && printf '%s\n' ./*.cu | sed 's|^./||; s|\.cu$||')
passed=0 failed=0 deadline=0
most=$STAGE_SECONDS  # seconds that one command may take

# ---- a command, a row ------------------------------------------------------------------------------------------------

# append STAGE NAME SECONDS STATUS RESULT: one write, so that rows of commands side by side don't mix.
append() {
    local row
    row=$(printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s' "$(date -u +%FT%TZ)" "${GPU:-none}" "$COMMIT" "$@")
    echo "$row" >>"$TSV"
    printf '%-8s %-34s %6s s  %s\n' "$4" "$2" "$3" "$5"
}

# run STAGE NAME COMMAND...: runs it within what is left of the stage; the result is its last line. Returns its status.
run() {
    local stage=$1 name=$2 log begin left status
    shift 2
    if [ "$LIST" = --list ]; then
        echo "$name: $*"
        return 0
    fi
    left=$((deadline - SECONDS))
    [ "$left" -gt "$most" ] && left=$most
    if [ $left -lt 5 ]; then
        append "$stage" "$name" 0 FAIL "no time left in this stage's $STAGE_SECONDS s"
        return 1
    fi
    log=$OUT/$stage-${name//[ \/]/-}.txt
    begin=$SECONDS
    timeout --kill-after=10 "$left" "$@" >"$log" 2>&1
    status=$?
    local last
    last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c1-300)
    if [ $status -eq 0 ]; then append "$stage" "$name" $((SECONDS - begin)) ok "$last"
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then append "$stage" "$name" $((SECONDS - begin)) FAIL "ran out of time"
    else append "$stage" "$name" $((SECONDS - begin)) FAIL "status $status: $last"; fi
    return $status
}

# A command whose status counts.
check() {
    if run "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

# The text of $OUT/STAGE-NAME.txt as rows of their own: tables of measurements.
rows_of() {
    [ "$LIST" = --list ] && return
    local line
    while IFS= read -r line; do
        [ -n "$line" ] && append "$1" "$2" - row "$line"
    done <"$OUT/$1-${2//[ \/]/-}.txt"
}

# ---- data and programs -----------------------------------------------------------------------------------------------

program() { echo "build/$DEVICE-$1-$2/train_gpt2"; }

build() {
    run "$1" "build $2" make -s -j"$(nproc)" --no-print-directory EXTRA_INCLUDES="$INCLUDES" "${@:3}"
}

# Shards of random tokens, common ones more often: there is something to learn within 20 steps, and nothing to download.
make_data() {
    [ "$LIST" = --list ] && return
    mkdir -p "$WORK"
    [ -f "$WORK/train_0.bin" ] || "$PYTHON" - "$WORK/train_0.bin" "$1" "$2" <<'END'
import array, random, sys
path, vocabulary, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
used = min(1000, vocabulary)
random.seed(1)
tokens = array.array("H", random.choices(range(used), [1 / (i + 1) for i in range(used)], k=count))
with open(path, "wb") as file:
    array.array("i", [20240520, 1, count, vocabulary] + [0] * 252).tofile(file)
    tokens.tofile(file)
END
}

# Whether the losses of OUTPUT_DIR/log.jsonl fall: the mean of the last three by a tenth of a nat below the first, all finite.
falling_loss() {
    "$PYTHON" - "$1/log.jsonl" <<'END'
import json, math, sys
records = [json.loads(line) for line in open(sys.argv[1])]
losses = [r["loss"] for r in records if r["kind"] == "train"]
good = len(losses) == 20 and all(math.isfinite(x) for x in losses) and sum(losses[-3:]) / 3 < losses[0] - 0.1
print(f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
sys.exit(not good)
END
}

# Flags of every run here; $1 the output directory.
train_flags() {
    [ "$LIST" = --list ] || rm -rf "${WORK:?}/$1"
    echo "--train-data $WORK/train_0.bin --output-dir $WORK/$1 --val-every 0"
}
export -f falling_loss
export PYTHON

# ---- stages ----------------------------------------------------------------------------------------------------------

stage_build() {
    local targets=() p o k
    for p in bf16 fp32; do
        for o in adamw sgd_sai; do targets+=("build/$DEVICE-$p-$o/train_gpt2" "build/$DEVICE-$p-$o/test_gpt2"); done
        for k in $KERNELS; do targets+=("build/$DEVICE-$p/kernels/$k"); done
    done
    if build build all "${targets[@]}"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

stage_smoke() {
    local o flags shape="--model d12 --batch-size 8" vocabulary=50257 tokens=4000000
    [ "$DEVICE" = sim ] && vocabulary=256 tokens=100000 \
        shape="--layers 1 --channels 64 --heads 1 --vocab-size 256 --seq-len 64 --batch-size 4"
    if build smoke programs "$(program bf16 adamw)" "$(program bf16 sgd_sai)"; then passed=$((passed + 1))
    else failed=$((failed + 1)); fi
    make_data $vocabulary $tokens
    for o in adamw sgd_sai; do
        flags=$(train_flags "smoke-$o")
        # shellcheck disable=SC2086  # flags are words
        check smoke "train $o" "$(program bf16 $o)" $flags $shape --steps 20 --warmup-steps 2
        check smoke "falling loss $o" bash -c "falling_loss $WORK/smoke-$o"
    done
}

stage_test() {
    local p o k
    for p in bf16 fp32; do
        for o in adamw sgd_sai; do check test "model $p $o" "build/$DEVICE-$p-$o/test_gpt2"; done
        for k in $KERNELS; do check test "kernel $k $p" "build/$DEVICE-$p/kernels/$k"; done
    done
}

stage_sanitize() {
    local k sanitizer most=120
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    for k in $KERNELS; do
        check sanitize "memcheck $k" "$sanitizer" --tool memcheck --error-exitcode 9 "build/gpu-bf16/kernels/$k"
    done
    for k in layernorm attention; do
        check sanitize "racecheck $k" "$sanitizer" --tool racecheck --error-exitcode 9 "build/gpu-bf16/kernels/$k"
    done
}

stage_kernels() {
    local k
    for k in matmul attention $(echo "$KERNELS" | grep -v -e matmul -e attention -e ptx); do
        check kernels "$k" "build/gpu-bf16/kernels/$k" --bench
        rows_of kernels "$k"
    done
}

# The first of these, fastest first by dev/roofline.py, that this GPU holds, as flags: the program itself says what fits.
fitting() {
    local model=$1 o=$2 batch recompute
    for shape in "64 none" "32 none" "32 gelu-layernorm" "24 none" "20 none" "16 none" "32 block" "8 none"; do
        batch=${shape% *} recompute=${shape#* }
        [ "$model" = d48 ] && [ "$batch" = 64 ] && continue
        if "$(program bf16 "$o")" --train-data "$WORK/train_0.bin" --output-dir "$WORK/fit" --model "$model" \
            --batch-size "$batch" --recompute "$recompute" --dry-run | fits "$batch" "$recompute"; then
            echo "--batch-size $batch --recompute $recompute"
            return
        fi
    done
}

# Reads the memory plan of --dry-run: whether its total is below what is available.
fits() {
    awk '$1 == "total" { for (i = 2; i < NF; i++) if ($i == "of") good = $(i - 1) <= $(i + 1) } END { exit !good }'
}

# ours MODEL OPTIMIZER ROUND: a run of --profile 10, which also times 10 updates as in training.
ours() {
    local flags shape
    if [ "$LIST" = --list ]; then shape="--batch-size WHAT --recompute FITS"; else shape=$(fitting "$1" "$2"); fi
    flags=$(train_flags "$1-$2-$3")
    # shellcheck disable=SC2086
    check "$STAGE" "train_gpt2 $1 $2 $3" "$(program bf16 "$2")" $flags --model "$1" $shape --profile 10
    if [ "$LIST" != --list ]; then cp "$WORK/$1-$2-$3/log.jsonl" "$OUT/$STAGE-$1-$2-$3.jsonl"; fi
}

theirs() {
    check "$STAGE" "torch $1 adamw $2" "$PYTHON" dev/reference/bench_torch.py --model "$1" --fit --steps 15 \
        --batch-size "$([ "$1" = d48 ] && echo 32 || echo 64)"
}

bench_model() {
    make_data 50257 4000000
    ours "$1" adamw 1
    theirs "$1" 1
    ours "$1" sgd_sai 1
    ours "$1" adamw 2
    theirs "$1" 2
    [ "$LIST" = --list ] && return
    run "$STAGE" "ratio $1" "$PYTHON" - "$OUT" "$WORK" "$STAGE" "$1" <<'END'
import glob, json, statistics, sys
out, work, stage, model = sys.argv[1:]
def ours(optimizer):
    speeds = []
    for path in glob.glob(f"{work}/{model}-{optimizer}-*/log.jsonl"):
        for record in map(json.loads, open(path)):
            if record["kind"] == "profile":
                speeds.append(1e3 * record["tokens"] / record["trained_ms"])
    return speeds
theirs = []
for path in glob.glob(f"{out}/{stage}-torch-{model}-adamw-*.txt"):
    lines = [line for line in open(path) if line.startswith("{")]
    theirs += [json.loads(line)["tokens_per_second"] for line in lines[-1:]]
adamw, sgd_sai = ours("adamw"), ours("sgd_sai")
median = lambda x: statistics.median(x) if x else float("nan")
print(f"{model} tokens/s: train_gpt2 adamw {[round(x) for x in adamw]}, sgd_sai {[round(x) for x in sgd_sai]}, "
      f"torch.compile {[round(x) for x in theirs]}; ratio {median(adamw) / median(theirs):.3f} (wanted 1.25)")
END
}

stage_bench_d12() { bench_model d12; }
stage_bench_d48() { bench_model d48; }

stage_profile() {
    local model o
    make_data 50257 4000000
    for model in d12 d48; do
        for o in adamw sgd_sai; do
            ours $model $o profile
            rows_of profile "train_gpt2 $model $o profile"
            check profile "prediction $model $o" "$PYTHON" dev/roofline.py --measured "$WORK/$model-$o-profile/log.jsonl"
            rows_of profile "prediction $model $o"
        done
    done
}

stage_headers() {
    mkdir -p carry/include
    cp /usr/include/cxxopts.hpp carry/include/ && cp -r /usr/include/nlohmann carry/include/ || exit 1
    echo "carry/include: $(du -sh carry/include | cut -f1); this script adds it to EXTRA_INCLUDES where it exists"
}

# ---- main ------------------------------------------------------------------------------------------------------------

usage() { sed -n '/^#     dev/s/^# //p' "$0"; }
case $STAGE in
    headers) stage_headers && exit 0 ;;
    all) stages="build smoke test sanitize kernels bench_d12 bench_d48 profile" ;;
    bench) stages="kernels bench_d12 bench_d48" ;;
    build | smoke | test | sanitize | kernels | bench_d12 | bench_d48 | profile) stages=$STAGE ;;
    *) usage && exit 2 ;;
esac
if [ "$LIST" != --list ]; then
    if [ -z "$GPU" ]; then
        echo "no GPU here (nvidia-smi); DEVICE=sim $0 smoke runs on the simulator, --list shows the commands"
        exit 1
    fi
    mkdir -p "$OUT" "$WORK"
    echo "$GPU, commit $COMMIT, rows go to $TSV"
fi
for STAGE in $stages; do
    deadline=$((SECONDS + STAGE_SECONDS))
    "stage_$STAGE"
done
[ "$LIST" = --list ] && exit 0
rm -rf "${WORK:?}"/*/latest "${WORK:?}"/*/step_*  # saved models; a log is small
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]

#!/usr/bin/env bash
# What is done on a GPU machine, a stage a command, each under 8 minutes, quick under 9:
#
#     dev/gpu_check.sh preflight   what is missing here, a line each; every other stage begins with it, silently
#     dev/gpu_check.sh quick       first: instructions, attention and its speed, d12 with either attention, memcheck
#     dev/gpu_check.sh smoke       two programs are built, and d12 makes 20 steps with each optimizer: the loss falls
#     dev/gpu_check.sh build       all programs and kernel tests; the other stages build what they lack
#     dev/gpu_check.sh test        every kernel's test, and test_gpt2 in all four builds
#     dev/gpu_check.sh sanitize    compute-sanitizer's memcheck over the kernels' tests (--small), the riskiest first
#     dev/gpu_check.sh racecheck   its racecheck, the same way: shared memory that threads don't take turns at
#     dev/gpu_check.sh synccheck   its synccheck: barriers that some threads don't reach
#     dev/gpu_check.sh kernels     every kernel's --bench: best of 32 algorithms against the first for the products
#     dev/gpu_check.sh bench_d12   train_gpt2, on Hopper with either attention, and torch.compile, alternating; the ratios
#     dev/gpu_check.sh bench_d48   train_gpt2 and torch.compile for 1558M, alternating where there is time
#     dev/gpu_check.sh profile     where a step's time goes, both sizes and optimizers, beside dev/roofline.py's prediction
#     dev/gpu_check.sh bench       kernels, bench_d12, bench_d48;     all: everything above
#     dev/gpu_check.sh headers     elsewhere, before: copies what a GPU machine may lack (cxxopts, nlohmann-json) to carry/
#     dev/gpu_check.sh pack        elsewhere, before: the GPU programs that were built there to carry/build.tgz
#
# --list after a stage prints its commands instead. A row a command is appended to $OUT/gpu_check.tsv as it ends: time,
# GPU, commit, stage, name, seconds, status, result. Outputs and logs are gathered in $OUT/logs.tgz after each command, so
# two files are all there is to bring home. The last line is "N passed, N failed"; what no time was left for is skipped.
#
#     OUT=build/gpu_check     PYTHON=python3, the one with PyTorch     DEVICE=sim: quick, smoke and test, simulated, small
#     STAGE_SECONDS=460 (quick: 520) that a stage may take     TORCH_BATCH: PyTorch's first try, else estimated from memory
#     NO_BUILD=1: make isn't called; programs are in carry/build.tgz (see pack) or build/
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

STAGE=${1:-}
LIST=${2:-}
DEVICE=${DEVICE:-gpu}
OUT=${OUT:-build/gpu_check}
PYTHON=${PYTHON:-python3}
NO_BUILD=${NO_BUILD:-}
TORCH_BATCH=${TORCH_BATCH:-}
TSV=$OUT/gpu_check.tsv
WORK=build/gpu_check/work  # shards and runs, beside what is kept
LOGS=build/gpu_check/logs  # what logs.tgz gathers
BUILD=build
[[ -n $NO_BUILD && (-d carry/build || -f carry/build.tgz) ]] && BUILD=carry/build
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
CAPABILITY=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
[ "$DEVICE" = sim ] && GPU=simulator CAPABILITY=9.0
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}  # where nvcc and compute-sanitizer are looked for, if not on the PATH
NVCC=${NVCC:-$(command -v nvcc || ls "$CUDA_HOME/bin/nvcc" 2>/dev/null)}
COMMIT=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
INCLUDES=${EXTRA_INCLUDES:-}
[ -d carry/include ] && INCLUDES="$INCLUDES -Icarry/include"
KERNELS=$(cd dev/kernels && printf '%s\n' ./*.cu | sed 's|^./||; s|\.cu$||' | tr '\n' ' ')
WARM_UP=5 TIMED=20  # steps of a timed run, ours and PyTorch's: the median of those after the warm-up counts
export TORCHINDUCTOR_CACHE_DIR="$PWD/$WORK/inductor"  # a second run compiles little
export PYTHONUNBUFFERED=1                             # what was printed is in the log, whatever ends a program

passed=0 failed=0 skipped=0 deadline=0
most=600  # seconds that one command may take, if the stage has them; a kernel that hangs mustn't take all
least=5   # seconds without which it isn't worth beginning
child='' running='' begun=0

# ---- a command, a row ------------------------------------------------------------------------------------------------

# append NAME SECONDS STATUS RESULT: one write, so that rows of stages side by side don't mix.
append() {
    local row
    row=$(printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s' "$(date -u +%FT%TZ)" "${GPU:-none}" "$COMMIT" "$STAGE" "$@")
    echo "$row" >>"$TSV"
    printf '%-8s %-34s %6s s  %s\n' "$3" "$1" "$2" "$4"
}
passes() { append "$1" "$2" ok "$3" && passed=$((passed + 1)); }
fails() { append "$1" "$2" FAIL "$3" && failed=$((failed + 1)); }
skips() { append "$1" 0 skip "skipped: $2" && skipped=$((skipped + 1)); }

log_of() { echo "$LOGS/$STAGE-${1//[ \/]/-}.txt"; }
left() { echo $((deadline - SECONDS)); }

# All logs so far as one file. It is moved into place, so that one cut short never replaces a whole one.
gather() {
    [ -d "$LOGS" ] || return 0
    tar -czf "$WORK/logs.tgz" -C "$LOGS" . 2>/dev/null
    mv -f "$WORK/logs.tgz" "$OUT/logs.tgz" 2>/dev/null
}

# check NAME COMMAND...: runs it within what is left of the stage, as a row whose result is its last line. It runs in the
# background, since a shell handles no signal while it waits for a command in front. Returns whether it was good.
check() {
    local name=$1 log limit status seconds last
    shift
    if [ "$LIST" = --list ]; then
        echo "$name: $*"
        return 0
    fi
    log=$(log_of "$name")
    rm -f "$log"  # of an earlier call: nothing may be concluded from it
    limit=$(left)
    [ "$limit" -gt "$most" ] && limit=$most
    if [ "$limit" -lt "$least" ]; then
        skips "$name" "no time left"
        return 1
    fi
    begun=$SECONDS running=$name
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 </dev/null &
    child=$!
    wait "$child"
    status=$? child=''
    seconds=$((SECONDS - begun))
    last=$(grep -av '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c1-300)
    if [ $status -eq 0 ]; then passes "$name" $seconds "$last"
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then fails "$name" $seconds "ran out of time: $last"
    else fails "$name" $seconds "status $status: $last"; fi
    gather
    return $status
}

# The text of a command's log as rows of their own: tables of measurements.
rows_of() {
    [ "$LIST" = --list ] && return
    local line log
    log=$(log_of "$1")
    [ -f "$log" ] || return
    while IFS= read -r line; do
        [ -n "$line" ] && append "$1" - row "${line//$'\t'/ }"
    done <"$log"
}

# A signal ends the command that runs, which has two seconds to write what it holds, and the stage.
interrupted() {
    trap '' TERM INT HUP
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null
        for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$child" 2>/dev/null && sleep 0.2; done
        fails "$running" $((SECONDS - begun)) "interrupted by $1"
    else
        fails "$STAGE" 0 "interrupted by $1"
    fi
    exit "$2"
}

# ---- what is there ---------------------------------------------------------------------------------------------------

# absent_headers COMPILER HEADER...: those that it doesn't find.
absent_headers() {
    local compiler=$1 header probe
    shift
    probe=$WORK/headers.cpp
    for header; do printf '#if !__has_include(<%s>)\nabsent %s\n#endif\n' "$header" "$header"; done >"$probe"
    # shellcheck disable=SC2086  # flags are words
    "$compiler" -E -x c++ $INCLUDES "$probe" 2>/dev/null | sed -n 's/^absent //p'
}

loads_cublaslt() {
    "$PYTHON" - "$(dirname "$(readlink -f "$NVCC")")/../lib64" <<'END'
import ctypes, glob, sys
names = ["libcublasLt.so", *(f"libcublasLt.so.{n}" for n in range(12, 20))]
for name in [*names, *glob.glob(sys.argv[1] + "/libcublasLt.so*")]:
    try:
        ctypes.CDLL(name)
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
END
}

# What is missing for any stage, a line each. NO_BUILD wants no compiler, but programs that find their libraries.
missing() {
    local tool header program
    if [ -z "$GPU" ]; then
        echo "nvidia-smi, or a GPU that it names; DEVICE=sim $0 smoke runs on the simulator, --list shows the commands"
    fi
    command -v "$PYTHON" >/dev/null || echo "$PYTHON: not on the PATH; PYTHON=PATH names another"
    if [ -n "$NO_BUILD" ]; then
        for program in "$BUILD/$DEVICE"-*/*_gpt2 "$BUILD/$DEVICE"-*/kernels/*; do
            [[ -f $program && -x $program ]] || continue
            ldd "$program" 2>/dev/null | awk -v p="$program" '/not found/ {
                print $1 ": " p " does not find it; LD_LIBRARY_PATH=FOLDER names where it is" }'
            return
        done
        echo "programs: NO_BUILD=1, but none in $BUILD/$DEVICE-*; make gpu_builds, then $0 pack, elsewhere, bring them"
        return
    fi
    for tool in make g++; do
        command -v $tool >/dev/null || echo "$tool: not on the PATH (Debian: apt-get install $tool; or NO_BUILD=1)"
    done
    if command -v g++ >/dev/null; then
        for header in $(absent_headers g++ cxxopts.hpp nlohmann/json.hpp); do
            echo "$header: not found by g++; $0 headers, where it is, puts it into carry/, or EXTRA_INCLUDES=-IFOLDER"
        done
    fi
    [ "$DEVICE" = sim ] && return
    if [ -z "$NVCC" ]; then
        echo "nvcc: neither on the PATH nor in $CUDA_HOME/bin (NVCC=PATH names it; or NO_BUILD=1)"
        return
    fi
    for header in $(absent_headers "$NVCC" cublasLt.h nvtx3/nvToolsExt.h); do
        echo "$header: not found by nvcc; a part of CUDA's toolkit, or EXTRA_INCLUDES=-IFOLDER"
    done
    loads_cublaslt || echo "libcublasLt: can't be loaded, neither by name nor from lib64 beside nvcc's folder"
}

# Whether a stage may begin. What is missing stands in the table.
ready() {
    [ "$LIST" = --list ] && return
    local line bad=0
    while IFS= read -r line; do
        [ -n "$line" ] && fails preflight - "missing: $line" && bad=1
    done <<<"$(missing)"
    return $bad
}

# ---- data and programs -----------------------------------------------------------------------------------------------

# program PRECISION OPTIMIZER [ATTENTION]; without the last or with `default` it is the source's choice.
program() { echo "$BUILD/$DEVICE-$1-$2$(choice_suffix "${3:-}")/train_gpt2"; }
kernel() { echo "$BUILD/$DEVICE-$2/kernels/$1"; }
choice_suffix() { [ -z "$1" ] || [ "$1" = default ] || echo "-$1"; }

# Attention's products that are worth comparing here.
choices() { if [ "$CAPABILITY" = 9.0 ] || [ "$LIST" = --list ]; then echo mma_sync wgmma; else echo default; fi; }

# build NAME TARGET...: makes them all, or with NO_BUILD=1 looks whether they are there.
build() {
    local name=$1 target absent=()
    shift
    if [ -z "$NO_BUILD" ]; then
        check "build $name" make -s -k -j"$(nproc)" --no-print-directory ${NVCC:+NVCC="$NVCC"} \
            EXTRA_INCLUDES="$INCLUDES" "$@"
    elif [ "$LIST" = --list ]; then echo "build $name: looks for $*"
    else
        for target; do [ -x "$target" ] || absent+=("$target"); done
        if [ ${#absent[@]} -eq 0 ]; then passes "build $name" 0 "NO_BUILD=1: $# programs are there"
        else fails "build $name" 0 "NO_BUILD=1, and these are missing: ${absent[*]}"; fi
    fi
}

# Shards of random tokens, common ones more often: there is something to learn within 20 steps, and nothing to download.
DATA=$WORK/tokens_50257.bin
make_data() {
    local vocabulary=50257 tokens=4000000
    [ "$DEVICE" = sim ] && vocabulary=256 tokens=100000 DATA=$WORK/tokens_256.bin
    [ "$LIST" = --list ] || [ -f "$DATA" ] && return
    timeout 60 "$PYTHON" - "$DATA.part" "$vocabulary" "$tokens" <<'END' && mv "$DATA.part" "$DATA"
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

# ---- training runs ---------------------------------------------------------------------------------------------------

# Flags of every run here; $1 the output directory.
train_flags() {
    [ "$LIST" = --list ] || rm -rf "${WORK:?}/$1"
    echo "--train-data $DATA --output-dir $WORK/$1 --val-every 0"
}

# The first of these, fastest first by dev/roofline.py, that this GPU holds, as flags: the program itself says what fits.
fitting() {
    local batch recompute shape
    [ "$LIST" = --list ] && echo "--batch-size WHAT --recompute FITS" && return
    for shape in "64 none" "32 none" "32 gelu-layernorm" "24 none" "20 none" "16 none" "32 block" "8 none"; do
        batch=${shape% *} recompute=${shape#* }
        [ "$2" = d48 ] && [ "$batch" = 64 ] && continue
        if timeout 30 "$1" --train-data "$DATA" --output-dir "$WORK/fit" --model "$2" \
            --batch-size "$batch" --recompute "$recompute" --dry-run 2>/dev/null | fits; then
            echo "--batch-size $batch --recompute $recompute"
            return
        fi
    done
}

# Reads the memory plan of --dry-run: whether its total is below what is available.
fits() {
    awk '$1 == "total" { for (i = 2; i < NF; i++) if ($i == "of") good = $(i - 1) <= $(i + 1) } END { exit !good }'
}

# train NAME PROGRAM FLAGS...: a run whose log.jsonl is kept as STAGE-NAME.jsonl.
train() {
    local name=$1 run=${1// /-} flags status
    shift
    flags=$(train_flags "$run")
    [ "$LIST" = --list ] || rm -f "$(log_of_train "$name")"
    # shellcheck disable=SC2086
    check "train $name" "$1" $flags "${@:2}"
    status=$?
    [ "$LIST" = --list ] || cp "$WORK/$run/log.jsonl" "$(log_of_train "$name")" 2>/dev/null
    return $status
}
log_of_train() { echo "$LOGS/$STAGE-${1// /-}.jsonl"; }

# ours MODEL OPTIMIZER CHOICE ROUND: at least WARM_UP + TIMED steps as in training, without saving a model.
ours() {
    local path
    path=$(program bf16 "$2" "$3")
    # shellcheck disable=SC2046
    train "$1 $2 $3 $4" "$path" --model "$1" $(fitting "$path" "$1") --profile $((WARM_UP + TIMED - 3))
}

# PyTorch begins at the batch that is estimated to fit, at most ours: a failed try costs a whole compilation.
theirs() {
    local least=60
    # shellcheck disable=SC2086
    check "torch $1 adamw $2" "$PYTHON" dev/reference/bench_torch.py --model "$1" --fit ${TORCH_BATCH:+--start $TORCH_BATCH} \
        --warmup $WARM_UP --steps $TIMED --batch-size "$([ "$1" = d48 ] && echo 32 || echo 64)"
}

# speeds NAME TITLE LABEL=FILE...
speeds() { check "$1" "$PYTHON" dev/gpu_results.py speeds --warmup $WARM_UP --steps $TIMED "${@:2}"; }

# ---- stages ----------------------------------------------------------------------------------------------------------

# `ready` has run, and told what is missing; what only some stages want is told here.
stage_preflight() {
    [ "$LIST" = --list ] && echo "preflight: looks for compilers, headers, libcublasLt, a GPU" && return
    local tool
    for tool in compute-sanitizer ncu; do
        command -v $tool >/dev/null || [ -x "$CUDA_HOME/bin/$tool" ] || append "$tool" - note "missing; few stages want it"
    done
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2>/dev/null ||
        append torch - note "$PYTHON has no torch, which bench_d12 and bench_d48 compare with; PYTHON=PATH names another"
    passes preflight 0 "nothing is missing; $GPU, $(nproc) cores, ${NVCC:-no nvcc}, $("$PYTHON" --version)"
}

stage_quick() {
    local c list shape="--model d12" programs=()
    list=$(choices)
    for c in $list; do programs+=("$(program bf16 adamw "$c")"); done
    most=300 build quick "$(kernel ptx bf16)" "$(kernel attention bf16)" "$(kernel matmul bf16)" "${programs[@]}"
    most=40 check "kernel ptx" "$(kernel ptx bf16)"
    most=90 check "kernel attention" "$(kernel attention bf16)"
    if [ "$DEVICE" != sim ]; then
        most=90 check "attention --bench" "$(kernel attention bf16)" --bench
        rows_of "attention --bench"
    fi
    make_data
    [ "$DEVICE" = sim ] && shape="--layers 1 --channels 64 --heads 1 --vocab-size 256 --seq-len 64 --batch-size 4"
    local timed=()
    for c in $list; do
        # shellcheck disable=SC2046,SC2086
        most=120 train "d12 $c" "$(program bf16 adamw "$c")" $shape \
            $([ "$DEVICE" = sim ] || fitting "$(program bf16 adamw "$c")" d12) --steps 20 --warmup-steps 2
        check "falling loss $c" "$PYTHON" dev/gpu_results.py falling "$(log_of_train "d12 $c")"
        timed+=("$c=$(log_of_train "d12 $c")")
    done
    speeds "speed d12" "d12 adamw, 20 steps," "${timed[@]}"
    if [ "$DEVICE" != sim ]; then most=180 sanitize memcheck attention; fi
    most=90 check "kernel matmul" "$(kernel matmul bf16)"
}

stage_build() {
    local targets=() p o k c
    for p in bf16 fp32; do
        for o in adamw sgd_sai; do targets+=("$(program $p $o)" "$BUILD/$DEVICE-$p-$o/test_gpt2"); done
        for k in $KERNELS; do targets+=("$(kernel "$k" $p)"); done
    done
    for c in $(choices); do [ "$c" = default ] || targets+=("$(program bf16 adamw "$c")"); done
    build all "${targets[@]}"
}

stage_smoke() {
    local o shape="--model d12 --batch-size 8"
    [ "$DEVICE" = sim ] && shape="--layers 1 --channels 64 --heads 1 --vocab-size 256 --seq-len 64 --batch-size 4"
    build programs "$(program bf16 adamw)" "$(program bf16 sgd_sai)"
    make_data
    for o in adamw sgd_sai; do
        # shellcheck disable=SC2086  # flags are words
        most=150 train "$o" "$(program bf16 $o)" $shape --steps 20 --warmup-steps 2
        check "falling loss $o" "$PYTHON" dev/gpu_results.py falling "$(log_of_train "$o")"
    done
}

stage_test() {
    local most=120 targets=() p o k
    for p in bf16 fp32; do
        for o in adamw sgd_sai; do targets+=("$BUILD/$DEVICE-$p-$o/test_gpt2"); done
        for k in $KERNELS; do targets+=("$(kernel "$k" $p)"); done
    done
    most=300 build tests "${targets[@]}"
    for p in bf16 fp32; do
        for o in adamw sgd_sai; do check "model $p $o" "$BUILD/$DEVICE-$p-$o/test_gpt2"; done
        for k in $KERNELS; do check "kernel $k $p" "$(kernel "$k" $p)"; done
    done
}

# All kernels, the named ones first.
ordered() {
    local k seen=' '
    for k in "$@" $KERNELS; do
        [[ " $KERNELS " != *" $k "* || "$seen" == *" $k "* ]] || { echo "$k" && seen+="$k "; }
    done
}

# sanitize TOOL KERNEL...
sanitize() {
    local tool=$1 k sanitizer
    sanitizer=$(command -v compute-sanitizer || echo "$CUDA_HOME/bin/compute-sanitizer")
    shift
    for k; do check "$tool $k" "$sanitizer" --tool "$tool" --error-exitcode 9 "$(kernel "$k" bf16)" --small; done
}
# Each has two minutes. First those in which a wrong address or a missing barrier is likeliest: asynchronous copies, shared
# memory, rows that are spread over threads.
sanitize_all() {
    local most=120 least=20 k targets=()
    for k in $KERNELS; do targets+=("$(kernel "$k" bf16)"); done
    most=300 least=5 build kernels "${targets[@]}"
    # shellcheck disable=SC2046
    sanitize "$1" $(ordered ptx attention layernorm classifier matmul embedding gelu grad_norm)
}
stage_sanitize() { sanitize_all memcheck; }
stage_racecheck() { sanitize_all racecheck; }
stage_synccheck() { sanitize_all synccheck; }

stage_kernels() {
    local most=150 k targets=()
    for k in $KERNELS; do targets+=("$(kernel "$k" bf16)"); done
    most=300 build kernels "${targets[@]}"
    for k in $(ordered matmul attention | grep -vx ptx); do
        check "$k" "$(kernel "$k" bf16)" --bench
        rows_of "$k"
    done
}

# bench MODEL CHOICE...: rounds of ours, with each choice of attention, and theirs; a second round if there is time, so that
# a GPU that slows down or speeds up doesn't favour one. The ratio stands after each, should the next not end.
bench() {
    local model=$1 c round begin files=() programs=() taken=0
    shift
    for c; do programs+=("$(program bf16 adamw "$c")"); done
    build "$model" "${programs[@]}" "$(program bf16 sgd_sai)"
    make_data
    for round in 1 2; do
        if [ $round -gt 1 ] && [ "$(left)" -lt $((taken + 5 > 90 ? taken + 5 : 90)) ]; then
            skips "$model round $round" "no time left: the first took $taken s"
            break
        fi
        begin=$SECONDS
        for c; do
            ours "$model" adamw "$c" $round
            files+=("$c=$(log_of_train "$model adamw $c $round")")
        done
        theirs "$model" $round
        files+=("torch.compile=$(log_of "torch $model adamw $round")")
        taken=$((SECONDS - begin))
        speeds "ratio $model round $round" "$model adamw" "${files[@]}"
    done
    ours "$model" sgd_sai default 1
    speeds "speed $model sgd_sai" "$model" "sgd_sai=$(log_of_train "$model sgd_sai default 1")"
}

# shellcheck disable=SC2046
stage_bench_d12() { bench d12 $(choices); }
stage_bench_d48() { bench d48 default; }

stage_profile() {
    local model o
    build programs "$(program bf16 adamw)" "$(program bf16 sgd_sai)"
    make_data
    for model in d12 d48; do
        for o in adamw sgd_sai; do
            # shellcheck disable=SC2046
            train "$model $o" "$(program bf16 $o)" --model $model $(fitting "$(program bf16 $o)" $model) --profile 10
            rows_of "train $model $o"
            check "prediction $model $o" "$PYTHON" dev/roofline.py --measured "$(log_of_train "$model $o")"
            rows_of "prediction $model $o"
        done
    done
}

# ---- elsewhere, before -----------------------------------------------------------------------------------------------

do_or_say() { if [ "$LIST" = --list ]; then echo "$STAGE: $*"; else "$@" || exit 1; fi; }

stage_headers() {
    do_or_say mkdir -p carry/include
    do_or_say cp /usr/include/cxxopts.hpp carry/include/
    do_or_say cp -r /usr/include/nlohmann carry/include/
    echo "carry/include: this script adds it to EXTRA_INCLUDES where it exists"
}

# What a program has for a debugger on the host stays behind; line numbers of kernels are in the code for the GPU.
stage_pack() {
    local program count=0
    do_or_say rm -rf carry/build carry/build.tgz
    for program in build/gpu-*/*_gpt2 build/gpu-*/kernels/*; do
        [[ -f $program && -x $program ]] || continue
        do_or_say mkdir -p "carry/$(dirname "$program")"
        do_or_say strip -o "carry/$program" "$program"
        count=$((count + 1))
    done
    [ $count -gt 0 ] || [ "$LIST" = --list ] || { echo "pack: no GPU program in build/; make gpu_builds GPU_ARCH=90a makes all" && exit 1; }
    do_or_say tar -czf carry/build.tgz -C carry build
    do_or_say rm -rf carry/build
    [ "$LIST" = --list ] || echo "carry/build.tgz: $count programs, $(du -m carry/build.tgz | cut -f1) MiB; NO_BUILD=1 uses them"
}

unpack() {
    [[ -n $NO_BUILD && carry/build.tgz -nt carry/build ]] || return 0
    rm -rf carry/build && tar -xzf carry/build.tgz -C carry && touch carry/build
}

# ---- main ------------------------------------------------------------------------------------------------------------

usage() { sed -n '/^#     dev/s/^# //p' "$0"; }
EVERY="quick build smoke test sanitize racecheck synccheck kernels bench_d12 bench_d48 profile"
case $STAGE in
    headers | pack) "stage_$STAGE" && exit 0 ;;
    all) stages=$EVERY ;;
    bench) stages="kernels bench_d12 bench_d48" ;;
    preflight) stages=preflight ;;
    *)
        [[ -n $STAGE && " $EVERY " == *" $STAGE "* ]] || { usage && exit 2; }
        stages=$STAGE
        ;;
esac
if [ "$LIST" != --list ]; then
    mkdir -p "$OUT" "$WORK" "$LOGS" && unpack || exit 1
    trap gather EXIT
    trap 'interrupted SIGTERM 143' TERM
    trap 'interrupted SIGINT 130' INT
    trap 'interrupted SIGHUP 129' HUP
    echo "${GPU:-no GPU}, commit $COMMIT, rows go to $TSV"
fi
for STAGE in $stages; do
    deadline=$((SECONDS + ${STAGE_SECONDS:-$([ "$STAGE" = quick ] && echo 520 || echo 460)}))
    ready || continue
    "stage_$STAGE"
done
[ "$LIST" = --list ] && exit 0
rm -rf "${WORK:?}"/*/latest "${WORK:?}"/*/step_*  # saved models; a log is small
echo "$passed passed, $failed failed$([ $skipped -gt 0 ] && echo ", $skipped skipped")"
[ $failed -eq 0 ] && [ $skipped -eq 0 ] && [ $passed -gt 0 ]

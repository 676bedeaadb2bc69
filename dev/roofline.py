"""A performance model of a training step: each kernel group's floor and prediction, measurements beside them.

    python dev/roofline.py                                    # A100, H100, H200 x d12, d48
    python dev/roofline.py --gpu H200 --model d12 --kernels   # every kernel: time, floor, waves, rates
    python dev/roofline.py --measured out/log.jsonl           # a run with --profile 10 beside the prediction

The floor of a launch is max(FLOP / rate of a large product, bytes / rate of a large copy), each tensor that
it reads or writes counted once: what llmc/profile_report.cuh counts. The prediction starts from what the
kernel really moves and adds what is known to cost: waves that don't fill the GPU, the ends of a tile's loop,
loads in flight, launches. Every factor stands below with its reason; none is fitted to a measurement of this
program.
"""

import argparse
import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

BF16, FP32 = 2, 4
HEAD_SIZE = 64
LOGIT_ROWS = 16384  # kMaxLogitRows of llmc/gpt2.cuh

# ---- GPUs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    name: str
    product_flops: float  # of a large bf16 product on random numbers
    copy_bytes: float  # a second, of a large device copy, read plus written
    dense_peak: float  # the data sheet's, for MFU
    sms: int
    shared_bytes: int  # of an SM, for blocks
    attention_flops: tuple  # assumed for attention by mma.sync, forward and backward, T = 1024, causal
    source: str


# The two rates of H100 and H200 were measured, each on one machine: 8192^3 on random numbers, copies of
# several GB. Attention: FlashAttention-2, the same instructions, reaches 229 forward and about 180 backward
# on an H100. The backward pass here makes 5 products where that one makes 5 and a pass over dO; 190 is this
# program's aim. On the A100 half of the matrix rate per clock and SM is there, and exponentials cost the
# same: 115 and 85, the order of FlashAttention-2 there.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "A100",
            260e12,
            1.70e12,
            312e12,
            108,
            163 << 10,
            (115e12, 85e12),
            "not measured: 83% of both data sheet rates",
        ),
        Gpu("H100", 798e12, 3.0e12, 989e12, 132, 227 << 10, (230e12, 190e12), "measured"),
        Gpu("H200", 790e12, 4.3e12, 989e12, 132, 227 << 10, (230e12, 190e12), "measured"),
    )
}

# ---- the model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    layers: int
    channels: int
    batch: int  # sequences of a micro-step
    seq_len: int = 1024
    vocab: int = 50257
    recompute: str = "none"

    @property
    def heads(self):
        return self.channels // HEAD_SIZE

    @property
    def tokens(self):
        return self.batch * self.seq_len

    @property
    def padded_vocab(self):
        return -(-self.vocab // 128) * 128

    @property
    def parameters(self):
        c = self.channels
        return self.vocab * c + self.seq_len * c + self.layers * (12 * c * c + 13 * c) + 2 * c

    @property
    def model_flops_per_token(self):
        """6 N + 6 L C T, the formula of MFU."""
        return 6 * self.parameters + 6 * self.layers * self.channels * self.seq_len

    @property
    def counted_flops_per_token(self):
        """What the kernels do: causal attention half, the padded head, no embedding."""
        c = self.channels
        return 72 * c * c * self.layers + 6 * c * self.padded_vocab + 7 * self.seq_len * c * self.layers


MODELS = {"d12": (12, 768), "d24": (24, 1024), "d36": (36, 1280), "d48": (48, 1600)}
# What the update moves: gradient 4, master 4 + 4, state read and written, bf16 weight 2.
OPTIMIZER_BYTES = {"adamw": 30, "sgd_sai": 22}

# ---- kernels -----------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """One launch, `calls` times a micro-step."""

    group: str
    name: str
    calls: float
    flop: float = 0
    floor_bytes: float = 0  # each tensor once
    bytes: float = 0  # what is moved; 0: the floor's
    blocks: float = 0
    threads: int = 0
    registers: int = 0
    shared: int = 0
    in_flight: float = 0  # bytes that a thread has on the way at once
    product: tuple = ()  # (rows, k, columns, splittable) of a matrix product
    attention: str = ""
    per_update: bool = False

    def __post_init__(self):
        self.bytes = self.bytes or self.floor_bytes

    def floor_s(self, gpu):
        return max(self.flop / gpu.product_flops, self.floor_bytes / gpu.copy_bytes)


def registers_of(kernel, arch):
    """The ceiling in dev/ptxas_table.tsv: occupancy as it was decided, also where no compiler is at hand. For
    a variant that the table lacks 64, with which an SM holds half of its threads."""
    with Path(__file__).with_name("ptxas_table.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["kernel"] == kernel and row["precision"] == "bf16" and row["arch"] == arch:
                return int(row["registers"])
    return 64


def product(group, name, calls, rows, k, columns, out_bytes, extra=0.0, splittable=False):
    """A matrix product (rows, k) x (k, columns); extra: bytes that its epilogue reads or writes beside."""
    moved = BF16 * (rows * k + k * columns) + out_bytes * rows * columns + extra
    return Kernel(group, name, calls, 2.0 * rows * k * columns, moved, product=(rows, k, columns, splittable))


def block_products(s, adds, gelu_fused):
    n, c = s.tokens, s.channels
    again = 2 if s.recompute == "block" else 1
    out = []
    for name, k, m in (("qkv", c, 3 * c), ("attproj", c, c), ("fc", c, 4 * c), ("fcproj", 4 * c, c)):
        gelu = BF16 * n * 4 * c if gelu_fused else 0
        times = s.layers * (again if name != "fcproj" else 1)
        out.append(
            product("block GEMMs", f"{name} forward", times, n, k, m, BF16, gelu if name == "fc" else 0)
        )
        out.append(
            product("block GEMMs", f"{name} dgrad", s.layers, n, m, k, BF16, gelu if name == "fcproj" else 0)
        )
        out.append(
            product("block GEMMs", f"{name} wgrad", s.layers, k, n, m, FP32 * (1 + adds), splittable=True)
        )
    return out


def head_products(s, adds):
    c, v, out = s.channels, s.padded_vocab, []
    chunk = -(-s.tokens // -(-s.tokens // LOGIT_ROWS))
    for first in range(0, s.tokens, chunk):
        rows = min(chunk, s.tokens - first)
        out.append(product("head GEMMs", "logits", 1, rows, c, v, BF16))
        out.append(product("head GEMMs", "head dgrad", 1, rows, v, c, BF16))
        out.append(
            product(
                "head GEMMs", "head wgrad", 1, v, rows, c, FP32 * (2 if adds or first else 1), splittable=True
            )
        )
    return out


def layernorm_kernels(s, arch, sms=132):
    n, c = s.tokens, s.channels
    row = BF16 * n * c
    packs = c // 8
    lanes = next(
        (t, p)
        for t, p, most in ((8, 4, 32), (32, 2, 64), (32, 4, 128), (32, 8, 256), (256, 2, 512))
        if packs <= most
    )
    threads, rows_per_block = (128, 128 // lanes[0]) if lanes[0] <= 32 else (256, 1)
    loads = packs / lanes[0]  # of 16 bytes a thread, from each tensor
    variant = f"{lanes[0]}, {lanes[1]}"

    def forward(name, calls, residual):
        kernel = f"layernorm_forward_kernel<{variant}, {'true' if residual else 'false'}>"
        return Kernel(
            "layernorm + residual",
            name,
            calls,
            0,
            row * (4 if residual else 2),
            blocks=n / rows_per_block,
            threads=threads,
            registers=registers_of(kernel, arch),
            in_flight=16 * loads * (2 if residual else 1),
        )

    back_threads = -(-packs // 32) * 32
    per_sm = 512 // back_threads

    def backward(name, calls, tensors):
        return Kernel(
            "layernorm + residual",
            name,
            calls,
            0,
            tensors * row,
            blocks=per_sm * sms,
            threads=back_threads,
            registers=registers_of("layernorm_backward_kernel", arch),
            in_flight=16 * 2 * (tensors - 1),
        )

    out = [
        forward("layernorm forward", 1, False),
        forward("residual + layernorm", 2 * s.layers, True),
        backward("last layernorm backward", 1, 3),
        backward("layernorm backward + residual", 2 * s.layers, 4),
    ]
    if s.recompute == "gelu-layernorm":
        out.append(forward("layernorm again", 2 * s.layers, False))
    if s.recompute == "block":
        out += [
            forward("layernorm again", s.layers, False),
            forward("residual + layernorm again", s.layers, True),
        ]
    # Partial sums of three gradients a resident block: written, and read by a kernel that finishes.
    partial = per_sm * sms * 3 * c * FP32
    out.append(
        Kernel(
            "layernorm + residual",
            "layernorm gradients, finish",
            2 * s.layers + 1,
            0,
            0,
            bytes=2 * partial,
            blocks=3 * c / 32,
            threads=256,
            registers=40,
            in_flight=64,
        )
    )
    return out


def attention_kernels(s):
    n, c, t = s.tokens, s.channels, s.seq_len
    row = BF16 * n * c
    again = 2 if s.recompute == "block" else 1
    return [
        Kernel(
            "attention forward",
            "attention forward",
            again * s.layers,
            2.0 * n * t * c,
            4 * row,
            blocks=s.batch * s.heads * -(-t // 128),
            threads=128,
            attention="forward",
        ),
        Kernel(
            "attention backward",
            "attention backward",
            s.layers,
            5.0 * n * t * c,
            8 * row,
            blocks=s.batch * s.heads,
            threads=128,
            attention="backward",
        ),
    ]


def gelu_kernels(s, arch, fused_forward, fused_backward):
    n4 = BF16 * s.tokens * 4 * s.channels
    forward = (0 if fused_forward else 2 if s.recompute == "block" else 1) + (s.recompute == "gelu-layernorm")
    threads, blocks = 256, s.tokens * 4 * s.channels / 8 / 256
    out = []
    if forward:
        out.append(
            Kernel(
                "gelu",
                "gelu forward",
                forward * s.layers,
                0,
                2 * n4,
                blocks=blocks,
                threads=threads,
                registers=registers_of("gelu_forward_kernel", arch),
                in_flight=16,
            )
        )
    if not fused_backward:
        out.append(
            Kernel(
                "gelu",
                "gelu backward",
                s.layers,
                0,
                3 * n4,
                blocks=blocks,
                threads=threads,
                registers=registers_of("gelu_backward_kernel", arch),
                in_flight=32,
            )
        )
    return out


def other_kernels(s, arch):
    n, c, t, v = s.tokens, s.channels, s.seq_len, s.padded_vocab
    row = BF16 * n * c
    dwte = 2 * FP32 * min(s.vocab, n) * c
    chunks = -(-n // LOGIT_ROWS)
    return [
        Kernel("token upload", "token upload", 1, 0, 12 * n),
        Kernel(
            "embedding",
            "embedding forward",
            1,
            0,
            2 * row + BF16 * t * c,
            blocks=n / 8,
            threads=256,
            registers=registers_of("embedding_forward_kernel", arch),
            in_flight=32,
        ),
        # dwpe and dwte are two kernels, and each reads dx.
        Kernel(
            "embedding",
            "embedding backward",
            1,
            0,
            row + FP32 * t * c + dwte,
            bytes=2 * row + FP32 * t * c + dwte,
            blocks=n / 32 * max(1, c // 256) / 8,
            threads=256,
            registers=80,
            in_flight=128,
        ),
        Kernel(
            "bias gradients",
            "fc bias gradient",
            s.layers,
            0,
            4 * row,
            blocks=4 * 132,
            threads=256,
            registers=registers_of("bias_backward_partial_kernel", arch),
            in_flight=64,
        ),
        Kernel(
            "classifier",
            "classifier",
            chunks,
            0,
            2.0 * BF16 * n * v / chunks,
            blocks=n / chunks,
            threads=512,
            registers=registers_of("classifier_block_kernel<512, 6288>", arch),
            in_flight=64,
        ),
    ]


def update_kernels(s, optimizer_bytes):
    p = s.parameters
    return [
        Kernel(
            "norm",
            "gradient norm",
            1,
            0,
            FP32 * p,
            blocks=p / 8192,
            threads=256,
            registers=24,
            in_flight=64,
            per_update=True,
        ),
        Kernel(
            "optimizer",
            "update",
            1,
            0,
            optimizer_bytes * p,
            blocks=p / 8192,
            threads=256,
            registers=48,
            in_flight=64,
            per_update=True,
        ),
    ]


def kernels_of(
    s, optimizer_bytes=30, adds=False, gelu_fused=(True, True), bias_gradient_fused=False, arch="sm_90a"
):
    """Every launch of a micro-step and of the update. adds: weight gradients are added to earlier ones."""
    out = block_products(s, adds, False)
    for kernel in out:  # the epilogue's own tensor
        if (kernel.name == "fc forward" and gelu_fused[0]) or (
            kernel.name == "fcproj dgrad" and gelu_fused[1]
        ):
            kernel.floor_bytes += BF16 * s.tokens * 4 * s.channels
            kernel.bytes = kernel.floor_bytes
    out += (
        head_products(s, adds)
        + attention_kernels(s)
        + layernorm_kernels(s, arch)
        + gelu_kernels(s, arch, *gelu_fused)
        + other_kernels(s, arch)
        + update_kernels(s, optimizer_bytes)
    )
    return [kernel for kernel in out if kernel.group != "bias gradients" or not bias_gradient_fused]


# ---- what costs beside the floor ---------------------------------------------------------------------------

# A launch in a CUDA graph: about 1 us from the end of one kernel to the first instruction of the next, and
# about 1.5 us until all SMs work and while the last block ends.
LAUNCH_S = 2.5e-6
# A tile of 128 x 256 loses the time of a loop of this depth: filling the ring of stages before the first
# product and writing the tile after the last, less what another resident tile covers. 11% at K = 768, 6% at
# 1600, nothing at 64K.
TILE = (128, 256)
TILE_ENDS_K = 96
# Streaming kernels read, compute and write in one thread; a copy engine's mix of reads and writes is a little
# better.
STREAM = 0.92
# Bytes in flight that keep memory busy: a load takes about 700 ns under load.
LATENCY_S = 700e-9
REGISTERS_PER_SM, THREADS_PER_SM, BLOCKS_PER_SM = 65536, 2048, 32


def resident_blocks(kernel, gpu):
    """Blocks of a kernel that an SM holds at once."""
    if kernel.attention:
        return 2  # __launch_bounds__(128, 2): 255 registers
    registers = -(-max(kernel.registers, 16) // 8) * 8
    return max(
        1,
        min(
            BLOCKS_PER_SM,
            THREADS_PER_SM // kernel.threads,
            REGISTERS_PER_SM // (registers * kernel.threads),
            gpu.shared_bytes // kernel.shared if kernel.shared else BLOCKS_PER_SM,
        ),
    )


def product_s(kernel, gpu):
    """(seconds, waves): whole waves of 128 x 256 tiles; a weight gradient in as many parts as are best."""
    rows, k, columns, splittable = kernel.product
    best = (math.inf, 0.0)
    for height, width in (TILE, TILE[::-1]):
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        for parts in range(1, 33 if splittable else 2):
            waves = tiles * parts / gpu.sms
            tile_flop = 2.0 * height * width * (k / parts + TILE_ENDS_K)
            seconds = math.ceil(waves) * tile_flop / (gpu.product_flops / gpu.sms)
            if parts > 1:  # partial sums are written and read in fp32
                seconds += 2 * parts * rows * columns * FP32 / gpu.copy_bytes
            best = min(best, (seconds, waves))
    return max(best[0], kernel.bytes / (gpu.copy_bytes * STREAM)), best[1]


# A wave of walked heads takes 5 units however full it is; split, heads take 6 times the share that they fill.
WALKED, SPLIT = 5, 6


def attention_s(kernel, s, gpu):
    """(seconds, waves). Forward has thousands of blocks, the heavy ones first. Backward walks whole waves of
    heads, and splits the rest where that is cheaper: plan_walked_heads() of llmc/attention_backward.cuh."""
    forward, backward = gpu.attention_flops
    resident = 2 * gpu.sms
    if kernel.attention == "forward":
        return max(kernel.flop / forward, kernel.bytes / (gpu.copy_bytes * STREAM)), kernel.blocks / resident
    heads = s.batch * s.heads
    rest = heads % resident
    walked = heads if SPLIT * rest > WALKED * resident else heads - rest
    wave_s = kernel.flop / heads * resident / backward
    seconds = (math.ceil(walked / resident) + SPLIT / WALKED * (heads - walked) / resident) * wave_s
    return max(seconds, kernel.bytes / (gpu.copy_bytes * STREAM)), walked / resident


def stream_s(kernel, gpu):
    """(seconds, waves) of a kernel bound by memory."""
    if not kernel.threads:
        return kernel.bytes / 50e9, 0.0  # over the host's link
    resident = resident_blocks(kernel, gpu)
    waves = kernel.blocks / (resident * gpu.sms)
    in_flight = kernel.in_flight * kernel.threads * resident * gpu.sms
    wanted = LATENCY_S * gpu.copy_bytes / 2  # half of a copy's traffic is reads
    return kernel.bytes / (gpu.copy_bytes * STREAM * min(1.0, in_flight / wanted)), waves


def predict_s(kernel, s, gpu):
    """(seconds of one launch, waves)."""
    if kernel.product:
        seconds, waves = product_s(kernel, gpu)
    elif kernel.attention:
        seconds, waves = attention_s(kernel, s, gpu)
    else:
        seconds, waves = stream_s(kernel, gpu)
    return seconds + LAUNCH_S, waves


# ---- a step ------------------------------------------------------------------------------------------------


@dataclass
class Group:
    flop: float = 0
    bytes: float = 0
    predicted_ms: float = 0
    kernels: list = field(default_factory=list)

    def floor_ms(self, gpu):
        return 1e3 * max(self.flop / gpu.product_flops, self.bytes / gpu.copy_bytes)


def update_groups(
    s, gpu, optimizer_bytes=30, micro_steps=1, gelu_fused=(True, True), bias_gradient_fused=False
):
    """{group: Group} of one update."""
    arch = "sm_80" if gpu.name == "A100" else "sm_90a"
    groups = {}
    for adds, times in ((False, 1), (True, micro_steps - 1)):
        if not times:
            continue
        for kernel in kernels_of(s, optimizer_bytes, adds, gelu_fused, bias_gradient_fused, arch):
            if kernel.per_update and adds:
                continue
            calls = kernel.calls * (1 if kernel.per_update else times)
            group = groups.setdefault(kernel.group, Group())
            group.flop += calls * kernel.flop
            group.bytes += calls * kernel.floor_bytes
            group.predicted_ms += 1e3 * calls * predict_s(kernel, s, gpu)[0]
            group.kernels.append((kernel, calls))
    return groups


# ---- printing ----------------------------------------------------------------------------------------------


def rates(ms, tokens, s, gpu):
    per_second = tokens / ms * 1e3
    return (
        f"{per_second:,.0f} tokens/s, MFU {100 * per_second * s.model_flops_per_token / gpu.dense_peak:.1f}%"
    )


def print_prediction(s, gpu, title, micro_steps, show_kernels):
    print(
        f"\n{title}, {gpu.name} ({gpu.product_flops / 1e12:.0f} TFLOP/s, {gpu.copy_bytes / 1e12:.1f} TB/s, "
        f"{gpu.source})"
    )
    by_optimizer = {
        name: update_groups(s, gpu, moved, micro_steps) for name, moved in OPTIMIZER_BYTES.items()
    }
    groups = by_optimizer["adamw"]
    print(f"{'an update':24}{'floor ms':>10}{'share':>8}{'predicted ms':>14}{'of floor':>10}")
    floor = sum(group.floor_ms(gpu) for group in groups.values())
    for name, group in groups.items():
        if name != "optimizer":
            print_row(name, group.floor_ms(gpu), floor, group.predicted_ms)
    for optimizer, theirs in by_optimizer.items():
        print_row(
            f"optimizer, {optimizer}",
            theirs["optimizer"].floor_ms(gpu),
            floor,
            theirs["optimizer"].predicted_ms,
        )
    for optimizer, theirs in by_optimizer.items():
        floor = sum(group.floor_ms(gpu) for group in theirs.values())
        predicted = sum(group.predicted_ms for group in theirs.values())
        print_row(f"all, {optimizer}", floor, floor, predicted)
        print(
            f"    floor {rates(floor, s.tokens * micro_steps, s, gpu)}; "
            f"predicted {rates(predicted, s.tokens * micro_steps, s, gpu)}"
        )
    if show_kernels:
        print(
            f"\n{'kernel':34}{'calls':>6}{'us':>9}{'floor us':>10}{'of floor':>9}{'waves':>8}"
            f"{'TFLOP/s':>9}{'GB/s':>7}"
        )
        for group in groups.values():
            for kernel, calls in group.kernels:
                seconds, waves = predict_s(kernel, s, gpu)
                print(
                    f"{kernel.name:34}{calls:6.0f}{1e6 * seconds:9.1f}{1e6 * kernel.floor_s(gpu):10.1f}"
                    f"{100 * kernel.floor_s(gpu) / seconds:8.0f}%{waves:8.2f}"
                    f"{kernel.flop / seconds / 1e12:9.0f}{kernel.bytes / seconds / 1e9:7.0f}"
                )


def print_row(name, floor_ms, all_floor_ms, predicted_ms):
    share = f"{100 * floor_ms / all_floor_ms:7.1f}%"
    print(f"{name:24}{floor_ms:10.2f}{share:>8}{predicted_ms:14.2f}{100 * floor_ms / predicted_ms:9.0f}%")


def print_measured(path):
    """A run's profile beside the prediction, with the ceilings that the run measured."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    head = next((record for record in records if record["kind"] == "run"), None)
    profile = next((record for record in reversed(records) if record["kind"] == "profile"), None)
    if not head or not profile:
        sys.exit(f"{path}: no profile in this log; run train_gpt2 with --profile 10")
    model, options = head["model"], head["options"]
    s = Shape(
        model["layers"],
        model["channels"],
        options["batch-size"],
        model["seq_len"],
        model["vocab_size"],
        options["recompute"],
    )
    like = next((gpu for gpu in GPUS.values() if gpu.name in head["gpu"]["name"]), GPUS["H100"])
    # On another GPU attention is assumed to scale as products do.
    scale = 1 if like.name in head["gpu"]["name"] else profile["product_flops"] / like.product_flops
    gpu = Gpu(
        head["gpu"]["name"],
        profile["product_flops"],
        profile["copy_bytes_per_second"],
        like.dense_peak,
        head["gpu"]["sms"],
        like.shared_bytes,
        tuple(scale * rate for rate in like.attention_flops),
        "measured in this run",
    )
    forward, backward, bias = (
        any(f" {epilogue} " in plan and plan.endswith("fused 1") for plan in head["plans"])
        for epilogue in ("gelu_bias", "dgelu", "bgrad")
    )
    state_bytes = OPTIMIZER_BYTES[head["optimizer"]]
    groups = update_groups(s, gpu, state_bytes, profile["micro_steps"], (forward, backward), bias)
    print(f"{path}: {gpu.name}, {head['precision']}, {head['optimizer']}, commit {head['commit']}")
    print(
        f"ceilings {gpu.product_flops / 1e12:.0f} TFLOP/s, {gpu.copy_bytes / 1e12:.2f} TB/s; "
        f"attention assumed after {like.name}'s"
    )
    print(
        f"{'an update':24}{'floor ms':>10}{'predicted':>11}{'measured':>10}{'of floor':>10}"
        f"{'measured / predicted':>22}"
    )
    for row in profile["groups"]:
        predicted = groups[row["group"]].predicted_ms if row["group"] in groups else math.nan
        print(
            f"{row['group']:24}{row['floor_ms']:10.2f}{predicted:11.2f}{row['ms']:10.2f}"
            f"{100 * row['floor_ms'] / row['ms']:9.0f}%{row['ms'] / predicted:22.2f}"
        )
    floor = sum(row["floor_ms"] for row in profile["groups"])
    predicted = sum(group.predicted_ms for group in groups.values())
    measured = profile["trained_ms"]
    print(
        f"{'all, in training':24}{floor:10.2f}{predicted:11.2f}{measured:10.2f}{100 * floor / measured:9.0f}%"
        f"{measured / predicted:22.2f}"
    )
    print(f"measured {rates(measured, profile['tokens'], s, gpu)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, help="one GPU; all without it")
    parser.add_argument(
        "--model", choices=MODELS, help="one model; d12 (64 sequences) and d48 (32) without it"
    )
    parser.add_argument("--batch-size", type=int, help="sequences of 1024 tokens a micro-step")
    parser.add_argument("--micro-steps", type=int, default=8, help="of an update (default 8)")
    parser.add_argument("--recompute", choices=("none", "gelu-layernorm", "block"), default="none")
    parser.add_argument("--kernels", action="store_true", help="every kernel, not only the groups")
    parser.add_argument("--measured", type=Path, metavar="LOG", help="log.jsonl of a run with --profile")
    args = parser.parse_args()
    if args.measured:
        return print_measured(args.measured)
    for gpu in GPUS.values():
        for model in MODELS if args.model else ("d12", "d48"):
            if (args.gpu and gpu.name != args.gpu) or (args.model and model != args.model):
                continue
            s = Shape(
                *MODELS[model],
                args.batch_size or {"d12": 64, "d24": 64}.get(model, 32),
                recompute=args.recompute,
            )
            print_prediction(
                s,
                gpu,
                f"{model}, {args.micro_steps} x {s.batch} x {s.seq_len} tokens",
                args.micro_steps,
                args.kernels,
            )
    return None


if __name__ == "__main__":
    main()

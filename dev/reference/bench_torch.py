"""Times GPT-2 in PyTorch as its users train it: what this program is compared with on the same GPU.

    python dev/reference/bench_torch.py --model d12 --batch-size 64
    python dev/reference/bench_torch.py --model d48 --batch-size 32 --fit
    python dev/reference/bench_torch.py --model d12 --optimizer sgd_sai      # the authors' package

torch.compile, bf16 autocast over fp32 weights, scaled_dot_product_attention, fused AdamW, TF32 for what is
left in fp32, a vocabulary padded to 50304, gradients clipped at 1. Tokens are random and made on the GPU, so
that data costs nothing. A step lasts from the end of the one before to its own end, by CUDA events, as
train_gpt2 counts it; the median of those after the warm-up, which compiles, counts. The last line is one JSON
object.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

MODELS = {"d12": (12, 768), "d24": (24, 1024), "d36": (36, 1280), "d48": (48, 1600)}
HEAD_SIZE = 64

# For --fit: what PyTorch keeps for the backward pass, about 2.5 MB a token for d48, and as layers x channels
# for other models; and of a logit its bf16, its gradient and an fp32 of the loss.
ACTIVATION_BYTES = 2.5e6 / (48 * 1600)
LOGIT_BYTES = 2 + 2 + 4
# Of a parameter: weight, gradient, AdamW's two moments in fp32, and autocast's bf16 copy of the weight.
PARAMETER_BYTES = {"adamw": 18, "sgd_sai": 14}
USABLE = 0.93  # of the GPU's memory; the rest is the context's, the workspaces' and the allocator's gaps


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        batch, seq_len, channels = x.shape
        q, k, v = (
            part.view(batch, seq_len, -1, HEAD_SIZE).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, seq_len, channels))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(channels), Attention(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.fc, self.proj = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.proj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """The loss of (tokens, targets), both (B, T). Head and token embedding are one matrix."""

    def __init__(self, layers, channels, vocab, seq_len):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, channels), nn.Embedding(seq_len, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(layers))
        self.lnf = nn.LayerNorm(channels)
        self.apply(self.initialise)
        for block in self.blocks:
            for weight in (block.attention.proj.weight, block.proj.weight):
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5)

    @staticmethod
    def initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def make_optimizer(name, model, device):
    """Weight decay on tensors of two dimensions, as everywhere."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device == "cuda")
    try:
        from sgd_sai import SGD_sai
    except ImportError:
        sys.exit("--optimizer sgd_sai: the authors' package is missing; pip install sgd-sai==1.0.3")
    return SGD_sai(groups, lr=3e-3, momentum=0.9, weight_decay=0.02)


def shape_of(args):
    layers, channels = MODELS[args.model]
    return args.layers or layers, args.channels or channels


def estimated_batch(args, memory_bytes):
    """The largest batch, up to --batch-size, that is likely to fit: of 8 and more a multiple of 4. A try that
    doesn't fit costs a compilation, minutes for 48 layers."""
    layers, channels = shape_of(args)
    parameters = (args.vocab_size + args.seq_len) * channels + 12 * layers * channels**2
    left = USABLE * memory_bytes - PARAMETER_BYTES[args.optimizer] * parameters
    token = ACTIVATION_BYTES * layers * channels + LOGIT_BYTES * args.vocab_size
    batch = max(1, int(left / (token * args.seq_len)))
    return min(args.batch_size, batch if batch < 8 else batch // 4 * 4)


def smaller(batch):
    return batch - max(1, batch // 4)


def train(args, batch, device):
    """Milliseconds of each timed step, and the last loss."""
    model = Gpt2(*shape_of(args), args.vocab_size, args.seq_len).to(device)
    optimizer = make_optimizer(args.optimizer, model, device)
    step_model = torch.compile(model, mode=args.compile_mode) if args.compile else model
    generator = torch.Generator(device=device).manual_seed(1)
    updates = args.warmup + args.steps
    shape, tokens = (updates, batch, args.seq_len + 1), min(50257, args.vocab_size)
    texts = torch.randint(tokens, shape, device=device, generator=generator)
    ends, loss = [mark(device)], None
    for text in texts:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(args.micro_steps):
            with torch.autocast(device_type=device, dtype=torch.bfloat16):
                loss = step_model(text[:, :-1].contiguous(), text[:, 1:].contiguous()) / args.micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ends.append(mark(device))
    if device == "cuda":
        torch.cuda.synchronize()
    step_ms = [between_ms(begin, end) for begin, end in itertools.pairwise(ends)]
    return step_ms[args.warmup :], loss.item() * args.micro_steps


def mark(device):
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(begin, end):
    return begin.elapsed_time(end) if isinstance(begin, torch.cuda.Event) else 1e3 * (end - begin)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="d12")
    parser.add_argument("--layers", type=int, help="overrides --model's")
    parser.add_argument("--channels", type=int, help="overrides --model's; a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64, help="sequences of a micro-step")
    parser.add_argument("--micro-steps", type=int, default=1, help="of an update")
    parser.add_argument("--optimizer", choices=("adamw", "sgd_sai"), default="adamw")
    parser.add_argument("--steps", type=int, default=20, help="timed updates")
    parser.add_argument("--warmup", type=int, default=5, help="updates before them, which compile")
    parser.add_argument("--compile", type=int, choices=(0, 1), default=1)
    parser.add_argument("--compile-mode", default="default", help="torch.compile's mode")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="take the batch that is estimated to fit the GPU's memory, at most --batch-size, and less until "
        "it does",
    )
    parser.add_argument("--start", type=int, help="first batch of --fit, in place of the estimate")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    batch = args.batch_size
    if args.fit and args.start:
        batch = args.start
    elif args.fit and device == "cuda":
        batch = estimated_batch(args, torch.cuda.get_device_properties(0).total_memory)
    while True:
        try:
            ms, loss = train(args, batch, device)
            break
        except torch.OutOfMemoryError:
            if not args.fit or batch == 1:
                sys.exit(f"--batch-size {batch} does not fit this GPU's memory; give less, or --fit")
        print(f"B={batch} does not fit, trying {smaller(batch)}", flush=True)
        batch = smaller(batch)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
    tokens = batch * args.seq_len * args.micro_steps
    median = statistics.median(ms)
    print(
        f"{args.model} {args.optimizer} B={batch} x {args.micro_steps}, torch {torch.__version__}: "
        f"median {median:.2f} ms ({min(ms):.2f} to {max(ms):.2f}), {1e3 * tokens / median:,.0f} tokens/s, "
        f"loss {loss:.3f}"
    )
    print(
        json.dumps(
            {
                "model": args.model,
                "optimizer": args.optimizer,
                "batch_size": batch,
                "tokens": tokens,
                "step_ms": median,
                "tokens_per_second": 1e3 * tokens / median,
                "loss": loss,
                "torch": torch.__version__,
                "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
            }
        )
    )


if __name__ == "__main__":
    main()

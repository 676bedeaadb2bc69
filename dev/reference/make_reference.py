#!/usr/bin/env python3
"""Makes the reference that test_gpt2 compares with: a GPT-2 of transformers and PyTorch in double precision.

    pip install -r dev/reference/requirements.txt
    python dev/reference/make_reference.py --out DIR [--layers 2 --channels 128 --vocab-size 97 ...]

DIR becomes a directory that Hugging Face opens (config.json, model.safetensors), with, beside them:

    expected.json            all options: sizes, schedule, the optimizers' settings
    expected.safetensors
        tokens               (updates, micro_steps, B, T + 1), as fp32: inputs [..., :-1], targets [..., 1:]
        logits, loss         of the first micro-batch
        grad.NAME            its gradient, and of it alone:
        gsnr.NAME            g-SNR of that gradient as stored, clipped, eps 1e-8
        fed.VARIANT.NAME     weights after three updates fed with it times each of `fed_factors`, clipped
        run.VARIANT.loss, .grad_norm, .learning_rate
                             (updates): a training run, with accumulation, clipping, schedule and decay
        run.VARIANT.norm.NAME   norms of its final weights
        run.VARIANT.NAME        those weights less the first ones

VARIANT is adamw (torch.optim.AdamW), sgd_sai_raw (the authors' package, PyPI sgd-sai) or sgd_sai_normalized
(algorithm 1 of arXiv 2412.11768, with the unbiased variance that the package has). NAME is Hugging Face's.

--compact runs stores the runs' final weights, --compact all the gradients too, as fp16 times a power of two
(NAME.exponent), which keeps a reference small.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from sgd_sai import SGD_sai
from transformers import GPT2Config, GPT2LMHeadModel

FED_FACTORS = [1.0, -0.5, 2.0]
VARIANTS = {
    "adamw": {"learning_rate": 3e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
    "sgd_sai_raw": {"learning_rate": 2e-3, "weight_decay": 0.3, "momentum": 0.9, "eps": 1e-8},
    "sgd_sai_normalized": {"learning_rate": 0.2, "weight_decay": 0.003, "momentum": 0.8, "eps": 1e-8},
}


class NormalizedSai:
    """Algorithm 1 of arXiv 2412.11768: gains are the first gradient's g-SNR over the largest."""

    def __init__(self, groups, lr, momentum, eps):
        self.param_groups = groups
        for group in groups:
            group["lr"] = lr
        self.momentum, self.eps, self.state = momentum, eps, {}

    @torch.no_grad()
    def step(self):
        """One update; gradients are read from .grad, already clipped."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self.state:
            gsnr = {p: p.grad.norm() / (p.grad.std() + self.eps) for p in parameters}
            largest = max(gsnr.values())
            self.state = {p: {"gain": g / largest, "m": None} for p, g in gsnr.items()}
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                first = state["m"] is None
                state["m"] = (
                    p.grad.clone() if first else self.momentum * state["m"] + (1 - self.momentum) * p.grad
                )
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(state["m"], alpha=-float(group["lr"] * state["gain"]))


def make_model(args) -> GPT2LMHeadModel:
    """A GPT-2 in double precision; weights are exact in bf16 and so large that every gradient matters."""
    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.positions,
        n_embd=args.channels,
        n_layer=args.layers,
        n_head=args.channels // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.2)
            elif "wte" in name:
                p.normal_(0.0, 1.5 / math.sqrt(args.channels))  # logits of about 1.5, far from certainty
            elif "wpe" in name:
                p.normal_(0.0, 0.2)
            else:
                p.normal_(0.0, 1.0 / math.sqrt(p.shape[0]))  # (in, out)
            p.copy_(p.bfloat16().double())
    return model.train()


def loss_of(model, batch):
    """Mean cross-entropy in nats of (B, T + 1) tokens, and the logits (B, T, V)."""
    logits = model(batch[:, :-1].long()).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().long()), logits


def clip(model, limit) -> float:
    """g *= limit / G where G > limit > 0, without PyTorch's eps. Returns G, unclipped."""
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    if limit > 0 and norm > limit:
        for p in model.parameters():
            p.grad *= limit / norm
    return norm


def make_optimizer(variant, model):
    """The optimizer of a variant; weight decay on tensors of two dimensions alone."""
    o = VARIANTS[variant]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": o["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    if variant == "adamw":
        return torch.optim.AdamW(groups, lr=o["learning_rate"], betas=(o["beta1"], o["beta2"]), eps=o["eps"])
    if variant == "sgd_sai_raw":
        return SGD_sai(groups, lr=o["learning_rate"], momentum=o["momentum"], eps=o["eps"])
    return NormalizedSai(groups, o["learning_rate"], o["momentum"], o["eps"])


def scheduled(args, peak, k) -> float:
    """Learning rate of update k from 1: linear warm-up, then cosine to a fraction."""
    s = k - 1
    if s < args.warmup_steps:
        return peak * (s + 1) / args.warmup_steps
    p = (s - args.warmup_steps) / (args.updates - args.warmup_steps)
    f = args.final_lr_fraction
    return peak * (f + (1 - f) * (1 + math.cos(math.pi * p)) / 2)


def restore(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
            p.grad = None


def without_key_bias(name, p):
    """Leaves out the K third of the qkv bias: its gradient is rounding, of which AdamW makes full steps."""
    if not name.endswith("attn.c_attn.bias"):
        return p
    q, _, v = p.chunk(3)
    return torch.cat([q, v])


def fed(args, model, variant, weights, gradients) -> dict:
    """Weights after updates fed with the given gradient times each of FED_FACTORS."""
    restore(model, weights)
    optimizer = make_optimizer(variant, model)
    for factor in FED_FACTORS:
        for name, p in model.named_parameters():
            p.grad = gradients[name] * factor
        clip(model, args.grad_clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(args, model, variant, weights, tokens) -> tuple[dict, dict]:
    """A training run: (losses, norms, rates) by update, and the final weights."""
    restore(model, weights)
    optimizer = make_optimizer(variant, model)
    curves = {"loss": [], "grad_norm": [], "learning_rate": []}
    for k in range(1, args.updates + 1):
        rate = scheduled(args, VARIANTS[variant]["learning_rate"], k)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.zero_grad()
        total = 0.0
        for micro in tokens[k - 1]:
            loss, _ = loss_of(model, micro)
            (loss / args.micro_steps).backward()
            total += float(loss) / args.micro_steps
        curves["loss"].append(total)
        curves["grad_norm"].append(clip(model, args.grad_clip))
        curves["learning_rate"].append(rate)
        optimizer.step()
    return curves, {name: p.detach().clone() for name, p in model.named_parameters()}


def store(out, name, tensor, compact):
    """Puts a tensor into `out`: fp32, or, compact, fp16 times a power of two. Returns what is stored."""
    if not compact:
        out[name] = tensor.float().contiguous()
        return out[name].double()
    largest = float(tensor.abs().max())
    exponent = math.ceil(math.log2(largest)) if largest > 0 else 0
    out[name] = (tensor / 2.0**exponent).half().contiguous()
    out[name + ".exponent"] = torch.tensor([float(exponent)])
    return out[name].double() * 2.0**exponent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    for flag, default in [
        ("layers", 2),
        ("channels", 64),
        ("vocab-size", 97),
        ("positions", 40),
        ("seq-len", 33),
        ("batch-size", 3),
        ("micro-steps", 2),
        ("updates", 10),
        ("warmup-steps", 3),
        ("seed", 1),
    ]:
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--grad-clip", type=float, default=1.0)
    parser.add_argument("--final-lr-fraction", type=float, default=0.1)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="those that get fed and run weights")
    parser.add_argument("--compact", choices=["none", "runs", "all"], default="none")
    parser.add_argument(
        "--bf16-weights", action="store_true", help="save model.safetensors as bf16 (it is exact)"
    )
    args = parser.parse_args()
    if args.channels % 64:
        parser.error(f"--channels {args.channels} is not a multiple of 64")
    if args.seq_len > args.positions:
        parser.error(f"--seq-len {args.seq_len} is beyond --positions {args.positions}")

    torch.use_deterministic_algorithms(True)
    model = make_model(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (model.bfloat16() if args.bf16_weights else model.float()).save_pretrained(args.out)
    model = model.double()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(args.seed + 1)
    tokens = torch.randint(
        args.vocab_size,
        (args.updates, args.micro_steps, args.batch_size, args.seq_len + 1),
        generator=generator,
        dtype=torch.int32,
    )
    tokens[..., ::3] = (
        tokens[..., ::3] % 5
    )  # some tokens come often, as in text: long runs in the embedding's backward

    out = {"tokens": tokens.float()}
    model.zero_grad()
    loss, logits = loss_of(model, tokens[0, 0])
    loss.backward()
    out["loss"], out["logits"] = loss.detach().float().reshape(1), logits.detach().float().contiguous()
    # What is fed and measured is the gradient as stored: so rounding it is no error of those that read it.
    gradients = {
        name: store(out, f"grad.{name}", p.grad, args.compact == "all")
        for name, p in model.named_parameters()
    }
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    c = args.grad_clip / norm if 0 < args.grad_clip < norm else 1.0
    for name, g in gradients.items():
        out[f"gsnr.{name}"] = (c * g.norm() / (c * g.std() + 1e-8)).float().reshape(1)
    chosen = [v for v in args.variants.split(",") if v]
    for variant in VARIANTS:
        curves, final = run(args, model, variant, weights, tokens)
        for name, values in curves.items():
            out[f"run.{variant}.{name}"] = torch.tensor(values, dtype=torch.float64).float()
        for name, p in final.items():
            out[f"run.{variant}.norm.{name}"] = without_key_bias(name, p).norm().float().reshape(1)
        if variant not in chosen:
            continue
        for name, p in final.items():
            store(out, f"run.{variant}.{name}", p - weights[name], args.compact != "none")
        for name, p in fed(args, model, variant, weights, gradients).items():
            out[f"fed.{variant}.{name}"] = p.float().contiguous()
    save_file(out, args.out / "expected.safetensors", metadata={"format": "pt"})
    settings = {
        k: v for k, v in vars(args).items() if k not in ("out", "variants", "compact", "bf16_weights")
    }
    settings |= {"fed_factors": FED_FACTORS, "variants": VARIANTS, "torch": torch.__version__}
    (args.out / "expected.json").write_text(json.dumps(settings, indent=2) + "\n")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(
        f"{args.out}: {sum(p.numel() for p in model.parameters())} parameters, loss {float(loss):.4f}, "
        f"{size} bytes"
    )


if __name__ == "__main__":
    main()

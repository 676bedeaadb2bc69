"""Writes logs as train_gpt2 writes them, so that the scripts can be tested without the program.

The numbers are made up but coherent: tokens are step x total-batch, state bytes follow from the parameters,
losses fall.
"""

import json
import math
import random
from pathlib import Path

LAYER_TENSORS = {
    "ln_1.weight": lambda c: c,
    "ln_1.bias": lambda c: c,
    "attn.c_attn.weight": lambda c: 3 * c * c,
    "attn.c_attn.bias": lambda c: 3 * c,
    "attn.c_proj.weight": lambda c: c * c,
    "attn.c_proj.bias": lambda c: c,
    "ln_2.weight": lambda c: c,
    "ln_2.bias": lambda c: c,
    "mlp.c_fc.weight": lambda c: 4 * c * c,
    "mlp.c_fc.bias": lambda c: 4 * c,
    "mlp.c_proj.weight": lambda c: 4 * c * c,
    "mlp.c_proj.bias": lambda c: c,
}


def tensors(layers, channels, vocab_size, positions):
    """[(Hugging Face name, elements)] in the order of the arena."""
    found = [("wte.weight", vocab_size * channels), ("wpe.weight", positions * channels)]
    for layer in range(layers):
        found += [(f"h.{layer}.{name}", n(channels)) for name, n in LAYER_TENSORS.items()]
    found += [("ln_f.weight", channels), ("ln_f.bias", channels)]
    return [(f"transformer.{name}", n) for name, n in found]


def records(
    optimizer="adamw",
    steps=240,
    val_every=40,
    final=2.5,
    start=5.55,
    seed=1337,
    model=(4, 128, 2, 256, 128),  # layers, channels, heads, vocabulary, positions
    device="sim",
    val_files=("data/shakespeare_bytes/val_000000.bin",),
    step_ms=1000.0,
    total_batch=1024,
    sample="HAMLET.\nTo be",
    **options,
):
    """All records of a run that finishes."""
    layers, channels, heads, vocab_size, positions = model
    names = tensors(layers, channels, vocab_size, positions)
    parameters = sum(n for _, n in names)
    padded = parameters + (-vocab_size % 128) * channels
    own = {"beta1": 0.9, "beta2": 0.95} if optimizer == "adamw" else {"momentum": 0.9, "gain": "raw"}
    flags = {
        "train-data": "data/shakespeare_bytes/train_*.bin",
        "val-data": "data/shakespeare_bytes/val_*.bin",
        "output-dir": f"runs/{optimizer}",
        "init-from": "",
        "shuffle": 1,
        "seed": seed,
        "model": "d12",
        "layers": layers,
        "channels": channels,
        "heads": heads,
        "vocab-size": vocab_size,
        "seq-len": positions,
        "batch-size": 8,
        "total-batch": total_batch,
        "steps": steps,
        "learning-rate": 4e-3 if optimizer == "adamw" else 5e-3,
        "warmup-steps": 20,
        "schedule": "cosine",
        "final-lr-fraction": 0.1,
        "weight-decay": 0.1 if optimizer == "adamw" else 0.02,
        "grad-clip": 1,
        **own,
        "eps": 1e-8,
        "val-every": val_every,
        "val-sequences": 256,
        "sample-every": steps,
    } | {name.replace("_", "-"): value for name, value in options.items()}
    yield {
        "kind": "run",
        "version": 1,
        "time": "2025-01-31T23:59:59Z",
        "command": [f"build/{device}-bf16-{optimizer}/train_gpt2", "--steps", str(steps)],
        "device": device,
        "precision": "bf16",
        "optimizer": optimizer,
        "commit": "0123456789ab",
        "options": flags,
        "gpu": {
            "name": "simulator",
            "memory_bytes": 8 << 30,
            "sms": 2,
            "compute_capability": "9.0",
            "peak_bf16_tflops": None,
        },
        "cuda_runtime": 13000,
        "cuda_driver": 13000,
        "cublaslt": 130000,
        "model": {
            "layers": layers,
            "channels": channels,
            "heads": heads,
            "vocab_size": vocab_size,
            "padded_vocab_size": -(-vocab_size // 128) * 128,
            "positions": positions,
            "seq_len": positions,
        },
        "parameters": parameters,
        "padded_parameters": padded,
        "data": {
            "train": {"files": ["data/shakespeare_bytes/train_000000.bin"], "tokens": 4532298},
            "val": {"files": list(val_files), "tokens": 524942} if val_files else None,
        },
        "plans": [],
    }
    state = 8 * padded if optimizer == "adamw" else 4 * padded + 4 * len(names)
    sizes = {"parameters": 2 * padded, "master_weights": 4 * padded, "gradients": 4 * padded}
    sizes |= {
        "optimizer_state": state,
        "activations": 34 * layers * 1024 * channels,
        "logits": 2 * 1024 * vocab_size,
    }
    for owner, size in (sizes | {"scratch": 1 << 20, "workspace": 32 << 20}).items():
        yield {"kind": "memory", "owner": owner, "bytes": size}

    noise = random.Random(f"{optimizer} {seed} {final}")

    def loss(step):
        return final + (start - final) * math.exp(-5 * step / steps)

    for step in range(steps + 1):
        if step > 0:
            if step == 1 and optimizer == "sgd_sai":
                for name, n in names:
                    gsnr = math.sqrt(n - 1) * (1 if name.endswith("weight") else 0.8 + 0.4 * noise.random())
                    yield {"kind": "gsnr", "tensor": name, "n": n, "gsnr": gsnr, "gain": gsnr}
            ms = step_ms * (3 if step == 1 else 1 + 0.05 * noise.random())
            yield {
                "kind": "train",
                "step": step,
                "tokens": step * total_batch,
                "loss": loss(step - 1) + 0.05 * noise.gauss(0, 1),
                "grad_norm": 2.5 * math.exp(-step / steps) + 0.2 * noise.random(),
                "learning_rate": flags["learning-rate"] * min(1, step / 20),
                "step_ms": ms,
                "optimizer_ms": 0.004 * step_ms * (1 if optimizer == "adamw" else 0.73),
                "tokens_per_second": total_batch / ms * 1000,
            }
        if val_files and (step == steps or (val_every and step % val_every == 0)):
            yield {"kind": "val", "step": step, "loss": loss(step)}
        if sample and step == steps:
            yield {"kind": "sample", "step": step, "text": sample}
    yield {"kind": "checkpoint", "step": steps, "path": f"runs/{optimizer}/step_{steps:08d}"}
    yield {"kind": "end", "step": steps, "status": "finished"}


def write(folder, lines=None, **arguments):
    """Writes FOLDER/log.jsonl; `lines` keeps only the first so many. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = list(records(**arguments))[:lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return folder

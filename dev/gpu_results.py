"""What dev/gpu_check.sh concludes from the logs of its runs; the exit status says whether it is good.

    python dev/gpu_results.py falling out/log.jsonl
    python dev/gpu_results.py speeds "d12 adamw" mma_sync=a.jsonl wgmma=b.jsonl torch.compile=torch.txt

falling: 20 steps were made, all losses are finite, and the mean of the last three is a tenth of a nat below
the first. speeds: tokens/s of each LABEL=FILE, a log.jsonl of train_gpt2 or the output of bench_torch.py; of
both the median time of as many steps after the same warm-up counts. Files of one label are runs of the same.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

STEPS = 20
TORCH = "torch.compile"
WANTED_RATIO = 1.25  # tokens/s over PyTorch's


def records_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]


def falling(path):
    losses = [record["loss"] for record in records_of(path) if record["kind"] == "train"]
    if not losses:
        print("no step")
        return False
    print(f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return len(losses) == STEPS and all(map(math.isfinite, losses)) and sum(losses[-3:]) / 3 < losses[0] - 0.1


def tokens_per_second(path, warm_up, steps):
    records = records_of(path)
    if "kind" not in records[0]:  # bench_torch.py has taken the median of its steps
        return records[-1]["tokens"] / records[-1]["step_ms"] * 1e3
    timed = [r for r in records if r["kind"] == "train" and warm_up < r["step"] <= warm_up + steps]
    return timed[0]["tokens"] / timed[0]["step"] / statistics.median(r["step_ms"] for r in timed) * 1e3


def speeds(title, runs, warm_up, steps):
    found, lacking = {}, []
    for label, path in runs:
        try:
            found.setdefault(label, []).append(tokens_per_second(path, warm_up, steps))
        except (OSError, LookupError, ValueError):
            lacking.append(label)
    found = {label: all_runs for label, all_runs in found.items() if all_runs}
    middle = {label: statistics.median(all_runs) for label, all_runs in found.items()}
    text = [f"{label} {', '.join(f'{x:.0f}' for x in all_runs)}" for label, all_runs in found.items()]
    if {"mma_sync", "wgmma"} <= middle.keys():
        gain = middle["wgmma"] / middle["mma_sync"]
        text.append(f"wgmma / mma_sync {gain:.3f}, so {'wgmma' if gain > 1 else 'mma_sync'} is faster")
    if TORCH in middle:
        ratios = {label: speed / middle[TORCH] for label, speed in middle.items() if label != TORCH}
        text += [f"{label} / {TORCH} {ratio:.3f} (wanted {WANTED_RATIO})" for label, ratio in ratios.items()]
    text += [f"no result of {label}" for label in lacking]
    print(f"{title} tokens/s: {'; '.join(text)}")
    return bool(found) and not lacking


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("falling").add_argument("log")
    command = commands.add_parser("speeds")
    command.add_argument("--warmup", type=int, default=5)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("title")
    command.add_argument("runs", nargs="+", metavar="LABEL=FILE")
    args = parser.parse_args()
    if args.command == "falling":
        return not falling(args.log)
    return not speeds(args.title, [run.split("=", 1) for run in args.runs], args.warmup, args.steps)


if __name__ == "__main__":
    sys.exit(main())

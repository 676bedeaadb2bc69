#!/usr/bin/env python3
"""Draws the losses of runs, finished or still going, as a picture.

python scripts/plot.py runs/a                       # writes runs/a/losses.png
python scripts/plot.py runs/a runs/b --output ab.png
python scripts/plot.py runs/a --every 30            # again and again, until interrupted or the run has ended
"""

import argparse
import sys
import time
from pathlib import Path

from charts import losses_png
from runlog import LogError, label_runs, read_log


def draw(paths, output):
    """Writes the picture. Returns the runs."""
    runs = [read_log(path) for path in paths]
    label_runs(runs)
    temporary = output.with_name(f".{output.name}.tmp.png")
    try:
        losses_png(temporary, runs)
        temporary.rename(output)  # a viewer that follows the file never sees half of it
    except OSError as error:
        raise LogError(f"{output}: can't be written: {error.strerror}") from None
    return runs


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="an --output-dir, or its log.jsonl")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: losses.png beside the first log"
    )
    parser.add_argument("--every", type=float, metavar="SECONDS", help="draw again every so often")
    args = parser.parse_args(argv)
    if args.every is not None and not args.every > 0:
        raise LogError(f"--every {args.every}: must be more than 0")
    while True:
        output = args.output
        if output is None:
            first = args.runs[0]
            output = (first if first.is_dir() else first.parent) / "losses.png"
        runs = draw(args.runs, output)
        for run in runs:
            loss = (
                f", validation loss {run.final_val[1]:.4f} at step {run.final_val[0]:,}"
                if run.final_val
                else ""
            )
            print(f"{run.label}: {run.state_text}{loss}")
        print(output, flush=True)
        if args.every is None or all(run.end for run in runs):
            return
        time.sleep(args.every)


if __name__ == "__main__":
    try:
        main()
    except LogError as error:
        sys.exit(f"plot.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

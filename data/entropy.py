#!/usr/bin/env python3
"""Prints the unigram entropy, in nats, of validation tokens: what a model reaches that knows only their
frequencies.

python data/entropy.py data/shakespeare_bytes          # a directory: its val_*.bin
python data/entropy.py data/x/val_000000.bin           # or shards
"""

import argparse
import sys
from pathlib import Path

from shards import DataError, unigram_entropy


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="DIR|SHARD", type=Path)
    args = parser.parse_args(argv)
    paths = []
    for path in args.paths:
        found = sorted(path.glob("val_*.bin")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: no val_*.bin in it")
        paths += found
    entropy = unigram_entropy(paths)
    print(
        f"unigram entropy {entropy.nats:.4f} nats ({entropy.tokens:,} tokens, {entropy.distinct:,} distinct)"
    )


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"entropy.py: {error}")

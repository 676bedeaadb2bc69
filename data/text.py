#!/usr/bin/env python3
"""Turns your own text into token shards for train_gpt2.

  python data/text.py book.txt --output data/book                       # a file
  python data/text.py corpus/ --output data/corpus                      # a folder, with all below it
  python data/text.py 'dump/*.jsonl.zst' --field body --output data/dump
  zcat big.gz | python data/text.py - --separator '<|endoftext|>' --output data/big

Reads .txt and .jsonl, also as .gz or .zst, and .parquet. A .txt file is one document, or several with
--separator; a line of .jsonl and a row of .parquet are one each. Every document is preceded by end-of-text;
empty ones are left out. The last tenth of the documents (--val-fraction), whole, becomes val_*.bin, the
others train_*.bin; a lone document is cut at nine tenths of its tokens. Beside them lie tokenizer.bin and
manifest.json (counts and hashes).

Work goes on in OUTPUT.partial, which is renamed at the end. After an interruption the same command goes on
from the last full shard.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from dataset import build
from encoder import Options
from shards import TOKENIZERS, DataError
from sources import FORMATS, find_sources


def add_options(parser):
    """The options that every data set has."""
    parser.add_argument(
        "--tokenizer", choices=sorted(TOKENIZERS), default="gpt2", help="default: gpt2 (50257 tokens)"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens a shard (default 100000000)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="the part of the documents, from the end, that is for validation (default 0.1; 0: none)",
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one a core"
    )


def describe(manifest, output):
    """A few lines about a finished data set."""
    tokens, documents, name = manifest["tokens"], manifest["documents"], manifest["tokenizer"]["name"]
    lines = [
        f"{output}: {name} tokens: train {tokens['train']:,} in {documents['train']:,} documents,"
        f" val {tokens['val']:,} in {documents['val']:,}; {len(manifest['shards'])} shards"
    ]
    if manifest["split"] == "tokens":
        lines.append("the input is a single document: it was cut in two for validation")
    if documents["empty"]:
        lines.append(f"{documents['empty']:,} empty documents were left out")
    if manifest["replaced_characters"]:
        lines.append(f"{manifest['replaced_characters']:,} bad characters were replaced by U+FFFD")
    return "\n".join(lines)


def main(argv=None):
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help='files, folders, "globs", or - for standard input'
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the new folder for the shards")
    parser.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto", help="default: by the file's name"
    )
    parser.add_argument(
        "--field", default="text", metavar="NAME", help="of .jsonl and .parquet (default text)"
    )
    parser.add_argument(
        "--separator",
        default="",
        metavar="S",
        help=r"what separates documents within a .txt; \n and \t are understood",
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="text that isn't UTF-8: stop, or put U+FFFD",
    )
    add_options(parser)
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise DataError(f"--processes {args.processes}: must be at least 1")
    options = Options(
        tokenizer=args.tokenizer,
        shard_tokens=args.shard_tokens,
        val_fraction=args.val_fraction,
        field=args.field,
        separator=args.separator.replace("\\n", "\n").replace("\\t", "\t"),
        errors=args.errors,
    )
    sources = find_sources(args.inputs, args.format)
    existed = Path(args.output, "manifest.json").exists()
    start = time.perf_counter()
    manifest = build(sources, args.output, options, args.processes)
    seconds = time.perf_counter() - start
    print(describe(manifest, args.output))
    if existed:
        print("it was there already: nothing done")
    else:
        rate = sum(manifest["tokens"].values()) / seconds / args.processes
        print(f"{seconds:.1f} s with {args.processes} processes, {rate:,.0f} tokens/s a process")
    return 0


def run(command):
    """Runs a command's main; a DataError is one line on standard error and status 1."""
    name = Path(sys.argv[0]).name
    try:
        sys.exit(command())
    except DataError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command goes on from the last full shard")


if __name__ == "__main__":
    run(main)

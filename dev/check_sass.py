"""Checks every kernel's machine code: tensor cores, asynchronous copies, overlap, no local memory.

    python dev/check_sass.py build/gpu-bf16-adamw/train_gpt2 [MORE...]

Reads the programs with cuobjdump: CUDA's own, or PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
(pip install into .venv, or anywhere and CUOBJDUMP=path). Without one it says so and exits 0.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from check_ptxas import demangle

# What a kernel must contain, by a part of its name. HMMA: mma.sync; LDSM: ldmatrix; LDGSTS: cp.async; HGMMA:
# wgmma; UTMALDG and UBLKCP: bulk copies of boxes and of rows.
MMA_SYNC = {"HMMA", "LDSM", "LDGSTS"}
WANTED = {
    "attention_forward_kernel": MMA_SYNC,
    "attention_backward_walk_kernel": MMA_SYNC,
    "attention_backward_keys_kernel": MMA_SYNC,
    "attention_backward_queries_kernel": MMA_SYNC,
    "attention_forward_sm90_kernel": {"HGMMA", "LDSM", "UTMALDG"},
    "attention_backward_queries_sm90_kernel": {"HGMMA", "UTMALDG"},
    "attention_backward_keys_sm90_kernel": {"HGMMA", "LDSM", "UTMALDG", "UBLKCP"},
}
SM90_ONLY = {name for name in WANTED if "sm90" in name}  # elsewhere these are a trap that nothing launches
# They compute a step's 32 exponentials a thread while a product runs: all lie between a wait that leaves a
# product under way and the next wait. The compiler may move a wait up, and has.
EXPONENTIALS = 32
LOCAL_MEMORY = {"LDL", "STL"}  # a spill, or an array that is indexed at run time

FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
ARCH = re.compile(r"^arch = (sm_\w+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*)", re.MULTILINE)
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")


def find_cuobjdump():
    """The path of cuobjdump: $CUOBJDUMP, on the PATH, CUDA's, a wheel's in this Python; None without any."""
    wheels = [Path(folder) / part for folder in sys.path for part in ("nvidia", "triton/backends/nvidia")]
    found = [path for wheel in wheels if wheel.is_dir() for path in wheel.rglob("bin/cuobjdump")]
    for candidate in (
        os.environ.get("CUOBJDUMP"),
        shutil.which("cuobjdump"),
        "/usr/local/cuda/bin/cuobjdump",
        *found,
    ):
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    return None


def parse_sass(text):
    """{(symbol, arch): instructions in their order} of cuobjdump --dump-sass."""
    kernels, arch = {}, "?"
    parts = re.split(r"^(?=\s*Function : |arch = )", text, flags=re.MULTILINE)
    for part in parts:
        if match := ARCH.match(part):
            arch = match[1]
        elif match := FUNCTION.match(part):
            kernels[match[1], arch] = INSTRUCTION.findall(part)
    return kernels


def overlaps(instructions):
    """Whether the loop's exponentials, which are the last, lie between a wait that leaves a product under way
    and the next wait."""
    windows = [[False, 0]]  # from wait to wait: whether a product is under way, exponentials
    for instruction in instructions:
        if wait := WAIT.match(instruction):
            windows.append([wait[1] != "0", 0])
        elif instruction.startswith("MUFU.EX2"):
            windows[-1][1] += 1
    under_way, count = next((window for window in reversed(windows) if window[1]), (False, 0))
    return under_way and count >= EXPONENTIALS


def read_program(path, cuobjdump):
    environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}:{os.environ['PATH']}"}  # it runs nvdisasm
    run = subprocess.run(
        [cuobjdump, "--dump-sass", str(path)], text=True, capture_output=True, check=False, env=environment
    )
    if run.returncode != 0:
        sys.exit(f"{path}: cuobjdump failed: {run.stderr.strip()}")
    kernels = parse_sass(run.stdout)
    if not kernels:
        sys.exit(f"{path}: cuobjdump found no machine code in it; was it built by nvcc with code=sm_...?")
    return kernels


def problems_of(kernels, precision):
    """One line for each thing that is wrong, and the number of kernels with nothing wrong."""
    names = dict(zip(kernels, demangle([symbol for symbol, _ in kernels]), strict=True))
    problems, passed, seen = [], 0, set()
    for key, listing in sorted(kernels.items(), key=lambda item: (names[item[0]], item[0][1])):
        name, arch = names[key], key[1]
        instructions = {re.split(r"[.\s]", line, maxsplit=1)[0] for line in listing}
        wrong = (
            [f"touches local memory ({', '.join(sorted(local))})"]
            if (local := instructions & LOCAL_MEMORY)
            else []
        )
        last = re.sub(r"<.*", "", name).split("::")[-1]
        if last in WANTED and (last not in SM90_ONLY or arch.startswith("sm_90")):
            seen.add((last, arch))
            if missing := WANTED[last] - instructions:
                wrong.append(f"has no {', no '.join(sorted(missing))}")
            if last in SM90_ONLY and not overlaps(listing):
                wrong.append(f"no {EXPONENTIALS} exponentials between a partial wait and the next")
        problems += [f"{name} {arch}: {what}" for what in wrong]
        passed += not wrong
    archs = {arch for _, arch in kernels}
    if precision == "bf16":  # the program must hold what is to be checked
        problems += [
            f"{wanted} {arch}: not in the program"
            for wanted in WANTED
            for arch in sorted(archs)
            if (wanted, arch) not in seen and (wanted not in SM90_ONLY or arch.startswith("sm_90"))
        ]
    return problems, passed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="+", type=Path)
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("skipped: no cuobjdump here; .venv/bin/pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 0
    passed, failed = 0, 0
    for path in args.programs:
        precision = "fp32" if "fp32" in str(path) else "bf16"
        problems, good = problems_of(read_program(path, cuobjdump), precision)
        for problem in problems:
            print(f"FAIL {path}: {problem}")
        passed, failed = passed + good, failed + len(problems)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())

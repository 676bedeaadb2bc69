"""Tests the simulator's checks on planted bugs and on correct but tricky kernels: dev/test/planted/.

    python dev/test/simulator_test.py [--only WORD] [--no-build]

A planted bug must end its program with status 1 and with a message that names the place; where a mode finds
it, such as SIM_LATE=1, the same program must pass without that mode, so that the right check is known to
have found it. A correct program must pass in every build and mode. Nothing may hang. The last line is "N
passed, N failed".
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
SOURCES = TREE / "dev/test/planted"
PROGRAMS = TREE / "build/planted"
TIMEOUT_S = 120

CORRECT_RUNS = [  # (build, environment)
    ("normal", ""),
    ("normal", "SIM_THREADS=1"),
    ("normal", "SIM_LATE=1"),
    ("normal", "SIM_SHUFFLE=1"),
    ("normal", "SIM_SHUFFLE=2 SIM_LATE=1"),
    ("memory", ""),
    ("memory", "SIM_LATE=1 SIM_SHUFFLE=3"),
    ("race", ""),
    ("race", "SIM_SHUFFLE=4"),
]


@dataclass
class Run:
    """One program run and what must come of it; an empty message means that it must succeed."""

    program: str
    case: str
    build: str
    environment: str
    message: str

    @property
    def name(self) -> str:
        return " ".join(filter(None, [f"{self.program}/{self.case}", self.build, self.environment]))


def marked_lines() -> dict[str, str]:
    """The regular expression FILE:LINE of every line marked "BUG NAME"."""
    places = {}
    for source in sorted(SOURCES.glob("*.cu")):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if mark := re.search(r"// BUG (\w+)$", line):
                assert mark[1] not in places, f"two lines are marked BUG {mark[1]}"
                places[mark[1]] = rf"[\w./]*{re.escape(source.name)}:{number}\b"
    return places


def list_runs() -> list[Run]:
    """Every case of every program, as its own --list says."""
    places = marked_lines()
    runs = []
    for source in sorted(SOURCES.glob("*.cu")):
        program = source.stem
        built = sorted(PROGRAMS.glob(f"*/{program}"))
        assert built, f"{program} is not built"
        listing = subprocess.run(
            [built[0], "--list"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        ).stdout
        for line in listing.splitlines():
            case, build, environment, message = line.split("\t")
            if program == "correct":
                runs += [Run(program, case, b, e, "") for b, e in CORRECT_RUNS]
                continue
            runs.append(
                Run(program, case, build, environment, re.sub(r"@(\w+)", lambda m: places[m[1]], message))
            )
            if environment.startswith(("SIM_LATE", "SIM_SHUFFLE")):  # these modes find what plain runs don't
                runs.append(Run(program, case, build, "SIM_THREADS=1", ""))
    return runs


def execute(run: Run) -> str:
    """Why the run is not as it must be, or the empty string."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SIM_")}
    environment |= dict(setting.split("=") for setting in run.environment.split())
    command = [PROGRAMS / run.build / run.program, run.case]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, cwd=TREE, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"hung for {TIMEOUT_S} s"
    output = done.stdout + done.stderr
    wanted = 1 if run.message else 0
    if done.returncode != wanted:
        return f"exit status {done.returncode}, not {wanted}:\n{output}"
    if run.message and not re.search(run.message, output, re.DOTALL):
        return f"no message like\n  {run.message}\nin\n{output}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="the runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--no-build", action="store_true", help="with the programs as they lie in build/planted"
    )
    arguments = parser.parse_args()
    if not arguments.no_build:
        subprocess.run(
            ["make", "-s", "-f", "dev/test/planted/Makefile", f"-j{arguments.jobs}"], cwd=TREE, check=True
        )
    runs = [run for run in list_runs() if arguments.only in run.name]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for run, why in zip(runs, pool.map(execute, runs), strict=False):
            failed += bool(why)
            what = "found" if run.message else "accepted"
            print(f"{'FAIL' if why else 'ok  '} {run.name:60} {why if why else what}", flush=True)
    print(f"{len(runs) - failed} passed, {failed} failed")
    return 0 if runs and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

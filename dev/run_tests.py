"""Runs test programs side by side and counts: `make test` ends in its last line, "N passed, N failed".

    python dev/run_tests.py [--jobs N] [--only WORD] NAME=COMMAND...

A command's own count is read from its output: "N passed, N failed" of our programs, GoogleTest's and pytest's
summaries; one that prints "skipped: WHY" last counts as skipped. A command that exits non-zero without a
count of failures, dies of a signal, runs over its time or tests nothing counts as one failure. The output of
a failing command is shown whole, that of the others is kept in build/test-logs/.
"""

import argparse
import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 1800
LOGS = Path("build/test-logs")

COUNTS = [  # the last match of each in the output counts
    (re.compile(r"(\d+) passed, (\d+) failed"), lambda m: (int(m[1]), int(m[2]))),
    (
        re.compile(r"^=+ .*?(?:(\d+) failed)?(?:, )?(?:(\d+) passed)?.* in [\d.]+s.*=+$", re.M),
        lambda m: (int(m[2] or 0), int(m[1] or 0)),
    ),
]
GTEST_PASSED = re.compile(r"^\[  PASSED  \] (\d+) tests?\.", re.M)
GTEST_FAILED = re.compile(r"^\[  FAILED  \] (\d+) tests?, listed below", re.M)


@dataclass
class Result:
    name: str
    passed: int
    failed: int
    skipped: bool
    seconds: float
    why: str
    output: str


def count(output: str) -> tuple[int, int]:
    """Tests (passed, failed) that an output reports."""
    if GTEST_PASSED.search(output) or GTEST_FAILED.search(output):
        passed, failed = GTEST_PASSED.findall(output), GTEST_FAILED.findall(output)
        return sum(map(int, passed)), sum(map(int, failed))
    for pattern, read in COUNTS:
        matches = list(pattern.finditer(output))
        if matches:
            return read(matches[-1])
    return 0, 0


def run(name: str, command: str) -> Result:
    """Runs one command through the shell, in a process group of its own so that a time-out ends all of it."""
    begin = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    why = ""
    try:
        raw, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raw, _ = process.communicate()
        why = f"ran over {TIMEOUT_S} s"
    output = raw.decode(errors="replace")
    passed, failed = count(output)
    if not why and process.returncode != 0 and failed == 0:
        why = f"exit status {process.returncode}"
    skipped = not why and passed + failed == 0 and output.strip().split("\n")[-1].startswith("skipped: ")
    if skipped:
        why = output.strip().split("\n")[-1]
    elif not why and passed + failed == 0:
        why = "tested nothing"
    if why and not skipped:
        failed += 1
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{name.replace('/', '-')}.txt").write_text(output)
    return Result(name, passed, failed, skipped, time.monotonic() - begin, why, output)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="run the commands whose name contains this")
    parser.add_argument("tests", nargs="+", metavar="NAME=COMMAND")
    arguments = parser.parse_args()
    tests = [tuple(test.split("=", 1)) for test in arguments.tests]
    tests = [test for test in tests if arguments.only in test[0]]

    results = []
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run, *test) for test in tests]
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            result = future.result()
            results.append(result)
            if result.failed:
                print(result.output, end="" if result.output.endswith("\n") else "\n")
            status = "FAIL" if result.failed else "skip" if result.skipped else "ok  "
            print(
                f"[{done}/{len(tests)}] {status} {result.name:44} "
                f"{result.passed:5} passed {result.failed:3} failed "
                f"{result.seconds:6.1f} s {result.why}",
                flush=True,
            )
    for result in results:
        if result.failed:
            print(f"FAIL {result.name} {result.why}")
    print(f"{time.monotonic() - begin:.0f} s")
    passed, failed = sum(r.passed for r in results), sum(r.failed for r in results)
    skipped = sum(r.skipped for r in results)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())

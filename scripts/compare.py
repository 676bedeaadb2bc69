#!/usr/bin/env python3
"""Compares optimizers on GPT-2: losses, memory, time.

Trains with both builds, alike in data, seed and tokens, and compares; what follows -- goes to both:
  python scripts/compare.py --output runs/x -- --train-data 'data/x/train_*.bin' --val-data 'data/x/val_*.bin'
  python scripts/compare.py --adamw "--learning-rate 4e-3" --sgd_sai "--learning-rate 5e-3" \\
      --sgd_sai "--gain one --learning-rate 1" -- --steps 240 ...     # each --adamw or --sgd_sai is one run
Or compares runs that exist:
  python scripts/compare.py runs/a runs/b runs/c --output runs/abc

Prints a table, and writes losses.png, report.html (one file, to open or to send) and summary.md into
--output.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from charts import losses_png
from findings import ROOT, Findings
from report import printable, write_report
from runlog import LogError, Tail, duration, read_log

OPTIMIZERS = ("adamw", "sgd_sai")
POLL_SECONDS = 0.3
PLAIN_SECONDS = 20  # between lines of progress where the screen isn't a terminal


# ---- running both builds


@dataclass
class Job:
    """One training run: what to start, and what has become of it."""

    name: str
    command: list
    folder: Path
    process: subprocess.Popen | None = None
    status: int | None = None
    log: Tail | None = None
    shown: float = 0.0

    @property
    def screen_path(self):
        """Where what the program prints goes."""
        return self.folder.with_name(self.folder.name + ".txt")

    def start(self, environment):
        self.log = Tail(self.folder)
        with open(self.screen_path, "wb") as screen:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def progress(self):
        """A line about where it stands."""
        if self.log:
            self.log.new_records()
        run = self.log and self.log.run
        if self.status is not None and self.status != 0:
            return f"{self.name:<10} failed with status {self.status}; see {self.screen_path}"
        if run is None or not (run.train or run.val):
            return f"{self.name:<10} {'waiting' if self.process is None else 'starting'}"
        text = f"{self.name:<10} step {run.last_step:,}/{run.steps:,}"
        if run.train:
            last = run.train[-1]
            text += f"  loss {last['loss']:.3f}" if last["loss"] is not None else "  loss nan"
        text += f"  val {run.val_losses[-1][1]:.3f}" if run.val_losses else ""
        if self.status == 0:
            return text + "  done"
        if run.train and (step_ms := run.median("step_ms")):
            left = (run.steps - run.last_step) * step_ms / 1000
            text += f"  {run.train[-1].get('tokens_per_second') or 0:,.0f} tok/s  {duration(left)} left"
        return text


def make_jobs(args, common):
    """The runs that the command line asks for, AdamW's first."""
    jobs = []
    device = args.device or default_device(args)
    precision = args.precision or "bf16"
    for optimizer in OPTIMIZERS:
        binary = args.build_dir / f"{device}-{precision}-{optimizer}" / "train_gpt2"
        axes = f"DEVICE={device} PRECISION={precision} OPTIMIZER={optimizer}"
        if not binary.is_file():
            raise LogError(f"{binary}: not built yet: run `make train_gpt2 {axes}`")
        for number, own in enumerate(getattr(args, optimizer) or [""], 1):
            name = optimizer if number == 1 else f"{optimizer}_{number}"
            options = [*common, *shlex.split(own)]
            for option in options:
                if option.split("=")[0] == "--output-dir":
                    raise LogError("--output-dir: each run has its own, in --output; leave it out")
            folder = args.output / name
            command = [os.path.relpath(binary), *options, "--output-dir", str(folder)]
            command[0] = command[0] if os.sep in command[0] else os.path.join(".", command[0])
            jobs.append(Job(name, command, folder))
    return jobs, device


def default_device(args):
    """gpu where both GPU builds and a GPU are, else sim."""
    builds = [args.build_dir / f"gpu-{args.precision or 'bf16'}-{optimizer}" for optimizer in OPTIMIZERS]
    if not all((build / "train_gpt2").is_file() for build in builds) or not shutil.which("nvidia-smi"):
        return "sim"
    return "gpu" if subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout else "sim"


def run_jobs(jobs, device):
    """Runs all: one a core in the simulator, one after the other on a GPU, where they would disturb each
    other.
    """
    cores = len(os.sched_getaffinity(0))
    at_once = min(len(jobs), cores) if device == "sim" else 1
    environment = dict(os.environ)
    if device == "sim":
        threads = str(max(1, cores // at_once))
        environment |= {"SIM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    screen = Screen()
    try:
        while any(job.status is None for job in jobs):
            running = [job for job in jobs if job.process is not None and job.status is None]
            for job in jobs:
                if job.process is None and len(running) < at_once:
                    job.start(environment)
                    running.append(job)
            for job in running:
                job.status = job.process.poll()
            screen.show(jobs)
            time.sleep(POLL_SECONDS)
        screen.show(jobs, last=True)
    except BaseException:
        for job in jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)
        for job in jobs:
            if job.process is not None:
                job.process.wait()
        raise


class Screen:
    """The progress of all runs: lines that are written over on a terminal, else now and then a line."""

    def __init__(self):
        self._terminal = sys.stdout.isatty()
        self._lines = 0

    def show(self, jobs, last=False):
        now = time.monotonic()
        if self._terminal:
            columns = shutil.get_terminal_size().columns - 1  # 80 where the terminal doesn't say
            text = "".join(f"\x1b[2K{job.progress()[:columns]}\n" for job in jobs)
            sys.stdout.write((f"\x1b[{self._lines}A" if self._lines else "") + text)
            self._lines = len(jobs)
        else:
            for job in jobs:
                due = now - job.shown > PLAIN_SECONDS and job.process is not None and job.status is None
                if due or (job.status is not None and job.shown >= 0):
                    print(job.progress())
                    job.shown = now if job.status is None else -1.0  # its last line is said once
        sys.stdout.flush()


# ---- results


def print_table(findings):
    """The table, the options that differ, the verdict and what it doesn't show, for a terminal."""
    runs = findings.runs
    rows = [(row.name, row.values) for row in findings.rows]
    rows += [(row.name, row.values) for row in findings.option_rows if row.name != "--output-dir"]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(run.label), *(len(values[i]) for _, values in rows)) for i, run in enumerate(runs)]
    if first + sum(widths) + 2 * len(widths) > 160:  # labels of many runs: numbered instead
        for i, run in enumerate(runs, 1):
            print(f"({i}) {run.label}")
        labels = [f"({i})" for i in range(1, len(runs) + 1)]
        widths = [min(width, 28) for width in widths]
    else:
        labels = [run.label for run in runs]
    for name, values in [("", labels), *rows]:
        cells = "  ".join(
            _shortened(value, width).ljust(width) for value, width in zip(values, widths, strict=True)
        )
        print(f"{name:<{first}}  {cells}".rstrip())
    print(f"\n{findings.verdict}\n")
    print("What this doesn't show:")
    for caveat in findings.caveats:
        print(f"- {caveat}")


def _shortened(text, width):
    return text if len(text) <= width else text[: width - 3] + "..."


def write_results(findings, output):
    """Writes losses.png, report.html and summary.md. Returns their paths."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        picture = output / "losses.png"
        losses_png(picture, findings.runs, findings.entropy.nats if findings.entropy else None)
        return [picture, *write_report(output, findings)]
    except OSError as error:
        raise LogError(f"{error.filename or output}: can't be written: {error.strerror}") from None


def print_samples(runs):
    """What each model wrote last."""
    for run in runs:
        if run.samples:
            text = printable(run.samples[-1]["text"])
            print(f"\n{run.label} writes after {run.samples[-1]['step']:,} steps:")
            print("\n".join("  " + line for line in text.splitlines()[:16]))


def parse(argv):
    """(arguments, what stands behind --)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, common = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, None)
    joined = []
    for word in argv:  # a value that begins with - is taken for an option, unless it is joined to its own
        if joined and joined[-1] in ("--adamw", "--sgd_sai"):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", type=Path, help="existing: an --output-dir or a log.jsonl"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: runs/compare-TIME; for RUNs their folder"
    )
    parser.add_argument(
        "--device", choices=("gpu", "sim"), help="default: gpu where one is, with both builds"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16")
    parser.add_argument(
        "--build-dir", type=Path, default=ROOT / "build", metavar="DIR", help="default: build"
    )
    for optimizer in OPTIMIZERS:
        words = (
            f"a run with these options of its own; may be repeated (default: one {optimizer} run, without)"
        )
        parser.add_argument(f"--{optimizer}", action="append", metavar='"OPTIONS"', help=words)
    args = parser.parse_args(joined)
    if args.runs and (common is not None or args.adamw or args.sgd_sai):
        raise LogError("give either runs that exist, or options to train with, not both")
    if not args.runs and not common:
        raise LogError("give runs that exist, or after -- the options to train with; see --help")
    return args, common


def trained(args, common):
    """Trains. Returns (the runs, how many jobs failed)."""
    args.output = args.output or Path("runs", time.strftime("compare-%Y%m%d-%H%M%S"))
    jobs, device = make_jobs(args, common)
    for job in jobs:
        if (job.folder / "log.jsonl").exists():
            raise LogError(f"{job.folder}: holds a run already; choose another --output")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogError(f"{args.output}: can't be written: {error.strerror}") from None
    run_jobs(jobs, device)
    failed = [job for job in jobs if job.status != 0]
    runs = []
    for job in jobs:
        if job in failed:
            print_failure(job)
        if (job.folder / "log.jsonl").exists():
            runs.append(read_log(job.folder))
    if not runs:
        raise LogError("no run wrote a log")
    return runs, len(failed)


def print_failure(job):
    """The end of what a failed run printed."""
    lines = job.screen_path.read_text(errors="replace").splitlines()[-8:]
    print(
        f"{job.name} failed with status {job.status}; it printed last ({job.screen_path}):", file=sys.stderr
    )
    print("\n".join("  " + line for line in lines), file=sys.stderr)


def main(argv=None):
    """The command. Returns the exit status: 1 where a run that was started here failed."""
    args, common = parse(argv)
    if args.runs:
        runs, failed = [read_log(path) for path in args.runs], 0
        if len({run.path for run in runs}) < len(runs):
            raise LogError("a run is named twice")
        output = args.output or Path(os.path.commonpath([run.path.parent for run in runs]))
    else:
        runs, failed = trained(args, common)
        output = args.output
    findings = Findings(runs)
    written = write_results(findings, output)
    print_table(findings)
    print_samples(findings.runs)
    print("", *written, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LogError as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `compare.py ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere

"""Reads log.jsonl, what a run of train_gpt2 leaves: finished, still growing, or ended by a crash."""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

OPTIMIZER_TITLES = {"adamw": "AdamW", "sgd_sai": "SGD-SaI"}
SHORT_NAMES = {"learning-rate": "lr", "weight-decay": "wd", "warmup-steps": "warm-up", "grad-clip": "clip"}
WARMUP_STEPS = 2  # steps left out of medians: the first ones pay for caches and allocations


class LogError(Exception):
    """One line for the user: what is wrong, where, and what to do."""


@dataclass
class Run:
    """One run's log. Records are as they were written, in order; a missing part is empty or None."""

    path: Path
    head: dict
    memory: dict = field(default_factory=dict)  # owner -> bytes
    gsnr: list = field(default_factory=list)
    train: list = field(default_factory=list)
    val: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    end: dict | None = None
    damaged_lines: list = field(default_factory=list)  # numbers of lines that are no records
    label: str = ""

    @property
    def optimizer(self):
        return self.head.get("optimizer", "?")

    @property
    def title(self):
        return OPTIMIZER_TITLES.get(self.optimizer, self.optimizer)

    @cached_property
    def options(self):
        """{flag without its dashes: value}."""
        return dict(self.head.get("options", {}))

    @property
    def steps(self):
        """How many steps were wanted."""
        return int(self.options.get("steps", 0))

    @property
    def last_step(self):
        records = [*self.train[-1:], *self.val[-1:], *self.skipped[-1:]]
        return max((record["step"] for record in records), default=0)

    @property
    def finished(self):
        return self.end is not None and self.end.get("status") == "finished"

    @property
    def state_text(self):
        """How the run ended, in a few words."""
        if self.finished:
            return "finished"
        if self.end is not None:
            return f"{self.end.get('status', 'ended')} at step {self.last_step:,} of {self.steps:,}"
        return f"unfinished: the log ends at step {self.last_step:,} of {self.steps:,}"

    @property
    def parameters(self):
        return int(self.head.get("parameters", 0))

    @property
    def padded_parameters(self):
        return int(self.head.get("padded_parameters", 0))

    @property
    def blocks(self):
        """One tensor of one layer each."""
        return 12 * int(self.head.get("model", {}).get("layers", 0)) + 4

    @property
    def state_bytes(self):
        """Of the optimizer, as the program allocated them; None where the log doesn't say."""
        return self.memory.get("optimizer_state")

    @property
    def computed_state_bytes(self):
        return state_bytes(self.optimizer, self.padded_parameters, self.blocks, self.options)

    @cached_property
    def clock(self):
        """[(step, tokens, seconds)] after each update: seconds of training alone, without validation and
        start-up.
        """
        seconds, rows = 0.0, [(0, 0, 0.0)]
        for record in self.train:
            seconds += (record.get("step_ms") or 0) / 1000
            rows.append((record["step"], record["tokens"], seconds))
        return rows

    def at_step(self, step):
        """(tokens, seconds) when this many updates were done. Skipped updates took no time that the log
        knows.
        """
        low, high = 0, len(self.clock)
        while high - low > 1:  # the last row at or before it
            middle = (low + high) // 2
            if self.clock[middle][0] <= step:
                low = middle
            else:
                high = middle
        return self.clock[low][1:]

    @cached_property
    def val_losses(self):
        """[(step, loss)] of the validations whose loss is a number."""
        return [(record["step"], record["loss"]) for record in self.val if is_number(record["loss"])]

    @property
    def final_val(self):
        """(step, loss) of the last validation, None before the first."""
        return self.val_losses[-1] if self.val_losses else None

    @property
    def best_val(self):
        return min(self.val_losses, key=lambda pair: pair[1]) if self.val_losses else None

    def median(self, name):
        """The median of a train record's number over all steps but the first few; None where there are
        none.
        """
        values = [record[name] for record in self.train if is_number(record.get(name))]
        values = values[WARMUP_STEPS:] or values
        return statistics.median(values) if values else None

    def option_text(self, flag):
        return option_text(self.options.get(flag))


def is_number(value):
    """Not null, which the log writes for nan and infinities."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def option_text(value):
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def state_bytes(optimizer, padded_parameters, blocks, options):
    """What the optimizer must keep, fp32: AdamW two moments; SGD-SaI one momentum and a gain a block."""
    if optimizer == "adamw":
        return 8 * padded_parameters
    momentum = 4 * padded_parameters if float(options.get("momentum", 0.9)) > 0 else 0
    return momentum + 4 * blocks


def read_log(path):
    """The run in DIR/log.jsonl, or in a log.jsonl. A last line that isn't whole yet is passed over."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LogError(f"{path}: no such log; give the --output-dir of a run") from None
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from None
    run = None
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_record(line)
        if record is None:
            if number < len(lines):  # the last one is a record that is being written
                _run_of(run, path).damaged_lines.append(number)
        elif record["kind"] == "run":
            if run is not None:
                raise LogError(
                    f"{path}:{number}: a second `run` record; give each run an --output-dir of its own"
                )
            run = Run(path.resolve().parent, record)
        else:
            _add(_run_of(run, path), record)
    return _run_of(run, path)


def _run_of(run, path):
    if run is None:
        raise LogError(f"{path}: doesn't begin with a `run` record: not a log of train_gpt2, or still empty")
    return run


REQUIRED = {
    "memory": ("owner", "bytes"),
    "gsnr": ("tensor", "n", "gsnr"),
    "train": ("step", "tokens", "loss"),
    "val": ("step", "loss"),
    "sample": ("step", "text"),
    "skip": ("step",),
}


def parse_record(line):
    """The record in a line, None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "kind" not in record:
        return None
    return record if all(name in record for name in REQUIRED.get(record["kind"], ())) else None


def _add(run, record):
    kind = record["kind"]
    for derived in ("clock", "val_losses"):  # of the records so far
        run.__dict__.pop(derived, None)
    if kind == "memory":
        run.memory[record["owner"]] = record["bytes"]
    elif kind == "end":
        run.end = record
    elif kind in ("gsnr", "train", "val"):
        getattr(run, kind).append(record)
    elif kind == "sample":
        run.samples.append(record)
    elif kind == "skip":
        run.skipped.append(record)


class Tail:
    """A log.jsonl that is still written: gives each record once, as soon as its line is whole."""

    def __init__(self, path):
        path = Path(path)
        self.path = path / "log.jsonl" if path.is_dir() or path.suffix != ".jsonl" else path
        self.run = None  # what has been read so far
        self._file = None
        self._part = b""

    def new_records(self):
        """The records that have come since the last call, taken into `run`; none while there is no log."""
        if self._file is None and self.path.exists():
            self._file = open(self.path, "rb")
        if self._file is None:
            return []
        *lines, self._part = (self._part + self._file.read()).split(b"\n")
        records = [record for record in map(parse_record, lines) if record]
        for record in records:
            if record["kind"] == "run":
                self.run = self.run or Run(self.path.resolve().parent, record)
            elif self.run:
                _add(self.run, record)
        return records

    def close(self):
        if self._file:
            self._file.close()


def label_runs(runs):
    """Gives each run a short name: its optimizer, and what sets it apart from the others with that
    optimizer.
    """
    for optimizer in {run.optimizer for run in runs}:
        group = [run for run in runs if run.optimizer == optimizer]
        flags = [flag for flag in differing_options(group) if flag not in ("output-dir", "warmup-steps")]
        flags = flags or [flag for flag in differing_options(group) if flag != "output-dir"]
        for run in group:
            parts = [f"{SHORT_NAMES.get(flag, flag)} {run.option_text(flag)}" for flag in flags[:3]]
            run.label = ", ".join([run.title, *parts])
    taken = [run.label for run in runs]
    for run in runs:
        if taken.count(run.label) > 1:
            run.label += f" ({run.path.name})"


def differing_options(runs):
    """The flags whose values aren't the same in all these runs, in the order of --help."""
    flags = list(dict.fromkeys(flag for run in runs for flag in run.options))
    return [flag for flag in flags if len({option_text(run.options.get(flag)) for run in runs}) > 1]


def tensor_type(name):
    """ "transformer.h.3.attn.c_attn.weight" -> "h.*.attn.c_attn.weight"."""
    return re.sub(r"^h\.\d+\.", "h.*.", name.removeprefix("transformer."))


def gsnr_by_type(run):
    """{tensor type: [its gsnr records, by layer]}, in the log's order."""
    types = {}
    for record in run.gsnr:
        types.setdefault(tensor_type(record["tensor"]), []).append(record)
    return types


def si_bytes(count):
    """ "1.04 GB": decimal units, as disks and GPU makers count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds):
    """ "1:02:03" or "2:03"; "0.4 s" below a second."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"

#!/usr/bin/env python3
"""Turns the logs of runs into TensorBoard's event files, and follows them while they grow.

  python scripts/to_tensorboard.py runs/a runs/b --output runs/tensorboard     # what is there now
  python scripts/to_tensorboard.py runs/a --follow                             # until the run ends or Ctrl-C
  tensorboard --logdir runs/tensorboard

Each run is a folder of its own in --output, named after the run's. An existing folder is never added to.
Needs tensorboard: .venv/bin/pip install -r scripts/requirements-optional.txt
"""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path

from runlog import LogError, Tail, is_number

TAGS = {
    "loss": "loss/train",
    "grad_norm": "training/gradient_norm",
    "learning_rate": "training/learning_rate",
    "step_ms": "time/step_ms",
    "optimizer_ms": "time/optimizer_ms",
    "tokens_per_second": "time/tokens_per_second",
}
POLL_SECONDS = 1.0


def _tensorboard():
    """The parts of TensorBoard that write event files."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.plugins.text import metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise LogError(
            "needs tensorboard: .venv/bin/pip install -r scripts/requirements-optional.txt"
        ) from None
    return event_pb2, summary_pb2, tensor_pb2, types_pb2, metadata, EventFileWriter


class EventWriter:
    """Writes one run's records as events. Their time is the run's beginning plus its training time until
    then.
    """

    def __init__(self, tail, folder):
        self._event, self._summary, self._tensor, self._types, self._text, writer = _tensorboard()
        self._tail = tail
        self._folder = folder
        self._writer = None
        self._new_writer = writer
        self._begin = 0.0
        self.ended = False

    def catch_up(self):
        """Writes what has come since the last call. Returns how many records that was."""
        records = self._tail.new_records()
        for record in records:
            self._write(record)
        if self._writer:
            self._writer.flush()
        return len(records)

    def _write(self, record):
        kind = record["kind"]
        if kind == "run":
            self._begin = datetime.fromisoformat(record["time"].replace("Z", "+00:00")).timestamp()
            self._writer = self._new_writer(str(self._folder))
        elif kind == "train":
            values = [self._scalar(tag, record.get(name)) for name, tag in TAGS.items()]
            self._add(record["step"], [value for value in values if value])
        elif kind == "val" and is_number(record["loss"]):
            self._add(record["step"], [self._scalar("loss/validation", record["loss"])])
        elif kind == "sample":
            self._add(record["step"], [self._text_value("sample", record["text"])])
        elif kind == "end":
            self.ended = True

    def _add(self, step, values):
        if self._writer is None:
            raise LogError(f"{self._tail.path}: doesn't begin with a `run` record: not a log of train_gpt2")
        _, seconds = self._tail.run.at_step(step)
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=self._begin + seconds, step=step, summary=summary))

    def _scalar(self, tag, value):
        return self._summary.Summary.Value(tag=tag, simple_value=value) if is_number(value) else None

    def _text_value(self, tag, text):
        metadata = self._text.create_summary_metadata(display_name=tag, description="")
        indented = "\n".join("    " + line for line in text.splitlines())  # the text plugin renders Markdown
        tensor = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[indented.encode()])
        tensor.tensor_shape.dim.add(size=1)
        return self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)

    def close(self):
        if self._writer:
            self._writer.close()
        self._tail.close()


def make_writers(paths, output):
    """An EventWriter a run. Raises where a log is missing or a folder has events already."""
    writers, names = [], set()
    for path in paths:
        tail = Tail(path)
        if not tail.path.is_file():
            raise LogError(f"{tail.path}: no such log; give the --output-dir of a run")
        name = tail.path.resolve().parent.name
        if name in names:
            raise LogError(f"{path}: two runs are called {name}; convert them into two --output folders")
        names.add(name)
        folder = output / name
        if folder.is_dir() and any(folder.glob("events.out.tfevents.*")):
            raise LogError(f"{folder}: has events already; remove it or choose another --output")
        writers.append(EventWriter(tail, folder))
    return writers


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="an --output-dir, or its log.jsonl")
    default = Path("runs/tensorboard")
    parser.add_argument("--output", type=Path, default=default, metavar="DIR", help=f"default: {default}")
    parser.add_argument("--follow", action="store_true", help="go on until all runs have ended")
    args = parser.parse_args(argv)
    writers = make_writers(args.runs, args.output)
    try:
        count = sum(writer.catch_up() for writer in writers)
        while args.follow and not all(writer.ended for writer in writers):
            time.sleep(POLL_SECONDS)
            count += sum(writer.catch_up() for writer in writers)
    except OSError as error:
        raise LogError(f"{error.filename or args.output}: {error.strerror}") from None
    finally:
        for writer in writers:
            writer.close()
    print(f"{count:,} records of {len(writers)} runs; see them with: tensorboard --logdir {args.output}")


if __name__ == "__main__":
    try:
        main()
    except LogError as error:
        sys.exit(f"to_tensorboard.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

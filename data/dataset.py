"""Makes a data set: reads sources, encodes their pieces in several processes, writes shards; goes on after
a stop.
"""

import hashlib
import json
import os
import re
import signal
import sys
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from encoder import Encoder
from shards import (
    HEADER_BYTES,
    MAX_SHARD_TOKENS,
    TOKENIZERS,
    DataError,
    read_shard,
    shard_header,
    write_tokenizer,
)
from sources import HashingFile, Piece, read_pieces


@dataclass
class Progress:
    """Where a run stands at the end of its last full shard: what a resumed one starts from."""

    source: int = 0
    piece: int = 0  # of that source, the next one
    piece_tokens: int = 0  # of that piece that are written already
    checksum: int = 0  # crc32 of the source's text before that piece
    shards: list = field(default_factory=list)  # [tokens, documents that begin in it]
    sources: list = field(default_factory=list)  # {name, bytes, sha256, documents, tokens}
    empty_documents: int = 0
    replaced_characters: int = 0
    complete: bool = False  # all shards are written; not yet named train and val


class ShardWriter:
    """Writes tokens into shards of equal size, DIR/shard_000000.bin ..., and beside each where its
    documents begin.
    """

    def __init__(self, directory, options, vocab_size, shards):
        self._directory = directory
        self._size = options.shard_tokens
        self._vocab_size = vocab_size
        self.shards = shards
        self._file = None
        self._tokens = 0
        self._starts = []

    def room(self):
        """How many tokens the current shard still takes."""
        return self._size - self._tokens

    def write(self, tokens, starts):
        """Appends at most room() tokens. Returns whether that filled the shard and closed it."""
        if self._file is None:
            self._file = open(self._path(".tmp"), "wb")
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self._starts.append(starts + self._tokens)
        self._tokens += len(tokens)
        if self._tokens == self._size:
            self.close()
            return True
        return False

    def close(self):
        """Ends the current shard, if there is one, under its final name."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(shard_header(self._tokens, self._vocab_size))
        self._file.close()
        starts = np.concatenate(self._starts)
        with open(self._path(".documents"), "wb") as file:
            np.save(file, starts)
        self._path(".tmp").rename(self._path(".bin"))
        self.shards.append([self._tokens, len(starts)])
        self._file, self._tokens, self._starts = None, 0, []

    def _path(self, suffix):
        return self._directory / f"shard_{len(self.shards):06d}{suffix}"


def build(sources, output, options, processes=1, quiet=False):
    """Makes the data set OUTPUT out of these sources, or goes on with a build of it that was interrupted.

    Returns its manifest. Raises DataError where the inputs or the output won't do; changes nothing that is
    finished.
    """
    output = Path(output)
    _check(options)
    request = {"options": asdict(options), "inputs": [_identity(source) for source in sources]}
    if (manifest := finished(output, request)) is not None:
        return manifest
    partial = output.with_name(output.name + ".partial")
    with ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(partial / "lock", "w"))
        except OSError as error:
            raise DataError(f"{partial}: can't be written: {error.strerror}") from None
        _lock(lock, partial)
        try:
            if not (partial / "manifest.json").exists():
                progress = _load(partial, request)
                tokenizer = TOKENIZERS[options.tokenizer]()
                if not progress.complete:
                    _write_shards(sources, partial, options, tokenizer, progress, request, processes, quiet)
                _finish(partial, options, tokenizer, progress, request)
            manifest = _publish(partial, output, request)
        except OSError as error:
            raise DataError(
                f"{error.filename or output}: {error.strerror}; then run the same command again"
            ) from None
    return manifest


def _check(options):
    if not 1 <= options.shard_tokens <= MAX_SHARD_TOKENS:
        raise DataError(f"--shard-tokens {options.shard_tokens}: must be 1 to {MAX_SHARD_TOKENS:,}")
    if not 0 <= options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction}: must be at least 0 and less than 1")


def _identity(source):
    return {key: value for key, value in asdict(source).items() if key != "path"}


def finished(output, request):
    """The manifest of an output that this request has made already, None where there is no output yet.

    A request is what a manifest says under that name: the options and, unless they don't matter, the inputs.
    """
    manifest_path = output / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        standard_input = any(item["name"] == "standard input" for item in request.get("inputs", []))
        if _matches(manifest["request"], request) and not standard_input:
            return manifest
        reason = "from standard input" if standard_input else _difference(manifest["request"], request)
        raise DataError(f"{output}: exists already, made {reason}; remove it or choose another --output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: exists, and is not a data set of this program; choose another --output")
    return None


def _matches(old, request):
    return {key: old[key] for key in request} == request


def _difference(old, new):
    for key, value in new["options"].items():
        if old["options"].get(key) != value:
            return f"with --{key.replace('_', '-')} {old['options'].get(key)}, not {value}"
    return "from other inputs, or they have changed"


def _lock(file, partial):
    try:
        import fcntl  # not on every system

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        raise DataError(f"{partial}: another process is writing there") from None


def _load(partial, request):
    """The progress of an earlier run in this directory, up to its last full shard; the rest is removed."""
    path = partial / "state.json"
    if not path.exists():
        foreign = [
            name for name in os.listdir(partial) if not re.fullmatch(r"lock|state\.tmp|shard_\d+\..*", name)
        ]
        if foreign:
            raise DataError(f"{partial}: has {foreign[0]}, which is not ours; move it away")
        progress = Progress()
    else:
        state = json.loads(path.read_text())
        if state["request"] != request:
            reason = _difference(state["request"], request)
            raise DataError(f"{partial}: begun {reason}; repeat that command, or remove the folder")
        progress = Progress(**state["progress"])
    if not progress.complete:
        for shard in partial.glob("shard_*"):
            if shard.suffix == ".tmp" or int(shard.stem.removeprefix("shard_")) >= len(progress.shards):
                shard.unlink()
    return progress


def _save(partial, progress, request):
    temporary = partial / "state.tmp"
    temporary.write_text(json.dumps({"request": request, "progress": asdict(progress)}))
    temporary.rename(partial / "state.json")


def _write_shards(sources, partial, options, tokenizer, progress, request, processes, quiet):
    """Reads all sources from where `progress` stands, and writes all shards."""
    writer = ShardWriter(partial, options, tokenizer.vocab_size, progress.shards)
    skip = progress.piece_tokens
    with ExitStack() as stack:
        reading = _Reading(sources, options, progress, stack)
        bar = stack.enter_context(_progress_bar(sources, quiet))
        for event, encoded in _encoded(reading, options, processes, stack):
            bar.update(reading.bytes - bar.n)
            if event.source == len(progress.sources):
                progress.sources.append({"name": sources[event.source].name, "documents": 0, "tokens": 0})
            if isinstance(event, SourceEnd):
                progress.sources[event.source] |= {"bytes": event.bytes, "sha256": event.sha256}
                progress.source, progress.piece, progress.checksum = event.source + 1, 0, 0
                continue
            _write_piece(writer, encoded, skip, progress, event, lambda: _save(partial, progress, request))
            skip = 0
    writer.close()
    if not sum(documents for _, documents in progress.shards):
        raise DataError(f"{sources[0].name}: no text in the input")
    progress.complete = True
    _save(partial, progress, request)


def _write_piece(writer, encoded, skip, progress, event, save):
    """Writes a piece from its token `skip` on, and saves the progress whenever a shard is full."""
    progress.source, progress.piece, progress.checksum = event.source, event.piece, event.checksum
    statistics = progress.sources[event.source]
    position = skip
    while position < len(encoded.tokens):
        end = min(len(encoded.tokens), position + writer.room())
        starts = encoded.starts[(encoded.starts >= position) & (encoded.starts < end)]
        full = writer.write(encoded.tokens[position:end], starts - position)
        statistics["documents"] += len(starts)
        statistics["tokens"] += end - position
        position = progress.piece_tokens = end
        if full:
            save()
    progress.piece, progress.piece_tokens, progress.checksum = event.piece + 1, 0, event.next_checksum
    progress.empty_documents += encoded.empty_documents
    progress.replaced_characters += encoded.replaced_characters


@dataclass(frozen=True)
class PieceEvent:
    """A piece that was read: where it stands, and the crc32 of its source's text before it and with it."""

    source: int
    piece: int
    checksum: int
    next_checksum: int
    data: Piece


@dataclass(frozen=True)
class SourceEnd:
    source: int
    bytes: int
    sha256: str


class _Reading:
    """Iterates over what is to be read, from where `progress` stands; `bytes` have been read so far."""

    def __init__(self, sources, options, progress, stack):
        self._sources = sources
        self._options = options
        self._from = (progress.source, progress.piece, progress.checksum)
        self._stack = stack
        self._done = 0
        self._file = None

    @property
    def bytes(self):
        return self._done + (self._file.bytes if self._file else 0)

    def __iter__(self):
        first_source, first_piece, checksum_then = self._from
        for index, source in enumerate(self._sources):
            if index < first_source:
                self._done += source.bytes or 0
                continue
            self._file = HashingFile(sys.stdin.buffer if source.path == "-" else open(source.path, "rb"))
            self._stack.callback(self._file.close)
            begin = first_piece if index == first_source else 0
            checksum = number = 0
            for piece in read_pieces(index, source, self._file, self._options):
                if begin and number == begin:
                    _same(checksum, checksum_then, source)
                before = checksum
                for part in piece.data if isinstance(piece.data, list) else [piece.data]:
                    checksum = zlib.crc32(part or b"", checksum)
                if number >= begin:
                    yield PieceEvent(index, number, before, checksum, piece)
                number += 1
            if begin and number <= begin:  # it has become shorter
                _same(None, checksum_then, source)
            self._file.drain()
            yield SourceEnd(index, self._file.bytes, self._file.sha256.hexdigest())
            self._file.close()
            self._done, self._file = self.bytes, None


def _same(checksum, checksum_then, source):
    if checksum != checksum_then:
        raise DataError(
            f"{source.name}: no longer begins as the interrupted run read it; remove OUTPUT.partial"
        )


def _progress_bar(sources, quiet):
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its thread would be forked into the workers
    sizes = [source.bytes for source in sources]
    total = None if None in sizes else sum(sizes)
    return tqdm.tqdm(
        total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=True if quiet else None
    )


_encoder = None  # of a worker process


def _start_worker(options):
    global _encoder  # noqa: PLW0603  a pool's initializer has no other way to leave something for its tasks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run
    _encoder = Encoder(options)


def _work(piece):
    return _encoder.encode(piece)


def _encoded(reading, options, processes, stack):
    """(event, its Encoded or None) for each event, in order; a few pieces a process are encoded ahead."""
    if processes == 1:
        encoder = Encoder(options)
        for event in reading:
            yield event, (encoder.encode(event.data) if isinstance(event, PieceEvent) else None)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_worker, initargs=(options,))
    stack.callback(pool.shutdown, cancel_futures=True)
    waiting = deque()
    try:
        for event in reading:
            waiting.append((event, pool.submit(_work, event.data) if isinstance(event, PieceEvent) else None))
            while len(waiting) > 4 * processes:
                done, future = waiting.popleft()
                yield done, future and future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future and future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps for lack of memory: run again with fewer --processes"
        ) from None


# ---- finish


def _finish(partial, options, tokenizer, progress, request):
    """Names the shards train and val and writes what lies beside them, the manifest last.

    Every step can be repeated, so that a run that was stopped in here is finished by the next.
    """
    tokens = sum(count for count, _ in progress.shards)
    documents = sum(count for _, count in progress.shards)
    val_documents = max(1, int(documents * options.val_fraction + 1e-9)) if options.val_fraction else 0
    if documents == 1 and val_documents:
        shard, position = _locate_token(progress.shards, tokens - max(1, int(tokens * options.val_fraction)))
        rule = "tokens"
    else:
        shard, position = _locate_document(partial, progress.shards, documents - val_documents)
        rule = "documents"
    _rename_shards(partial, progress.shards, shard, position, tokenizer.vocab_size)
    write_tokenizer(partial / "tokenizer.bin", tokenizer)
    shards = [_describe(path) for path in sorted(partial.glob("*_*.bin"))]
    train, val = (sum(s["tokens"] for s in shards if s["file"].startswith(part)) for part in ("train", "val"))
    manifest = {
        "version": 1,
        "request": request,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "sha256": _sha256(partial / "tokenizer.bin"),
        },
        "documents": {
            "train": documents - val_documents,
            "val": val_documents,
            "empty": progress.empty_documents,
        }
        if rule == "documents"
        else {"train": 1, "val": 1, "empty": progress.empty_documents},
        "tokens": {"train": train, "val": val},
        "split": rule,  # "tokens": a lone document, cut in two
        "replaced_characters": progress.replaced_characters,
        "inputs": progress.sources,
        "shards": shards,
    }
    temporary = partial / "state.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.rename(partial / "manifest.json")


def _publish(partial, output, request):
    """Gives a finished folder its final name. Returns its manifest."""
    manifest = json.loads((partial / "manifest.json").read_text())
    if manifest["request"] != request:
        raise DataError(
            f"{partial}: made {_difference(manifest['request'], request)}; repeat that command, or remove it"
        )
    for path in [*partial.glob("shard_*.documents"), partial / "state.json", partial / "lock"]:
        path.unlink(missing_ok=True)
    partial.rename(output)
    return manifest


def _locate_token(shards, token):
    """(shard, position in it) of a token of the whole."""
    for index, (tokens, _) in enumerate(shards):
        if token < tokens:
            return index, token
        token -= tokens
    return len(shards), 0


def _locate_document(partial, shards, document):
    """(shard, position in it) where this document begins."""
    for index, (_, documents) in enumerate(shards):
        if document < documents:
            return index, int(np.load(partial / f"shard_{index:06d}.documents")[document])
        document -= documents
    return len(shards), 0


def _rename_shards(partial, shards, cut_shard, cut, vocab_size):
    """shard_* becomes train_* before the token `cut` of shard `cut_shard`, val_* from there on."""
    split = cut > 0
    for index in range(len(shards)):
        path = partial / f"shard_{index:06d}.bin"
        if not path.exists():  # done by the run that was stopped
            continue
        if index == cut_shard and split:
            tokens = len(read_shard(path)[0])
            for name, begin, end in ((f"train_{index:06d}", 0, cut), ("val_000000", cut, tokens)):
                temporary = partial / f"{name}.tmp"
                with open(path, "rb") as shard, open(temporary, "wb") as file:
                    file.write(shard_header(end - begin, vocab_size))
                    shard.seek(HEADER_BYTES + 2 * begin)
                    left = 2 * (end - begin)
                    while left:
                        left -= file.write(shard.read(min(left, 1 << 22)))
                temporary.rename(partial / f"{name}.bin")
            path.unlink()
        elif index < cut_shard:
            path.rename(partial / f"train_{index:06d}.bin")
        else:
            path.rename(partial / f"val_{index - cut_shard:06d}.bin")


def _describe(path):
    return {"file": path.name, "tokens": len(read_shard(path)[0]), "sha256": _sha256(path)}


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()

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
import glob
import gzip
import hashlib
import importlib
import json
import os
import re
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from shards import (
    HEADER_BYTES,
    MAX_SHARD_TOKENS,
    TOKENIZERS,
    DataError,
    read_shard,
    shard_header,
    write_tokenizer,
)

PIECE_BYTES = 1 << 20  # of text that one task carries: large beside a task's cost, small beside memory
MAX_UNCUT_BYTES = 1 << 26  # of .txt in which no white space is found before it is cut anywhere
MAX_LINE_BYTES = 1 << 27  # of .jsonl
FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "zst")


# ---- inputs


@dataclass(frozen=True)
class Source:
    """One input: a file, or standard input where the path is "-"."""

    path: str
    name: str  # as messages and the manifest call it
    format: str  # one of FORMATS
    compression: str = ""  # or one of COMPRESSIONS
    bytes: int | None = None  # on disk; None: standard input
    mtime_ns: int | None = None  # None: not compared when a run is resumed


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task turns into tokens."""

    source: int
    name: str
    format: str
    offset: int  # of the text's first byte; for parquet of the first row
    line: int  # of the first line, from 1
    data: bytes | list  # list: parquet's rows, each bytes or None
    starts_document: bool = True


def find_sources(arguments, format_name="auto"):
    """The inputs that these arguments (files, folders, globs, "-") name, in order, each once."""
    sources = []
    for argument in arguments:
        if argument == "-":
            sources.append(Source("-", "standard input", "txt" if format_name == "auto" else format_name))
            continue
        if os.path.isdir(argument):
            paths = [os.path.join(top, name) for top, _, names in os.walk(argument) for name in names]
            paths = sorted(path for path in paths if _known(path) or format_name != "auto")
            if not paths:
                raise DataError(
                    f"{argument}: no .txt, .jsonl or .parquet in this folder (or name a --format)"
                )
        elif os.path.exists(argument):
            paths = [argument]
        else:
            paths = sorted(path for path in glob.glob(argument, recursive=True) if os.path.isfile(path))
            if not paths:
                raise DataError(f"{argument}: no such file or folder, and no file matches it as a pattern")
        sources += [_file_source(path, format_name) for path in paths]
    if sum(source.path == "-" for source in sources) > 1:
        raise DataError("-: standard input can be read only once")
    return list({source.path: source for source in sources}.values())


def _suffixes(path):
    """(format, compression) by the name's end; format "" where it isn't one of ours."""
    parts = os.path.basename(path).lower().split(".")[1:]
    compression = parts.pop() if parts and parts[-1] in COMPRESSIONS else ""
    return (parts[-1] if parts and parts[-1] in FORMATS else ""), compression


def _known(path):
    return _suffixes(path)[0] != ""


def _file_source(path, format_name):
    found, compression = _suffixes(path)
    chosen = found if format_name == "auto" else format_name
    if not chosen:
        raise DataError(f"{path}: not .txt, .jsonl or .parquet; say which it is with --format")
    if chosen == "parquet" and compression:
        raise DataError(f"{path}: parquet inside {compression} can't be read in parts: decompress it first")
    try:
        info = os.stat(path)
        open(path, "rb").close()  # unreadable ones are found before hours of work, not after
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return Source(path, path, chosen, compression, info.st_size, info.st_mtime_ns)


class HashingFile:
    """A binary file, read in order, with its sha256 and the number of bytes read."""

    def __init__(self, file):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def read(self, size=-1):
        data = self._file.read(size)
        self.sha256.update(data)
        self.bytes += len(data)
        return data

    def drain(self):
        """Reads what is left, for the hash."""
        while self.read(PIECE_BYTES):
            pass

    def seekable(self):
        return False

    def close(self):
        if self._file is not sys.stdin.buffer:
            self._file.close()


def _chunks(file, source):
    """The text of a source in chunks of bytes, decompressed."""
    if source.compression == "gz":
        try:
            with gzip.GzipFile(fileobj=file) as plain:
                while chunk := plain.read(PIECE_BYTES):
                    yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{source.name}: damaged or truncated gzip file ({error})") from None
    elif source.compression == "zst":
        yield from _zstd_chunks(file, source)
    else:
        while chunk := file.read(PIECE_BYTES):
            yield chunk


def _zstd_chunks(file, source):
    zstandard = _optional("zstandard", source)
    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    unfinished = False  # inside a frame: its end must come
    try:
        while data := file.read(PIECE_BYTES):
            while data:
                if chunk := frame.decompress(data):
                    yield chunk
                unfinished, data = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    except zstandard.ZstdError as error:
        raise DataError(f"{source.name}: damaged zstd file ({error})") from None
    if unfinished:
        raise DataError(f"{source.name}: damaged or truncated zstd file")


def _optional(module, source):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{source.name}: needs {module}: .venv/bin/pip install -r scripts/requirements-optional.txt"
        ) from None


def read_pieces(index, source, file, options):
    """The pieces of one source, in order: the same ones whenever the source and the options are the same."""
    if source.format == "parquet":
        yield from _parquet_pieces(index, source, options)
        return
    cut_text = _cut_at_separator if options.separator else _cut_at_space
    cut = _cut_at_line if source.format == "jsonl" else cut_text
    buffer, offset, line, starts_document, first = b"", 0, 1, True, True
    for chunk in _chunks(file, source):
        buffer += chunk
        if first:
            first = False
            buffer, offset = _without_mark(chunk, source)
        if len(buffer) < PIECE_BYTES:
            continue
        end, next_starts = cut(buffer, source, options)
        if not end:
            continue
        yield Piece(index, source.name, source.format, offset, line, buffer[:end], starts_document)
        line += buffer.count(b"\n", 0, end) if source.format == "jsonl" else 0
        buffer, offset, starts_document = buffer[end:], offset + end, next_starts
    if buffer:
        yield Piece(index, source.name, source.format, offset, line, buffer, starts_document)


def _without_mark(chunk, source):
    """(the chunk without UTF-8's byte order mark, the mark's length)."""
    if chunk[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{source.name}: is UTF-16: convert it with `iconv -f utf-16 -t utf-8`")
    return (chunk[3:], 3) if chunk[:3] == b"\xef\xbb\xbf" else (chunk, 0)


def _cut_at_line(buffer, source, _options):
    end = buffer.rfind(b"\n") + 1
    if not end and len(buffer) > MAX_LINE_BYTES:
        raise DataError(
            f"{source.name}: a line of more than {MAX_LINE_BYTES:,} bytes: is it one JSON value a line?"
        )
    return end, True


def _cut_at_space(buffer, _source, _options):
    """Before white space that follows something else: GPT-2's pattern always ends a word there."""
    for match in re.finditer(rb"(?<=[\n ])[^\s\x1c-\x1f]", buffer[::-1]):
        end = len(buffer) - match.start()
        before = buffer[max(0, end - 4) : end].decode(errors="ignore")
        if before and not before[-1].isspace():  # it may end in a Unicode space
            return end, False
    if len(buffer) < MAX_UNCUT_BYTES:
        return 0, False
    end = len(buffer) - 4
    while buffer[end] & 0xC0 == 0x80:  # not inside a character
        end += 1
    return end, False


def _cut_at_separator(buffer, source, options):
    separator = options.separator.encode()
    end = buffer.rfind(separator)
    if end >= 0:
        return end + len(separator), True
    # None is complete in the buffer, so none begins before its last len(separator) - 1 bytes.
    end, _ = _cut_at_space(buffer[: len(buffer) - len(separator) + 1], source, options)
    return end, False


def _parquet_pieces(index, source, options):
    if source.path == "-":
        raise DataError(f"{source.name}: parquet can't be read as a stream: give the file")
    pyarrow = _optional("pyarrow", source)
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(source.path)
        names = table.schema_arrow.names
        if options.field not in names:
            raise DataError(
                f"{source.name}: no column {options.field!r}; --field may be one of: {', '.join(names)}"
            )
        kind = table.schema_arrow.field(options.field).type
        if str(kind) not in ("string", "large_string", "binary", "large_binary", "string_view"):
            raise DataError(f"{source.name}: column {options.field!r} holds {kind}, not text")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[options.field]):
            rows = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            yield Piece(index, source.name, source.format, row, 0, rows)
            row += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.name}: {str(error).splitlines()[0]}") from None


# ---- to tokens


@dataclass(frozen=True)
class Options:
    """What decides the shards' contents, with the inputs."""

    tokenizer: str = "gpt2"
    shard_tokens: int = 100_000_000
    val_fraction: float = 0.1
    field: str = "text"
    separator: str = ""
    errors: str = "strict"  # or "replace"


@dataclass(frozen=True)
class Encoded:
    """A piece's tokens; `starts` are the positions of the documents' end-of-text marks in them."""

    tokens: np.ndarray
    starts: np.ndarray
    empty_documents: int
    replaced_characters: int


class Encoder:
    """Turns pieces into tokens; every process has one."""

    def __init__(self, options):
        self._options = options
        self._tokenizer = TOKENIZERS[options.tokenizer]()
        self._no_nul = options.tokenizer == "bytes"

    def encode(self, piece):
        end_of_text = np.array([self._tokenizer.end_of_text], dtype=np.uint16)
        parts, starts, position, empty, replaced = [], [], 0, 0, 0
        for starts_document, text, bad in self._documents(piece):
            replaced += bad
            if starts_document and not text.strip():
                empty += 1
                continue
            if starts_document:
                starts.append(position)
                parts.append(end_of_text)
            parts.append(self._tokenizer.encode(text))
            position += len(parts[-1]) + starts_document
        tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)
        return Encoded(tokens, np.array(starts, dtype=np.int64), empty, replaced)

    def _documents(self, piece):
        """(starts a document, its text, replaced characters) for each document, or part of one, in a
        piece.
        """
        if piece.format == "jsonl":
            yield from self._json_lines(piece)
        elif piece.format == "parquet":
            for i, row in enumerate(piece.data):
                yield (True, *self._decode(row or b"", f"{piece.name}: row {piece.offset + i}", 0))
        else:
            separator = self._options.separator.encode()
            offset = piece.offset
            # A piece that ends in a separator has nothing after it: the next piece starts that document.
            data = piece.data.removesuffix(separator) if separator else piece.data
            for i, part in enumerate(data.split(separator) if separator else [data]):
                yield (piece.starts_document or i > 0, *self._decode(part, piece.name, offset))
                offset += len(part) + len(separator)

    def _json_lines(self, piece):
        name = self._options.field
        offset = piece.offset
        for i, data in enumerate(piece.data.split(b"\n")):
            where = f"{piece.name}:{piece.line + i}"
            line, bad = self._decode(data, where, offset)
            offset += len(data) + 1
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            if not isinstance(value, dict) or name not in value:
                has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise DataError(f"{where}: no field {name!r} (has: {has}); name it with --field")
            if value[name] is None:
                yield True, "", bad
                continue
            if not isinstance(value[name], str):
                raise DataError(f"{where}: field {name!r} is not text but {type(value[name]).__name__}")
            text, more = self._checked(value[name], where)
            yield True, text, bad + more

    def _decode(self, data, name, offset):
        """(text, replaced characters) of UTF-8 bytes that begin at this offset of the input."""
        try:
            text, bad = data.decode(), 0
        except UnicodeDecodeError as error:
            if self._options.errors == "strict":
                raise DataError(
                    f"{name}: not UTF-8 at byte {offset + error.start:,} (0x{data[error.start]:02x}):"
                    " convert it, e.g. `iconv -f latin1 -t utf-8`, or pass --errors replace"
                ) from None
            text = data.decode(errors="replace")
            bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
        if self._no_nul and "\0" in text:
            if self._options.errors == "strict":
                raise DataError(
                    f"{name}: a NUL at byte {offset + data.index(0):,}, end-of-text for --tokenizer bytes:"
                    " remove it, or pass --errors replace"
                )
            bad += text.count("\0")
            text = text.replace("\0", "\ufffd")
        return text, bad

    def _checked(self, text, where):
        """(text, replaced characters) of a JSON string, whose escapes may name what can't be written in
        UTF-8.
        """
        bad = 0 if text.isascii() else len(re.findall("[\ud800-\udfff]", text))
        if bad and self._options.errors == "strict":
            raise DataError(
                f"{where}: half of a surrogate pair in \\u escapes: mend it, or pass --errors replace"
            )
        text = re.sub("[\ud800-\udfff]", "\ufffd", text) if bad else text
        if self._no_nul and "\0" in text:
            if self._options.errors == "strict":
                raise DataError(
                    f"{where}: \\u0000 is end-of-text for --tokenizer bytes: remove it, or --errors replace"
                )
            bad += text.count("\0")
            text = text.replace("\0", "\ufffd")
        return text, bad


# ---- to shards


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


# ---- command line


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

"""The inputs of a data set: which they are, and their text in pieces that one task each turns into tokens.

Pieces are the same whenever the inputs and the options are the same: that is what an interrupted run relies
on.
"""

import glob
import gzip
import hashlib
import importlib
import os
import re
import sys
import zlib
from dataclasses import dataclass

from shards import DataError

PIECE_BYTES = 1 << 20  # of text that one task carries: large beside a task's cost, small beside memory
MAX_UNCUT_BYTES = 1 << 26  # of .txt in which no white space is found before it is cut anywhere
MAX_LINE_BYTES = 1 << 27  # of .jsonl
FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "zst")


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

"""Turns pieces of text into tokens, and says what is wrong with text that can't be turned."""

import json
import re
from dataclasses import dataclass

import numpy as np

from shards import TOKENIZERS, DataError


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

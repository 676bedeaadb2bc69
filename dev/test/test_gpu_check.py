"""dev/gpu_check.sh on a machine that isn't there: GPU, compilers, make and programs only pretend, so that the
script is what is tested: its rows, time limits, archive, messages, and what is left when it is interrupted.

Run: .venv/bin/python -m pytest dev/test/test_gpu_check.py
"""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("adamw", "attention", "gelu", "layernorm", "matmul", "ptx")
# What the script calls beside what is pretended; nothing else is on its PATH.
TOOLS = """awk basename bash cat chmod cp cut date dirname du env git grep gzip head ldd ls mkdir mv nproc
readlink rm sed sleep sort tail tar timeout touch tr"""

# A program or a test of a kernel, by its name. SLOW=NAME:SECONDS makes that one slow, after a first line.
PROGRAM = r"""#!/usr/bin/env bash
echo "$0 $*" >>"$CALLS"
name=$(basename "$0")
echo "first line of $name"
case ${SLOW:-} in "$name":*) sleep "${SLOW#*:}" & wait ;; esac
case ${BROKEN:-} in "$name") echo "it broke"; exit 3 ;; esac
case $name in
train_gpt2)
    case "$*" in
    *--dry-run*) echo "  total  1  60.0 of 75.0 GiB available"; exit ;;
    esac
    while [ $# -gt 0 ]; do [ "$1" = --output-dir ] && out=$2; [ "$1" = --profile ] && steps=47; shift; done
    mkdir -p "$out/latest"
    ms=100; case $0 in *wgmma*) ms=80 ;; esac
    for ((i = 1; i <= ${steps:-20}; i++)); do
        extra=0; [ $i -le 5 ] && extra=9000
        printf '{"kind":"train","step":%d,"tokens":%d,' $i $((i * 65536))
        printf '"loss":%d,"step_ms":%d}\n' $((11 - i / 10)) $((ms + extra))
    done >"$out/log.jsonl"
    echo "trained" ;;
*) [ "${1:-}" = --bench ] && printf 'row one\nrow\ttwo\n' || echo "$name bf16: 3 passed, 0 failed" ;;
esac
"""
MAKE = r"""#!/usr/bin/env bash
echo "make $*" >>"$CALLS"
for word; do
    case $word in build/*) mkdir -p "$(dirname "$word")"; cp program "$word"; chmod +x "$word" ;; esac
done
"""
NVIDIA_SMI = """#!/usr/bin/env bash
case "$*" in *compute_cap*) echo "${CAPABILITY:-9.0}" ;; *) echo 'Pretended H100' ;; esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >>"$CALLS"
echo '========= ERROR SUMMARY: 0 errors'
"""
# Loading libcublasLt is the one thing asked of Python that this machine mustn't answer.
PYTHON = f"""#!/usr/bin/env bash
case "$1 ${{2:-}}" in "- "*lib64) exit "${{NO_CUBLASLT:-0}}" ;; esac
exec {sys.executable} "$@"
"""
TORCH = """
import json, os, sys
open(os.environ["CALLS"], "a").write("torch " + " ".join(sys.argv[1:]) + chr(10))
print(json.dumps({"tokens": 65536, "step_ms": 131.072, "tokens_per_second": 500000.0}))
"""


class Machine:
    """A tree with the script, in a folder, and a PATH of pretended tools."""

    def __init__(self, root):
        self.root, self.bin, self.out, self.calls = root, root / "bin", root / "out", root / "calls"
        for name in ("dev/gpu_check.sh", "dev/gpu_results.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for kernel in KERNELS:
            self.write(f"dev/kernels/{kernel}.cu", "")
        self.write("dev/reference/bench_torch.py", TORCH)
        self.write("dev/roofline.py", "print('predicted 1')")
        self.write("program", PROGRAM)
        self.calls.touch()
        self.bin.mkdir()
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.tool("nvidia-smi", NVIDIA_SMI)
        self.tool("make", MAKE)
        self.tool("compute-sanitizer", SANITIZER)
        self.tool("python3", PYTHON)
        self.tool("strip", '#!/usr/bin/env bash\ncp "$3" "$2"\n')
        for compiler in ("g++", "nvcc"):
            include = root / f"{compiler}-include"
            self.tool(
                compiler, f'#!/usr/bin/env bash\nexec {shutil.which("g++")} -nostdinc -I{include} "$@"\n'
            )
        for header in ("g++-include/cxxopts.hpp", "g++-include/nlohmann/json.hpp"):
            self.write(header, "")
        for header in ("nvcc-include/cublasLt.h", "nvcc-include/nvtx3/nvToolsExt.h"):
            self.write(header, "")

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def tool(self, name, text):
        self.write(f"bin/{name}", text)
        (self.bin / name).chmod(0o755)

    def environment(self, **more):
        kept = {"PATH": str(self.bin), "OUT": str(self.out), "CALLS": str(self.calls), "HOME": str(self.root)}
        return {**kept, "CUDA_HOME": str(self.root / "no_cuda"), **more}

    def start(self, *words, **more):
        return subprocess.Popen(
            [self.root / "dev/gpu_check.sh", *words],
            env=self.environment(**more),
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *words, expect=0, **more):
        process = self.start(*words, **more)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == expect, output
        return output

    def rows(self):
        """(stage, name, status, result) of each row of the table."""
        with (self.out / "gpu_check.tsv").open() as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert all(len(row) == 8 and row[1] for row in rows)
        return [(row[3], row[4], row[6], row[7]) for row in rows]

    def names(self, status=None):
        return [name for _, name, got, _ in self.rows() if got != "row" and status in (None, got)]

    def result(self, name):
        return next(result for _, got, _, result in self.rows() if got == name)

    def logs(self):
        """{name: text} of the archive."""
        with tarfile.open(self.out / "logs.tgz") as archive:
            files = [member for member in archive.getmembers() if member.isfile()]
            return {Path(member.name).name: archive.extractfile(member).read().decode() for member in files}

    def called(self, word):
        return [line for line in self.calls.read_text().splitlines() if word in line]


@pytest.fixture
def machine(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no g++, which plays both compilers here")
    return Machine(tmp_path)


# ---- stages


def test_quick(machine):
    """The most telling things, in their order; both choices of attention, and which is faster."""
    output = machine.run("quick")
    assert machine.names() == [
        "build quick",
        "kernel ptx",
        "kernel attention",
        "attention --bench",
        "train d12 mma_sync",
        "falling loss mma_sync",
        "train d12 wgmma",
        "falling loss wgmma",
        "speed d12",
        "memcheck attention",
        "kernel matmul",
    ]
    assert machine.names("ok") == machine.names()
    assert "wgmma / mma_sync 1.250, so wgmma is faster" in machine.result("speed d12")
    assert ("quick", "attention --bench", "row", "row two") in machine.rows()
    assert output.endswith("11 passed, 0 failed\n")
    targets = machine.called("make ")[0]
    for target in (
        "gpu-bf16/kernels/ptx",
        "gpu-bf16-adamw-mma_sync/train_gpt2",
        "gpu-bf16-adamw-wgmma/train_gpt2",
    ):
        assert f"build/{target}" in targets


def test_gpu_without_wgmma_has_nothing_to_compare(machine):
    machine.run("quick", CAPABILITY="8.0")
    assert "train d12 default" in machine.names("ok")
    assert "faster" not in machine.result("speed d12")
    assert "-wgmma/" not in machine.called("make ")[0]


def test_two_files_hold_everything(machine):
    machine.run("quick")
    assert sorted(path.name for path in machine.out.iterdir()) == ["gpu_check.tsv", "logs.tgz"]
    logs = machine.logs()
    assert logs["quick-kernel-ptx.txt"] == "first line of ptx\nptx bf16: 3 passed, 0 failed\n"
    assert len(logs["quick-d12-wgmma.jsonl"].splitlines()) == 20
    assert not list((machine.root / "build").rglob("latest"))  # models stay nowhere


def test_bench_d12_compares_medians_of_the_same_steps(machine):
    """The first 5 steps, slow in the pretended logs, count on neither side."""
    machine.run("bench_d12", TORCH_BATCH="24")
    result = machine.result("ratio d12 round 2")
    assert "mma_sync 655360, 655360" in result
    assert "torch.compile 500000, 500000" in result
    assert "mma_sync / torch.compile 1.311" in result
    assert "wgmma / torch.compile 1.638" in result
    torch = machine.called("torch ")
    assert len(torch) == 2
    assert all("--fit --start 24 --warmup 5 --steps 20 --batch-size 64" in call for call in torch)
    assert all("--profile 22" in call for call in machine.called("--profile"))
    names = machine.names()
    order = ["train d12 adamw mma_sync", "train d12 adamw wgmma", "torch d12 adamw", "ratio d12 round"]
    wanted = [f"{name} {n}" for n in (1, 2) for name in order]
    assert names[1:9] == wanted


def test_bench_d48_without_time_for_a_second_round(machine):
    output = machine.run("bench_d48", expect=1, STAGE_SECONDS="80")
    assert machine.result("torch d48 adamw 1").startswith("{")
    assert machine.names("skip") == ["d48 round 2"]
    assert "default / torch.compile 1.311" in machine.result("ratio d48 round 1")
    assert output.endswith("1 skipped\n")
    assert "--batch-size 32" in machine.called("torch ")[0]
    assert "--start" not in machine.called("torch ")[0]


def test_sanitize_begins_with_the_riskiest(machine):
    machine.run("sanitize")
    calls = machine.called("sanitizer ")
    assert [call.split("/")[-1] for call in calls] == [
        f"{kernel} --small" for kernel in ("ptx", "attention", "layernorm", "matmul", "gelu", "adamw")
    ]
    assert all("--tool memcheck --error-exitcode 9" in call for call in calls)


@pytest.mark.parametrize("tool", ["racecheck", "synccheck"])
def test_other_sanitizers_are_stages(machine, tool):
    machine.run(tool)
    assert len(machine.called(f"--tool {tool}")) == len(KERNELS)
    assert machine.names()[1] == f"{tool} ptx"


@pytest.mark.parametrize("stage", ["smoke", "build", "test", "kernels", "profile"])
def test_other_stages(machine, stage):
    machine.run(stage)
    assert machine.names("ok") == machine.names()
    assert len(machine.names()) >= 1


def test_a_failure_is_told_and_the_rest_goes_on(machine):
    machine.run("quick", expect=1, BROKEN="ptx")
    assert machine.names("FAIL") == ["kernel ptx"]
    assert machine.result("kernel ptx") == "status 3: it broke"
    assert len(machine.names("ok")) == 10


def test_nothing_is_concluded_from_an_earlier_run(machine):
    """Logs stay where they were; what fails or is skipped now has none."""
    machine.run("quick")
    (machine.out / "gpu_check.tsv").unlink()
    machine.run("quick", expect=1, BROKEN="train_gpt2")
    assert "falling loss wgmma" in machine.names("FAIL")
    assert machine.result("speed d12").endswith("no result of mma_sync; no result of wgmma")
    machine.run("bench_d12")
    (machine.out / "gpu_check.tsv").unlink()
    machine.run("bench_d12", expect=1, STAGE_SECONDS="50")  # too little for PyTorch
    assert "no result of torch.compile" in machine.result("ratio d12 round 1")


def test_list_does_nothing(machine):
    for stage in ("preflight", "quick", "all", "bench", "headers"):
        machine.run(stage, "--list")
    assert not machine.out.exists()
    assert not (machine.root / "build").exists()
    assert not (machine.root / "carry").exists()
    assert machine.called("") == []


def test_unknown_stage(machine):
    assert "dev/gpu_check.sh quick" in machine.run("nonsense", expect=2)


# ---- time


def test_deadline(machine):
    """What doesn't end in time is ended; what can't begin any more is skipped, a row each."""
    begin = time.monotonic()
    output = machine.run("test", expect=1, STAGE_SECONDS="6", SLOW="attention:40")
    assert time.monotonic() - begin < 15
    assert machine.result("kernel attention bf16") == "ran out of time: first line of attention"
    skipped = machine.names("skip")
    assert skipped[0] == "kernel gelu bf16"
    assert len(skipped) == 4 + 2 + len(KERNELS)
    assert machine.result("kernel gelu bf16") == "skipped: no time left"
    assert f"1 failed, {len(skipped)} skipped" in output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_interrupted(machine, name):
    """Rows so far, a row for what was interrupted, and the archive with its output so far."""
    process = machine.start("test", SLOW="attention:333")
    wait_for(lambda: any(call.startswith("build/gpu-bf16/kernels/attention") for call in machine.called("")))
    time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + getattr(signal, name), output
    assert machine.rows()[-1][1:] == ("kernel attention bf16", "FAIL", f"interrupted by {name}")
    assert "kernel adamw bf16" in machine.names("ok")
    assert machine.logs()["test-kernel-attention-bf16.txt"] == "first line of attention\n"
    wait_for(lambda: not running("kernels/attention", machine.root))


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(word, root):
    """Whether a process of this machine has the word in its command line."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if word in (path / "cmdline").read_text() and os.readlink(path / "cwd") == str(root):
                return True
        except OSError:
            pass
    return False


# ---- what is missing


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bin/make", "make: not on the PATH"),
        ("bin/g++", "g++: not on the PATH"),
        ("bin/nvcc", "nvcc: neither on the PATH nor in"),
        ("bin/nvidia-smi", "nvidia-smi, or a GPU that it names; DEVICE=sim"),
        ("bin/python3", "python3: not on the PATH"),
        ("nvcc-include/cublasLt.h", "cublasLt.h: not found by nvcc"),
        ("nvcc-include/nvtx3/nvToolsExt.h", "nvtx3/nvToolsExt.h: not found by nvcc"),
        ("g++-include/cxxopts.hpp", "cxxopts.hpp: not found by g++"),
        ("g++-include/nlohmann/json.hpp", "nlohmann/json.hpp: not found by g++"),
    ],
)
@pytest.mark.parametrize("stage", ["preflight", "smoke"])
def test_missing(machine, path, message, stage):
    """A line, and the stage doesn't begin."""
    (machine.root / path).unlink()
    machine.run(stage, expect=1)
    lines = [result for _, _, status, result in machine.rows() if status == "FAIL"]
    assert any(line.startswith(f"missing: {message}") for line in lines)
    assert len(lines) <= 2  # without Python, libcublasLt can't be tried
    assert machine.called("make ") == []


def test_missing_library(machine):
    machine.run("preflight", expect=1, NO_CUBLASLT="1")
    assert machine.result("preflight").startswith("missing: libcublasLt: can't be loaded")


def test_preflight_says_what_is_there(machine):
    machine.run("preflight")
    assert machine.names("ok") == ["preflight"]
    assert "nothing is missing; Pretended H100" in machine.result("preflight")
    assert "ncu" in machine.names("note")


def test_headers_in_carry_are_used(machine):
    (machine.root / "g++-include/cxxopts.hpp").rename(machine.root / "cxxopts.hpp")
    (machine.root / "carry/include").mkdir(parents=True)
    (machine.root / "cxxopts.hpp").rename(machine.root / "carry/include/cxxopts.hpp")
    machine.run("smoke")
    assert "EXTRA_INCLUDES= -Icarry/include" in machine.called("make ")[0]


# ---- programs that were built elsewhere


def test_no_build(machine):
    """pack elsewhere, then a machine with no compiler."""
    machine.run("build")
    assert f"carry/build.tgz: {8 + 2 + 2 * len(KERNELS)} programs" in machine.run("pack")
    shutil.rmtree(machine.root / "build")
    assert [path.name for path in (machine.root / "carry").iterdir()] == ["build.tgz"]
    for tool in ("make", "g++", "nvcc"):
        (machine.bin / tool).unlink()
    machine.calls.write_text("")
    (machine.out / "gpu_check.tsv").unlink()
    machine.run("quick", NO_BUILD="1")
    assert machine.result("build quick") == "NO_BUILD=1: 5 programs are there"
    assert machine.called("make ") == []
    assert all("carry/build/gpu-bf16" in call for call in machine.called("kernels/"))


def test_no_build_without_a_program(machine):
    machine.run("smoke", expect=1, NO_BUILD="1")
    assert machine.result("preflight").startswith("missing: programs: NO_BUILD=1, but none in build/gpu-*")
    machine.run("build")
    (machine.root / "build/gpu-bf16-sgd_sai/train_gpt2").unlink()
    machine.run("smoke", expect=1, NO_BUILD="1")
    missing = "NO_BUILD=1, and these are missing: build/gpu-bf16-sgd_sai/train_gpt2"
    assert machine.result("build programs") == missing


# ---- what is concluded


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_falling(tmp_path, capsys):
    results, log = load(ROOT / "dev/gpu_results.py"), tmp_path / "log.jsonl"

    def falls(losses):
        log.write_text("".join(json.dumps({"kind": "train", "loss": loss}) + "\n" for loss in losses))
        return results.falling(log)

    assert falls([10 - 0.1 * i for i in range(20)])
    assert "20 steps, loss 10.0000 -> 8.1000" in capsys.readouterr().out
    assert not falls([10 - 0.1 * i for i in range(19)])
    assert not falls([10.0] * 20)
    assert not falls([10.0] * 17 + [float("nan")] * 3)
    assert not falls([])


def test_speeds_names_what_is_lacking(tmp_path, capsys):
    results = load(ROOT / "dev/gpu_results.py")
    assert not results.speeds("d12", [("adamw", tmp_path / "none.jsonl")], 5, 20)
    assert "no result of adamw" in capsys.readouterr().out
    (tmp_path / "short.jsonl").write_text('{"kind":"train","step":1,"tokens":1,"step_ms":1}\n')
    (tmp_path / "empty.txt").write_text("Traceback\n")
    runs = [("adamw", tmp_path / "short.jsonl"), ("torch.compile", tmp_path / "empty.txt")]
    assert not results.speeds("d12", runs, 5, 20)
    assert "no result of adamw; no result of torch.compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "limit", "memory", "batch"),
    [
        ("d12", 64, 81559 << 20, 64),
        ("d48", 32, 81559 << 20, 16),
        ("d48", 32, 143771 << 20, 32),
        ("d48", 32, 40 << 30, 4),
        ("d48", 32, 16 << 30, 1),
    ],
)
def test_first_batch_of_torch(model, limit, memory, batch, monkeypatch):
    """bench_torch.py begins at a batch that is likely to fit; this needs no PyTorch."""
    nn, torch = types.ModuleType("torch.nn"), types.ModuleType("torch")
    nn.Module, nn.functional, torch.nn = object, types.ModuleType("torch.nn.functional"), nn
    for module in (torch, nn, nn.functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    bench = load(ROOT / "dev/reference/bench_torch.py")
    args = {"model": model, "layers": None, "channels": None, "vocab_size": 50304, "seq_len": 1024}
    namespace = types.SimpleNamespace(**args, batch_size=limit, optimizer="adamw")
    assert bench.estimated_batch(namespace, memory) == batch
    while batch > 1:
        assert 0 < bench.smaller(batch) < batch
        batch = bench.smaller(batch)


# ---- the script itself


def test_shell(tmp_path):
    subprocess.run(["bash", "-n", ROOT / "dev/gpu_check.sh"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", ROOT / "dev/gpu_check.sh"], check=True)

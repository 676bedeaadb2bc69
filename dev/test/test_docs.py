"""README.md, dev/README.md and the run scripts: every command in them works, every file and flag that they
name exists, the arithmetic in the scripts' heads is right.

Run: make programs DEVICE=sim && .venv/bin/python -m pytest dev/test/test_docs.py

Commands run in a folder that looks like a fresh clone with some text, shards, a model and two logs. Training
runs for real, with flags behind it that make it tiny (the last one of a flag counts), by the simulator's
programs in place of the GPU's. What would take minutes is asked by make -n, --collect-only or --help.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import synthetic_log

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "dev/README.md")
SIZES = ("124m", "350m", "774m", "1558m")
OPTIMIZERS = ("adamw", "sgd_sai")
TINY = (
    "--layers 1 --channels 64 --heads 1 --seq-len 32 --batch-size 1 --total-batch 64 --steps 2 "
    "--warmup-steps 1 --val-every 0 --val-sequences 1"
)
HEAVY_PYTHON = ("dev/mutate.py", "dev/check_ptxas.py", "dev/check_sass.py")


def program(optimizer):
    path = ROOT / f"build/sim-bf16-{optimizer}/train_gpt2"
    if not path.exists():
        pytest.fail(f"{path} is missing: make programs DEVICE=sim")
    return path


def environment():
    """Without what an outer make hands down; a run script's own make does nothing; no GPU is used."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("MAKE", "SIM_")) and k not in ("MFU", "PRICE", "DATA", "OPTIMIZER", "DRY_RUN")
    }
    return {**kept, "MAKE": "true", "DEVICE": "sim", "SIM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(command, cwd, expect=0, **more):
    """Runs a line of shell; returns its output, standard error included."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={**environment(), **more},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, f"{command}\nexit status {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone, seen from inside: sources are links; what a user has by then is made for real."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "dev", "llmc", "build", "Makefile"):
        (root / name).symlink_to(ROOT / name)
    (root / ".venv").symlink_to(sys.prefix)
    (root / "data").mkdir()
    for script in (ROOT / "data").glob("*.py"):
        (root / "data" / script.name).symlink_to(script)
    (root / "my_texts").mkdir()
    for i in range(12):
        line = f"Page {i} of a book about nothing much, which goes on for a while.\n"
        (root / f"my_texts/{i}.txt").write_text(line * 20)
    run(".venv/bin/python data/text.py my_texts/ --output data/mine", root)
    (root / "data/shakespeare_gpt2").symlink_to("mine")
    for optimizer in OPTIMIZERS:
        synthetic_log.write(root / f"runs/124m-{optimizer}", optimizer=optimizer, steps=6, val_every=2)
    run(f"{program('adamw')} --train-data 'data/mine/train_*.bin' --output-dir out {TINY} --steps 1", root)
    (root / "gpt2").symlink_to("out/latest")
    return root


# ---- the commands of the pages


def commands(page):
    """Lines of the page's ```sh blocks, continuation lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r" +", " ", line) for line in lines if line and not line.startswith("#")]


def check_make(command, _):
    """The targets exist, and make knows how."""
    run(f"env -u MAKE -u DEVICE {command.replace('make', 'make -n', 1)}", ROOT)


def check_built(command, _):
    """A test program that the make before it has built: make -n has checked its name."""
    assert command.split()[0] in MADE, f"{command}: nothing before it builds that"


def check_training(command, clone):
    """A training run, by the simulator's program, tiny."""
    help_only = "--help" in command or "--dry-run" in command
    profile = " --profile 1" if "--profile" in command else ""
    name = re.sub(r"\W+", "-", command)[-60:]
    tiny = "" if help_only else f" {TINY}{profile} --output-dir tried/{name}"
    output = run(command.replace("build/gpu-", "build/sim-") + tiny, clone)
    if help_only:
        assert "--learning-rate" in output
    elif not profile:
        assert (clone / f"tried/{name}/latest/model.safetensors").exists()


def check_compare(command, clone):
    after = f" {TINY}" if " -- " in command else ""
    command = command.replace("--output runs/", "--output tried/")
    run(command.replace("compare.py", "compare.py --device sim", 1) + after if after else command, clone)
    folder = clone / re.search(r"--output (\S+)", command)[1]
    for name in ("losses.png", "report.html", "summary.md"):
        assert (folder / name).stat().st_size > 1000


def check_text(command, clone):
    run(f"{command} --output tried/mine", clone)
    assert (clone / "tried/mine/tokenizer.bin").exists()


def check_plot(command, clone):
    run(f"{command} --output losses.png", clone)
    assert (clone / "losses.png").read_bytes()[1:4] == b"PNG"


def check_tensorboard(command, clone):
    if importlib.util.find_spec("tensorboard"):
        run(command, clone)
    else:
        check_flags(command, clone)


def check_pytest(command, clone):
    """Selects at least one test: with none, pytest's exit status is 5."""
    run(f"{command} --collect-only", clone)


def check_flags(command, clone):
    """A long one: its --help names every flag that the command has."""
    words = shlex.split(command)
    given = [word for word in words if word.startswith("--")]
    program_words = words[: 2 if words[0].endswith("python") else 1]
    text = run(f"{shlex.join(program_words)} --help", clone)
    for flag in given:
        assert re.search(rf"(?<![\w-]){flag}\b", text), f"{flag} is not in the help of {program_words[-1]}"


def check_stage(command, clone):
    """A stage of the GPU's checks: --list prints what it would run."""
    assert run(f"{command} --list", ROOT, DEVICE="gpu", OUT=str(clone / "gpu_check")).strip()


CHECKS = [
    (r"make\b", check_make),
    (r"build/\S+/(kernels/\w+|test_gpt2)|build/host/test/\w+", check_built),
    (r"([A-Z_]+=\S+ )*(build/\S+/train_gpt2|scripts/run_\w+\.sh)", check_training),
    (r"\.venv/bin/python scripts/compare\.py", check_compare),
    (r"\.venv/bin/python scripts/plot\.py", check_plot),
    (r"\.venv/bin/python scripts/to_tensorboard\.py", check_tensorboard),
    (r"\.venv/bin/python data/text\.py", check_text),
    (r"\.venv/bin/python -m pytest", check_pytest),
    (r"\.venv/bin/python dev/roofline\.py", lambda command, clone: run(command, clone)),
    (rf"\.venv/bin/python ({'|'.join(map(re.escape, HEAVY_PYTHON))})", check_flags),
    (r"([A-Z_]+=\S+ )*dev/gpu_check\.sh", check_stage),
]
COMMANDS = [(page, part) for page in PAGES for line in commands(page) for part in line.split(" && ")]
MADE = {word for _, command in COMMANDS if command.startswith("make ") for word in command.split()[1:]}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command(page, command, clone):
    for pattern, check in CHECKS:
        if re.match(rf"{pattern}(\s|$)", command):
            check(command, clone)
            return
    pytest.fail(f"{page}: no check is known for: {command}")


def test_pages_have_commands():
    assert all(len(commands(page)) >= 10 for page in PAGES)


# ---- what the pages name


def tree():
    """Paths of the README's tree."""
    block = re.search(r"^## The tree\n+```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    return [line.split()[0] for line in block.splitlines() if line]


def test_tree_has_only_what_exists():
    assert [path for path in tree() if not (ROOT / path).exists()] == []
    assert len(tree()) == len(set(tree()))


def test_tree_has_every_file():
    """A line a file; what lies in a folder that has a line needs none."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("only in a clone")
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = tree()
    folders = tuple(path for path in named if path.endswith("/"))
    known = {"README.md", "dev/report.png", "dev/ptxas_table.tsv", "scripts/report.css"}
    missing = [
        path
        for path in listing.stdout.split()
        if path not in named
        and path not in known
        and not path.startswith((*folders, "."))
        and not path.startswith("scripts/requirements")
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    quoted = re.findall(r"`((?:llmc|scripts|dev)/[\w./]+|\w+\.(?:cu|cuh|h))`", text)
    homes = (ROOT, ROOT / "llmc")
    absent = {name for name in quoted if not any((home / name).exists() for home in homes)}
    assert {name for name in absent if not re.search(r"\b(OP|NAME)\b|_?NAME", name)} == set()


@pytest.fixture(scope="module")
def flags(clone):
    """Of the programs and scripts that the pages speak of."""
    programs = [f"build/sim-bf16-{optimizer}/train_gpt2" for optimizer in OPTIMIZERS]
    scripts = ["scripts/compare.py", "data/text.py", "dev/roofline.py", *HEAVY_PYTHON]
    helps = [run(f"{name} --help", clone) for name in programs]
    helps += [run(f".venv/bin/python {name} --help", clone) for name in scripts]
    helps.append((ROOT / "dev/kernels/harness.h").read_text())
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(helps)))


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page, flags):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / page).read_text()))
    assert named - flags == set()


# ---- the run scripts


@pytest.mark.parametrize("size", SIZES)
def test_head_of_a_run_script_is_right(size, clone):
    """The lines in its head are those that it prints, and memory is the program's plan, which fits 80 GB."""
    path = ROOT / f"scripts/run_{size}.sh"
    head = {m[1]: m[0][1:].strip() for m in re.finditer(r"^#   (\w+)  .*$", path.read_text(), re.M)}
    assert list(head) == ["parameters", "tokens", "FLOP", "memory", "time"]
    gib = []
    for optimizer in OPTIMIZERS:
        output = run(f"scripts/run_{size}.sh {optimizer} --dry-run", clone)
        printed = {line.split()[0]: line for line in output.splitlines() if line and line[0] != " "}
        for key in ("parameters", "tokens", "FLOP", "time"):
            assert printed[key] == head[key]
        parameters = int(re.search(r"^parameters: (\d+),", output, re.M)[1])
        assert f"{parameters:,} " in head["parameters"]
        total, available = map(float, re.search(r" total +\d+ +([\d.]+) of ([\d.]+) GiB", output).groups())
        assert total < available < 80e9 / 2**30
        gib.append(total)
        batch = int(re.search(r"--batch-size +(\d+)", output)[1])
        assert re.search(rf"--output-dir +runs/{size}-{optimizer} \*", output)
        assert re.search(r"--train-data +data/openwebtext/\*train_\*\.bin", output)
    wanted = f"{gib[0]:.1f} GiB with AdamW, {gib[1]:.1f} GiB with SGD-SaI, at {batch} sequences a micro-step"
    assert head["memory"].split(None, 1)[1] == wanted


def test_arithmetic_of_a_run_script(clone):
    """The printed figures against the formulas, computed here."""
    output = run("scripts/run_124m.sh --dry-run", clone, MFU="0.5", PRICE="3")
    n, tokens = 124439808, 19073 * 524288
    flop = 6 * n + 6 * 12 * 768 * 1024
    hours = tokens * flop / (989e12 * 0.5) / 3600
    assert f"{hours:.3g} hours on one H100 at 50% of its 989 TFLOP/s: ${hours * 3:.0f} at $3.00" in output
    assert f"{flop / 1e8:.2f}e8 a token" in output
    assert f"{tokens * flop / 1e18:.2f}e18 in all" in output
    assert "124,439,808" in output
    assert "AdamW" not in output.splitlines()[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_of_a_run_script(optimizer, clone):
    by_argument = run(f"scripts/run_124m.sh {optimizer} --dry-run", clone)
    by_variable = run("scripts/run_124m.sh", clone, OPTIMIZER=optimizer, DRY_RUN="1")
    assert by_argument == by_variable
    assert ("--momentum" in by_argument) == (optimizer == "sgd_sai")
    changed = run(f"scripts/run_124m.sh {optimizer} --dry-run --learning-rate 0.5", clone)
    assert re.search(r"--learning-rate +0\.5 \*", changed)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("scripts/run_124m.sh lion", "'lion': wanted adamw, sgd_sai or a flag"),
        ("OPTIMIZER=lion scripts/run_124m.sh", "OPTIMIZER=lion: wanted adamw or sgd_sai"),
        ("DRY_RUN=yes scripts/run_124m.sh", "DRY_RUN=yes: wanted 0 or 1"),
        ("DATA=nowhere scripts/run_124m.sh", "no nowhere/*train_*.bin"),
        ("DATA=data/mine scripts/run_124m.sh --stepps 3", "--stepps"),
        ("DEVICE= PATH=$PWD/no_gpu:$PATH scripts/run_124m.sh", "no GPU answers here"),
    ],
)
def test_run_script_refuses(command, message, clone):
    (clone / "no_gpu").mkdir(exist_ok=True)
    smi = clone / "no_gpu/nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    assert message in run(command, clone, expect=1)


def test_run_script_takes_shards_of_llm_c(clone):
    """Other names of the files, as llm.c's data scripts give them."""
    folder = clone / "fineweb10B"
    folder.mkdir()
    for kind in ("train", "val"):
        (folder / f"fineweb_{kind}_000001.bin").symlink_to(clone / f"data/mine/{kind}_000000.bin")
    run(f"DATA=fineweb10B scripts/run_350m.sh sgd_sai {TINY} --output-dir tried/fineweb", clone)
    assert (clone / "tried/fineweb/latest/config.json").exists()


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_can_be_parsed(script, clone):
    run(f"bash -n scripts/{script}", clone)

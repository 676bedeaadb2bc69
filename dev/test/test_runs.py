"""The scripts that read logs: what they say about finished, growing, broken and incomparable runs.

Run: .venv/bin/pytest dev/test/test_runs.py
"""

import json
import math
import os
import re
import stat
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare
import findings
import plot
import synthetic_log
import to_tensorboard
from findings import Findings
from runlog import LogError, Tail, differing_options, duration, label_runs, read_log, si_bytes, tensor_type

SCRIPTS = Path(compare.__file__).parent
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def script(name, *arguments, cwd, **more):
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, **more)


def findings_of(tmp_path, *runs):
    """Findings about synthetic runs, each given by the arguments of synthetic_log.records()."""
    folders = [synthetic_log.write(tmp_path / f"run{i}", **arguments) for i, arguments in enumerate(runs)]
    return Findings([read_log(folder) for folder in folders])


def row(found, name):
    return next(row for row in found.rows if row.name == name).values


# ---- reading


def test_reads_what_was_written(tmp_path):
    written = list(synthetic_log.records(optimizer="sgd_sai"))
    run = read_log(synthetic_log.write(tmp_path / "a", optimizer="sgd_sai"))
    assert run.finished
    assert run.state_text == "finished"
    assert run.head == written[0]
    by_kind = {kind: [r for r in written if r["kind"] == kind] for kind in ("gsnr", "train", "val", "sample")}
    assert (run.gsnr, run.train, run.val, run.samples) == tuple(by_kind.values())
    assert len(run.gsnr) == run.blocks == 12 * 4 + 4
    assert run.memory["optimizer_state"] == run.computed_state_bytes == 4 * run.padded_parameters + 4 * 52
    seconds = sum(r["step_ms"] for r in by_kind["train"][:40]) / 1000
    assert run.at_step(40) == (40 * 1024, pytest.approx(seconds, rel=1e-12))
    assert run.at_step(0) == (0, 0.0)
    assert run.final_val == (240, by_kind["val"][-1]["loss"])
    assert run.median("step_ms") == statistics.median(r["step_ms"] for r in by_kind["train"][2:])
    short = read_log(synthetic_log.write(tmp_path / "short", steps=3))
    assert short.median("step_ms") == short.train[2]["step_ms"]
    assert read_log(tmp_path / "a" / "log.jsonl").head == run.head


def test_every_prefix_of_a_log_can_be_read_and_drawn(tmp_path):
    """As a crash, or a look while the run goes on, finds it: cut after any record, and in the middle of
    one.
    """
    whole = (
        synthetic_log.write(tmp_path / "a", optimizer="sgd_sai", steps=6, val_every=2) / "log.jsonl"
    ).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    folder = tmp_path / "b"
    folder.mkdir()
    for end in ends:
        for cut in (end, end - 1, end - 10):
            (folder / "log.jsonl").write_bytes(whole[:cut])
            if cut < ends[0] - 1:
                with pytest.raises(LogError):
                    read_log(folder)
                continue
            run = read_log(folder)
            assert run.damaged_lines == []
            assert run.finished == (cut >= ends[-1] - 1)
            assert "unfinished" in run.state_text or run.finished
            Findings([run])
    for lines in (1, 10, 64):  # nothing yet, the first validation, the first steps
        synthetic_log.write(folder, optimizer="sgd_sai", steps=6, val_every=2, lines=lines)
        assert plot.draw([folder], tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(PNG_MAGIC)
        compare.write_results(Findings([read_log(folder)]), tmp_path / "out")


def test_null_losses_skips_and_damage_are_told(tmp_path):
    folder = synthetic_log.write(tmp_path / "a")
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    out = []
    for record in records:
        if record["kind"] == "train" and record["step"] in (100, 101):
            out.append(json.dumps({"kind": "skip", "step": record["step"], "reason": "loss is not finite"}))
        elif record["kind"] == "train" and record["step"] == 102:
            out.append(json.dumps(record | {"loss": None, "grad_norm": None}))
        elif record["kind"] == "val" and record["step"] == 120:
            out.append(json.dumps(record | {"loss": None}))
        elif record["kind"] == "end":
            out.append(json.dumps(record | {"status": "diverged"}))
        else:
            out.append(json.dumps(record))
    out.insert(20, '{"kind": "train", "step"')  # a damaged line that isn't the last
    (folder / "log.jsonl").write_text("\n".join(out) + "\n")
    run = read_log(folder)
    assert run.damaged_lines == [21]
    assert len(run.skipped) == 2
    assert 120 not in dict(run.val_losses)
    assert run.state_text == "diverged at step 240 of 240"
    assert run.at_step(101) == run.at_step(99)
    found = Findings([run])
    assert any("2 updates were skipped" in caveat for caveat in found.caveats)
    assert any("diverged" in caveat for caveat in found.caveats)
    assert any("can't be read" in caveat for caveat in found.caveats)
    compare.write_results(found, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such log"),
        (b"", "doesn't begin with a `run` record"),
        (b'{"kind": "train", "step": 1, "tokens": 1, "loss": 1}\n', "doesn't begin with a `run` record"),
        (b"\x00\xff\n\n", "doesn't begin with a `run` record"),
        (b'{"kind": "run"}\n{"kind": "run"}\n', "a second `run` record"),
    ],
)
@pytest.mark.parametrize("name", ["plot.py", "compare.py", "to_tensorboard.py"])
def test_bad_logs_are_one_line(tmp_path, content, words, name):
    if name == "to_tensorboard.py":
        pytest.importorskip("tensorboard")
        if (content and b"train" not in content) or content == b"":
            pytest.skip("it follows the log and waits for records")
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "log.jsonl").write_bytes(content)
    result = script(name, "run", "--output", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr
    assert "run/log.jsonl" in result.stderr


def test_tail_sees_each_record_once(tmp_path):
    whole = (synthetic_log.write(tmp_path / "a", steps=20) / "log.jsonl").read_bytes()
    folder = tmp_path / "b"
    tail = Tail(folder)
    assert tail.new_records() == []
    folder.mkdir()
    seen = []
    with open(folder / "log.jsonl", "wb", buffering=0) as file:
        for start in range(0, len(whole), 997):
            file.write(whole[start : start + 997])
            seen += tail.new_records()
            if tail.run:  # what is derived from the records keeps up with them
                assert [step for step, _ in tail.run.val_losses] == [r["step"] for r in tail.run.val]
                assert len(tail.run.clock) == len(tail.run.train) + 1
    assert seen == [json.loads(line) for line in whole.splitlines()]
    assert tail.run.finished
    assert tail.run.val_losses == read_log(tmp_path / "a").val_losses
    assert tail.run.clock == read_log(tmp_path / "a").clock
    tail.close()


# ---- names and numbers


def test_labels_tell_runs_apart(tmp_path):
    found = findings_of(
        tmp_path,
        {},
        {"optimizer": "sgd_sai"},
        {"optimizer": "sgd_sai", "gain": "one", "learning_rate": 1.0},
        {"optimizer": "sgd_sai"},
    )
    labels = [run.label for run in found.runs]
    assert labels == [
        "AdamW",
        "SGD-SaI, lr 0.005, gain raw (run1)",
        "SGD-SaI, lr 1, gain one",
        "SGD-SaI, lr 0.005, gain raw (run3)",
    ]
    pair = found.runs[:2]
    label_runs(pair)
    assert [run.label for run in pair] == ["AdamW", "SGD-SaI"]
    differing = differing_options(pair)
    assert set(differing) == {
        "output-dir",
        "learning-rate",
        "weight-decay",
        "beta1",
        "beta2",
        "momentum",
        "gain",
    }


def test_padded_parameters_and_projected_bytes():
    """GPT-2's published counts are 124439808, 354823168, 774030080 and 1557611200; 47 rows of padding
    each.
    """
    published = {"124M": 124439808, "350M": 354823168, "774M": 774030080, "1558M": 1557611200}
    for size, (layers, channels, _) in findings.GPT2_SIZES.items():
        assert findings.padded_parameters(layers, channels) == published[size] + 47 * channels
    for projection in findings.projections():
        layers, channels, _ = findings.GPT2_SIZES[projection.size]
        padded = findings.padded_parameters(layers, channels)
        state = 8 * padded if projection.optimizer == "adamw" else 4 * padded + 4 * (12 * layers + 4)
        assert projection.optimizer_state == state
        assert projection.total == 10 * padded + state


@pytest.mark.parametrize(("momentum", "bytes_a_parameter"), [(0.9, 4), (0.0, 0)])
def test_computed_state(tmp_path, momentum, bytes_a_parameter):
    run = read_log(synthetic_log.write(tmp_path / "a", optimizer="sgd_sai", momentum=momentum))
    assert run.computed_state_bytes == bytes_a_parameter * run.padded_parameters + 4 * 52


def test_measured_state_that_isnt_as_computed_is_shouted(tmp_path):
    folder = synthetic_log.write(tmp_path / "a")
    text = (folder / "log.jsonl").read_text()
    state = read_log(folder).state_bytes
    found = Findings([read_log(folder)])
    assert next(r for r in found.rows if r.name == "computed").note == "bytes; as measured"
    (folder / "log.jsonl").write_text(text.replace(f'"bytes": {state}', f'"bytes": {state + 4}'))
    found = Findings([read_log(folder)])
    assert next(r for r in found.rows if r.name == "computed").note == "bytes; NOT as measured"


def test_texts_of_numbers():
    assert [si_bytes(n) for n in (5, 1000, 999_500, 9_999, 28e9, 1.5e12)] == [
        "5 bytes",
        "1.00 kB",
        "1,000 kB",
        "10.0 kB",
        "28.0 GB",
        "1.50 TB",
    ]
    assert [duration(s) for s in (0.44, 1, 61, 3600, 90061)] == [
        "0.4 s",
        "0:01",
        "1:01",
        "1:00:00",
        "25:01:01",
    ]
    assert tensor_type("transformer.h.11.attn.c_attn.weight") == "h.*.attn.c_attn.weight"
    assert tensor_type("transformer.ln_f.bias") == "ln_f.bias"


def test_unigram_entropy_of_the_validation_files(tmp_path):
    import dataset
    from encoder import Options
    from sources import find_sources

    (tmp_path / "in.txt").write_text("aab" * 50)
    inputs = find_sources([str(tmp_path / "in.txt")])
    dataset.build(inputs, tmp_path / "data", Options(tokenizer="bytes"), quiet=True)
    val = tmp_path / "data" / "val_000000.bin"
    found = findings_of(
        tmp_path, {"val_files": [str(val)]}, {"optimizer": "sgd_sai", "val_files": [str(val)]}
    )
    counts = [10, 5]  # the last 15 of 151 tokens
    expected = -sum(c / 15 * math.log(c / 15) for c in counts)
    assert found.entropy.tokens == 15
    assert found.entropy.nats == pytest.approx(expected, abs=1e-12)
    loss = found.runs[0].final_val[1]
    assert row(found, "final loss is below it by")[0] == f"{expected - loss:.4f}"
    other = findings_of(tmp_path / "x", {"val_files": [str(val)]}, {"val_files": ["/none/val_000000.bin"]})
    assert other.entropy is None


# ---- the verdict


def test_verdict_of_a_pair(tmp_path):
    found = findings_of(tmp_path, {"final": 2.5}, {"optimizer": "sgd_sai", "final": 2.6})
    a, s = (run.final_val[1] for run in found.runs)
    gap = round(s, 3) - round(a, 3)
    assert found.verdict == (
        f"After 245,760 tokens, AdamW has a validation loss of {a:.3f} nats and SGD-SaI one of {s:.3f},"
        f" {gap:.3f} higher. SGD-SaI's optimizer state takes 4.00 bytes a parameter, AdamW's 8.00."
    )
    assert row(found, "difference at step 240") == ["0", f"{s - a:+.4f}"]
    text = " ".join(found.caveats)
    for words in ("one learning rate each", "One seed each", "controls", "toy", "simulator"):
        assert words in text


def test_verdict_turns_with_the_numbers(tmp_path):
    lower = findings_of(tmp_path / "a", {"final": 2.6}, {"optimizer": "sgd_sai", "final": 2.5})
    assert " lower." in lower.verdict
    same = findings_of(tmp_path / "b", {"final": 2.5}, {"optimizer": "sgd_sai", "final": 2.5})
    assert "the same to 0.001" in same.verdict


def test_verdict_takes_the_best_setting_of_each(tmp_path):
    sweep = [{"optimizer": "sgd_sai", "final": 2.6 + 0.1 * i, "learning_rate": 1e-3 * 3**i} for i in range(3)]
    found = findings_of(tmp_path, *sweep, {"final": 2.5})
    assert found.runs[0].title == "AdamW"
    best = min(run.final_val[1] for run in found.runs[1:])
    assert f"the best of 3 SGD-SaI settings one of {best:.3f}" in found.verdict
    assert "AdamW was tried at one learning rate:" in " ".join(found.caveats)


def test_verdict_with_seeds_gives_means_and_ranges(tmp_path):
    runs = [{"seed": seed, "final": 2.5 + 0.01 * seed} for seed in (1, 2, 3)]
    near = [{"optimizer": "sgd_sai", "seed": seed, "final": 2.51 + 0.01 * seed} for seed in (1, 2)]
    far = [{"optimizer": "sgd_sai", "seed": seed, "final": 2.71 + 0.01 * seed} for seed in (1, 2)]
    overlapping = findings_of(tmp_path / "near", *runs, *near)
    assert "whose ranges overlap" in overlapping.verdict
    mean = statistics.mean(run.final_val[1] for run in overlapping.runs[:3])
    assert f"AdamW has a validation loss of {mean:.3f} nats" in overlapping.verdict
    assert "whose ranges do not overlap" in findings_of(tmp_path / "far", *runs, *far).verdict
    assert not any("One seed" in caveat for caveat in overlapping.caveats)


def test_controls_are_methods_of_their_own(tmp_path):
    found = findings_of(
        tmp_path,
        {"final": 2.5},
        {"optimizer": "sgd_sai", "final": 2.6},
        {"optimizer": "sgd_sai", "final": 2.4, "gain": "sqrt_n"},  # better than SGD-SaI, and not taken for it
        {"optimizer": "sgd_sai", "final": 2.7, "gain": "one"},
    )
    losses = [run.final_val[1] for run in found.runs]
    assert f"SGD-SaI one of {losses[1]:.3f}" in found.verdict
    assert f"the control sqrt(n) reached {losses[2]:.3f}" in found.verdict
    assert f"plain SGD with momentum reached {losses[3]:.3f}" in found.verdict
    assert not any("Without the controls" in caveat for caveat in found.caveats)


def test_verdict_of_runs_that_did_not_finish(tmp_path):
    crashed = {"optimizer": "sgd_sai", "lines": 150}
    found = findings_of(tmp_path / "a", {}, crashed)
    step = found.runs[1].final_val[0]
    assert step < 240
    assert (
        f"has not finished. After {step * 1024:,} tokens, the last that all runs validated at,"
        in found.verdict
    )
    assert row(found, f"difference at step {step}")[0] == "0"
    found = findings_of(tmp_path / "b", {}, {"optimizer": "sgd_sai", "seed": 5}, crashed)
    assert "has no part in this. After 245,760 tokens" in found.verdict
    nothing = findings_of(tmp_path / "c", {}, {"optimizer": "sgd_sai", "lines": 5})
    assert "no step at which all runs have a validation loss" in nothing.verdict


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"val_sequences": 64}, "can't be compared: they differ in --val-sequences"),
        ({"model": (4, 128, 2, 512, 128)}, "can't be compared: they differ in vocabulary"),
        ({"model": (4, 128, 2, 256, 64)}, "can't be compared: they differ in --seq-len"),
    ],
)
def test_incomparable_runs_get_no_verdict(tmp_path, other, words):
    assert words in findings_of(tmp_path, {}, {"optimizer": "sgd_sai"} | other).verdict


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"grad_clip": 0}, "--grad-clip"),
        ({"total_batch": 2048}, "--total-batch"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_confounds_are_named(tmp_path, other, words):
    found = findings_of(tmp_path, {}, {"optimizer": "sgd_sai"} | other)
    assert f"also differ in {words}" in found.verdict
    assert "also differ" not in findings_of(tmp_path / "same", {}, {"optimizer": "sgd_sai"}).verdict


# ---- compare.py as a command


def test_compare_existing_runs(tmp_path):
    synthetic_log.write(tmp_path / "runs" / "a", sample="Enter <GHOST> & \x1b[31mHAMLET\x07")
    synthetic_log.write(tmp_path / "runs" / "b", optimizer="sgd_sai")
    result = script("compare.py", "runs/a", "runs/b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "Enter <GHOST> & \ufffd[31mHAMLET\ufffd" in result.stdout
    found = Findings([read_log(tmp_path / "runs" / name) for name in "ab"])
    assert found.verdict in result.stdout
    for name in ("losses.png", "report.html", "summary.md"):
        assert (tmp_path / "runs" / name).stat().st_size > 500
    summary = (tmp_path / "runs" / "summary.md").read_text()
    assert found.verdict in summary
    assert "| --learning-rate | 0.004 | 0.005 |" in summary
    widths = {line.count("|") for line in summary.splitlines() if line.startswith("|")}
    assert widths == {4}


FAKE_TRAINER = """#!{python}
import json, os, sys, time
sys.path.insert(0, {tests!r})
import synthetic_log
optimizer = sys.argv[0].split("-")[-1].split("/")[0]
arguments = dict(zip([a for a in sys.argv[1::2]], sys.argv[2::2]))
if "--fail" in arguments: sys.exit("rank 0: --fail: no such flag")
folder = arguments["--output-dir"]
os.makedirs(folder)
steps = int(arguments["--steps"])
rate = float(arguments.get("--learning-rate", 1e-3))
more = dict(learning_rate=rate, omp=os.environ.get("OPENBLAS_NUM_THREADS"), sim=os.environ.get("SIM_THREADS"))
print("begins")
with open(folder + "/log.jsonl", "w") as file:
    for i, record in enumerate(synthetic_log.records(optimizer=optimizer, steps=steps, **more)):
        file.write(json.dumps(record) + "\\n")
        file.flush()
        if record["kind"] == "train": time.sleep(0.02)
        if "--crash" in arguments and i > int(arguments["--crash"]): os.abort()
"""


@pytest.fixture
def builds(tmp_path):
    """A build folder whose programs write synthetic logs."""
    for optimizer in ("adamw", "sgd_sai"):
        path = tmp_path / "build" / f"sim-bf16-{optimizer}" / "train_gpt2"
        path.parent.mkdir(parents=True)
        path.write_text(FAKE_TRAINER.format(python=sys.executable, tests=str(Path(__file__).parent)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "build"


def test_compare_runs_both_builds_at_once(tmp_path, builds):
    own = ["--adamw", "--learning-rate 4e-3", "--sgd_sai", "--learning-rate 5e-3"]
    begin = time.monotonic()
    result = script(
        "compare.py", "--build-dir", builds, "--output", "out", *own, "--", "--steps", "60", cwd=tmp_path
    )
    seconds = time.monotonic() - begin
    assert result.returncode == 0, result.stderr + result.stdout
    runs = [read_log(tmp_path / "out" / name) for name in ("adamw", "sgd_sai")]
    assert [run.options["learning-rate"] for run in runs] == [4e-3, 5e-3]
    assert [run.options["steps"] for run in runs] == [60, 60]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {run.options["omp"] for run in runs} == {run.options["sim"] for run in runs} == {str(threads)}
    assert "adamw      step 60/60" in result.stdout
    assert (tmp_path / "out" / "adamw.txt").read_text() == "begins\n"
    assert (tmp_path / "out" / "report.html").exists()
    assert seconds < 60
    again = script(
        "compare.py", "--build-dir", builds, "--output", "out", "--", "--steps", "60", cwd=tmp_path
    )
    assert (again.returncode, "holds a run already" in again.stderr) == (1, True)


def test_progress_on_a_terminal_fits_80_columns(tmp_path, builds):
    pty = pytest.importorskip("pty")
    command = [sys.executable, str(SCRIPTS / "compare.py"), "--build-dir", str(builds), "--output"]
    leader, follower = pty.openpty()
    command += [str(tmp_path / "out"), "--", "--steps", "20"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    output = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        output += data
    os.close(leader)
    assert process.wait() == 0
    lines = re.findall(r"\x1b\[2K(.*)\r\n", output.decode())
    assert max(map(len, lines)) < 80
    assert len(lines) % 2 == 0  # both runs, each time
    assert re.fullmatch(r"adamw +step 20/20  loss [\d.]+  val [\d.]+  done", lines[-2])
    assert re.fullmatch(r"sgd_sai +step 20/20  loss [\d.]+  val [\d.]+  done", lines[-1])


def test_compare_tells_of_a_run_that_fails(tmp_path, builds):
    common = ["--build-dir", builds, "--output"]
    result = script(
        "compare.py", *common, "out", "--sgd_sai", "--crash 70", "--", "--steps", "30", cwd=tmp_path
    )
    assert result.returncode == 1
    assert "sgd_sai failed with status -6" in result.stderr
    assert "has not finished" in result.stdout
    assert (tmp_path / "out" / "report.html").exists()
    result = script("compare.py", *common, "out2", "--", "--steps", "30", "--fail", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "rank 0: --fail: no such flag" in result.stderr
    assert "no run wrote a log" in result.stderr


def test_several_runs_of_one_build(tmp_path, builds):
    own = ["--sgd_sai", "--learning-rate 1e-3", "--sgd_sai", "--learning-rate 2e-3"]
    result = script(
        "compare.py", "--build-dir", builds, "--output", "o", *own, "--", "--steps", "9", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    rates = [read_log(tmp_path / "o" / n).options["learning-rate"] for n in ("adamw", "sgd_sai", "sgd_sai_2")]
    assert rates == [1e-3, 1e-3, 2e-3]
    assert "the best of 2 SGD-SaI settings" in result.stdout


def test_compare_bad_command_lines(tmp_path, builds):
    synthetic_log.write(tmp_path / "a")
    cases = [
        (
            ["--", "--steps", "3"],
            "run `make train_gpt2 DEVICE=sim PRECISION=bf16 OPTIMIZER=adamw`",
            tmp_path / "no",
        ),
        (["a", "--", "--steps", "3"], "not both", builds),
        ([], "give runs that exist, or after -- the options", builds),
        (["--", "--output-dir", "x"], "--output-dir: each run has its own", builds),
        (["a", "a"], "named twice", builds),
    ]
    for arguments, words, folder in cases:
        result = script("compare.py", "--build-dir", folder, *arguments, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert words in result.stderr


def test_results_that_cant_be_written(tmp_path):
    synthetic_log.write(tmp_path / "a")
    (tmp_path / "file").write_text("")
    result = script("compare.py", "a", "--output", "file/out", cwd=tmp_path)
    assert result.returncode == 1
    assert "can't be written" in result.stderr.splitlines()[-1]
    result = script("plot.py", "a", "--output", "none/x.png", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)


# ---- plot.py, to_tensorboard.py


def test_plot_writes_beside_the_log(tmp_path):
    synthetic_log.write(tmp_path / "a", lines=120)
    result = script("plot.py", "a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "unfinished: the log ends at step" in result.stdout
    assert (tmp_path / "a" / "losses.png").read_bytes().startswith(PNG_MAGIC)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["log.jsonl", "losses.png"]


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = synthetic_log.write(tmp_path / "a", steps=50, val_every=10, sample="To be,\nor not")
    run = read_log(folder)
    to_tensorboard.main([str(folder), "--output", str(tmp_path / "tb")])
    events = EventAccumulator(str(tmp_path / "tb" / "a"))
    events.Reload()
    losses = events.Scalars("loss/train")
    assert [e.step for e in losses] == list(range(1, 51))
    assert [e.value for e in losses] == pytest.approx([r["loss"] for r in run.train], rel=1e-6)
    assert [(e.step, e.value) for e in events.Scalars("loss/validation")] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in run.val_losses
    ]
    assert losses[-1].wall_time - losses[0].wall_time == pytest.approx(
        sum(r["step_ms"] for r in run.train[1:]) / 1000, rel=1e-5
    )
    for tag in to_tensorboard.TAGS.values():
        assert len(events.Scalars(tag)) == 50
    (sample,) = events.Tensors("sample")
    assert sample.tensor_proto.string_val[0] == b"    To be,\n    or not"
    with pytest.raises(LogError, match="has events already"):
        to_tensorboard.main([str(folder), "--output", str(tmp_path / "tb")])


def test_tensorboard_follows(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = (
        (synthetic_log.write(tmp_path / "a", steps=30) / "log.jsonl").read_text().splitlines(keepends=True)
    )
    (tmp_path / "b").mkdir()
    log = tmp_path / "b" / "log.jsonl"
    log.write_text("".join(lines[:20]))
    command = [sys.executable, str(SCRIPTS / "to_tensorboard.py"), "b", "--follow", "--output", "tb"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "tb").glob("b/events*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    with open(log, "a") as file:
        file.write("".join(lines[20:]))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"{len(lines)} records of 1 runs" in output
    events = EventAccumulator(str(tmp_path / "tb" / "b"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/train")] == list(range(1, 31))


def test_tensorboard_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    synthetic_log.write(tmp_path / "a")
    with pytest.raises(LogError, match=r"requirements-optional\.txt"):
        to_tensorboard.main([str(tmp_path / "a"), "--output", str(tmp_path / "tb")])


@pytest.mark.parametrize("name", ["compare.py", "plot.py", "to_tensorboard.py"])
def test_help(name, tmp_path):
    result = script(name, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 120
    bad = script(name, "--nonsense", cwd=tmp_path)
    assert bad.returncode != 0
    assert "Traceback" not in bad.stderr

"""What a set of runs shows: the table of numbers, the verdict that they support, and what they don't show."""

import sys
from dataclasses import dataclass
from pathlib import Path

from runlog import (
    WARMUP_STEPS,
    differing_options,
    duration,
    is_number,
    label_runs,
    option_text,
    si_bytes,
    state_bytes,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "data"))
from shards import DataError, unigram_entropy  # noqa: E402  lies in data/

# Flags that are an optimizer's own business; all others should agree between runs that are compared.
TUNED_FLAGS = {"learning-rate", "weight-decay", "beta1", "beta2", "eps", "momentum", "gain", "output-dir"}
# Without effect on the result.
NEUTRAL_FLAGS = {"val-every", "sample-every", "recompute", "tune", "graph", "profile", "dry-run", "model"}
GPT2_SIZES = {"124M": (12, 768, 12), "350M": (24, 1024, 16), "774M": (36, 1280, 20), "1558M": (48, 1600, 25)}


@dataclass(frozen=True)
class Row:
    """A line of the table: one value a run."""

    name: str
    values: list
    note: str = ""


class Findings:
    """Everything that the terminal, report.html and summary.md say about these runs."""

    def __init__(self, runs):
        order = ["adamw", "sgd_sai"]
        self.runs = sorted(runs, key=lambda run: order.index(run.optimizer) if run.optimizer in order else 2)
        label_runs(self.runs)
        self.entropy = validation_entropy(self.runs)
        finished = [run for run in self.runs if run.finished]
        self.compared = finished if len(finished) > 1 else self.runs
        self.common_step = common_validation(self.compared)
        self.rows = table(self)
        self.option_rows = option_rows(self.runs)
        self.verdict = verdict(self)
        self.caveats = caveats(self)

    def common_loss(self, run):
        """The validation loss at the last step that all compared runs validated at."""
        return dict(run.val_losses).get(self.common_step)


def validation_entropy(runs):
    """Unigram entropy of the validation tokens in nats; None where they differ between runs or aren't at
    hand.
    """
    lists = {tuple(run.head.get("data", {}).get("val", {}).get("files", [])) for run in runs if _has_val(run)}
    if len(lists) != 1:
        return None
    files = [_find(name, runs) for name in lists.pop()]
    if not files or None in files:
        return None
    try:
        return unigram_entropy(files)
    except DataError:
        return None


def _has_val(run):
    return bool(run.head.get("data", {}).get("val"))


def _find(name, runs):
    """The file that a log names relative to the folder in which the run was started."""
    for folder in (Path(), ROOT, *(run.path.parent for run in runs)):
        if (folder / name).is_file():
            return folder / name
    return None


def common_validation(runs):
    """The last step at which every run validated, None where there is none."""
    steps = [{step for step, _ in run.val_losses} for run in runs]
    common = set.intersection(*steps) if steps else set()
    return max(common, default=None)


# ---- the table


def table(findings):
    """The rows of the comparison, those without any value left out."""
    runs = findings.runs
    rows = [
        Row("state of the run", [run.state_text for run in runs]),
        Row("final validation loss", [_loss_text(run.final_val) for run in runs], "nats a token"),
        Row("best validation loss", [_loss_text(run.best_val) for run in runs], "nats a token"),
    ]
    training = [final_training_loss(run) for run in runs]
    training = ["-" if loss is None else f"{loss:.4f}" for loss in training]
    rows.append(Row("final training loss", training, "nats a token, mean of the last twentieth"))
    if findings.common_step is not None and len(runs) > 1:
        reference = findings.compared[0]
        rows.append(
            Row(
                f"difference at step {findings.common_step:,}",
                [_difference_text(findings, run, reference) for run in runs],
                f"nats, to {reference.label}",
            )
        )
    if findings.entropy:
        nats = findings.entropy.nats
        rows.append(Row("unigram entropy", [f"{nats:.4f}"] * len(runs), "nats, of all validation tokens"))
        below = [f"{nats - run.final_val[1]:.4f}" if run.final_val else "-" for run in runs]
        rows.append(Row("final loss is below it by", below, "nats"))
    rows += [
        Row("tokens trained on", [f"{run.train[-1]['tokens']:,}" if run.train else "-" for run in runs]),
        Row("parameters", [f"{run.parameters:,}" for run in runs], "without padding"),
        *_state_rows(runs),
        Row("all memory", [si_bytes(sum(run.memory.values())) if run.memory else "-" for run in runs]),
        *_time_rows(runs),
    ]
    if any(run.skipped for run in runs):
        rows.append(Row("skipped updates", [f"{len(run.skipped):,}" for run in runs]))
    return [row for row in rows if any(value != "-" for value in row.values)]


def _difference_text(findings, run, reference):
    if run is reference:
        return "0"
    loss = findings.common_loss(run)
    return "-" if loss is None else f"{loss - findings.common_loss(reference):+.4f}"


def _loss_text(pair):
    return f"{pair[1]:.4f} (step {pair[0]:,})" if pair else "-"


def _state_rows(runs):
    measured = [run.state_bytes for run in runs]
    computed = [run.computed_state_bytes if run.padded_parameters else None for run in runs]
    a_parameter = [
        f"{bytes_ / run.padded_parameters:.3f}" if bytes_ is not None and run.padded_parameters else "-"
        for bytes_, run in zip(measured, runs, strict=True)
    ]
    pairs = [pair for pair in zip(measured, computed, strict=True) if None not in pair]
    same = all(m == c for m, c in pairs)
    return [
        Row("optimizer state, measured", [_bytes_text(value) for value in measured], "bytes"),
        Row("a parameter", a_parameter, "bytes; padding counted among the parameters"),
        Row(
            "computed",
            [_bytes_text(value) for value in computed],
            "bytes; as measured" if same else "bytes; NOT as measured",
        ),
    ]


def _bytes_text(value):
    return "-" if value is None else f"{value:,}"


def _time_rows(runs):
    note = f"median of all steps but the first {WARMUP_STEPS}"
    return [
        Row("time a step", [_number(run.median("step_ms"), " ms") for run in runs], note),
        Row("of it the optimizer", [_number(run.median("optimizer_ms"), " ms") for run in runs], note),
        Row("speed", [_number(run.median("tokens_per_second"), " tokens/s") for run in runs], note),
        Row(
            "training time",
            [duration(run.clock[-1][2]) if run.train else "-" for run in runs],
            "sum of the steps",
        ),
    ]


def _number(value, unit):
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def option_rows(runs):
    """What differs between the runs: options, then what else explains them."""
    rows = [Row(f"--{flag}", [run.option_text(flag) for run in runs]) for flag in differing_options(runs)]
    for name, value_of in FACTS.items():
        values = [value_of(run) for run in runs]
        if len(set(values)) > 1 and name != "command":
            rows.append(Row(name, values))
    return rows


def _nested(*names):
    def value_of(run):
        value = run.head
        for name in names:
            value = (value or {}).get(name)
        return option_text(value)

    return value_of


def _data_text(part):
    def value_of(run):
        data = run.head.get("data", {}).get(part)
        if not data:
            return "-"
        count = len(data["files"])
        return f"{data['tokens']:,} tokens in {count} file{'s' if count != 1 else ''}"

    return value_of


FACTS = {
    "device": _nested("device"),
    "precision": _nested("precision"),
    "commit": _nested("commit"),
    "GPU": _nested("gpu", "name"),
    "GPU memory": lambda run: si_bytes(run.head.get("gpu", {}).get("memory_bytes") or 0),
    "multiprocessors": _nested("gpu", "sms"),
    "compute capability": _nested("gpu", "compute_capability"),
    "CUDA runtime": _nested("cuda_runtime"),
    "CUDA driver": _nested("cuda_driver"),
    "cuBLASLt": _nested("cublaslt"),
    "parameters": lambda run: f"{run.parameters:,}",
    "padded parameters": lambda run: f"{run.padded_parameters:,}",
    "training data": _data_text("train"),
    "validation data": _data_text("val"),
    "command": lambda run: " ".join(run.head.get("command", [])),
}


# ---- the verdict


def method(run):
    """What a run is a run of: SGD-SaI's control gains are methods of their own."""
    gain = run.options.get("gain")
    if run.optimizer == "sgd_sai" and gain in ("sqrt_n", "one"):
        return {"sqrt_n": "the control sqrt(n)", "one": "plain SGD with momentum"}[gain]
    return run.title


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but the seed."""

    method: str
    runs: list
    losses: list  # at the common step

    @property
    def mean(self):
        return sum(self.losses) / len(self.losses)

    @property
    def span(self):
        return min(self.losses), max(self.losses)


def configurations(findings):
    """The runs grouped by all that they do alike but for the seed."""
    groups = {}
    for run in findings.compared:
        options = sorted(
            (f, option_text(v)) for f, v in run.options.items() if f not in ("seed", "output-dir")
        )
        groups.setdefault((run.optimizer, str(options)), []).append(run)
    return [Configuration(method(g[0]), g, [findings.common_loss(run) for run in g]) for g in groups.values()]


def incomparable(runs):
    """What makes the runs' validation losses numbers about different things."""
    checks = {
        "validation data": _data_text("val"),
        "--val-sequences": lambda run: run.option_text("val-sequences"),
        "--seq-len": lambda run: run.option_text("seq-len"),
        "vocabulary": _nested("model", "vocab_size"),
    }
    return [name for name, value_of in checks.items() if len({value_of(run) for run in runs}) > 1]


def confounds(runs):
    """What differs besides the optimizer and its own options, and may explain a difference in loss."""
    ignored = TUNED_FLAGS | NEUTRAL_FLAGS | {"seed", "val-sequences", "seq-len", "vocab-size"}
    names = [f"--{flag}" for flag in differing_options(runs) if flag not in ignored]
    facts = ("device", "precision", "GPU", "commit", "training data")
    return names + [name for name in facts if len({FACTS[name](run) for run in runs}) > 1]


def verdict(findings):
    """One or two sentences, no more than the numbers support."""
    runs = findings.compared
    if len(runs) == 1:
        loss = (
            f"its validation loss is {runs[0].final_val[1]:.3f} nats"
            if runs[0].final_val
            else "it has no validation"
        )
        return f"A single run ({runs[0].state_text}): {loss}. There is nothing to compare it with."
    differs = incomparable(runs)
    if differs:
        return f"These runs' losses can't be compared: they differ in {_list(differs)}."
    if findings.common_step is None:
        return "There is no step at which all runs have a validation loss, so their losses can't be compared."
    tokens = runs[0].at_step(findings.common_step)[0]
    when = f"After {tokens:,} tokens" if tokens else "Before any training"
    unfinished = [run for run in findings.runs if not run.finished]
    if unfinished:
        verb = "has" if len(unfinished) == 1 else "have"
        names = _list([f"\u201c{run.label}\u201d" for run in unfinished])
        if unfinished[0] in runs:
            when = f"{names} {verb} not finished. {when}, the last that all runs validated at"
        else:
            when = f"{names} {verb} not finished and {verb} no part in this. {when}"
    when += ","
    best = {}
    for configuration in sorted(configurations(findings), key=lambda c: c.mean):
        best.setdefault(configuration.method, configuration)
    sentences = [f"{when} {_loss_sentence(best, findings)}"]
    if "AdamW" in best and "SGD-SaI" in best:
        sentences += _state_sentence(best)
    if confounds(runs):
        sentences.append(
            f"The runs also differ in {_list(confounds(runs))}, so this isn't the optimizer's doing alone."
        )
    return " ".join(sentences)


def _loss_sentence(best, findings):
    counts = {name: len([c for c in configurations(findings) if c.method == name]) for name in best}
    names = (
        ["AdamW", "SGD-SaI"]
        if "AdamW" in best and "SGD-SaI" in best
        else sorted(best, key=lambda n: best[n].mean)
    )
    first = best[names[0]]
    text = f"{_described(first, counts)} has a validation loss of {first.mean:.3f} nats"
    if len(names) == 1:
        others = [c for c in configurations(findings) if c.method == names[0]]
        if len(others) > 1:
            text += f", the highest of these {max(c.mean for c in others):.3f}"
        return text + "."
    second = best[names[1]]
    gap = round(second.mean, 3) - round(first.mean, 3)  # of the numbers that stand beside it
    relation = "higher" if gap > 0 else "lower"
    relation = "the same to 0.001" if abs(gap) < 0.0005 else f"{abs(gap):.3f} {relation}"
    text += f" and {_described(second, counts)} one of {second.mean:.3f}, {relation}"
    if len(first.runs) > 1 and len(second.runs) > 1:
        apart = first.span[1] < second.span[0] or second.span[1] < first.span[0]
        text += f" (means over seeds, whose ranges {'do not ' if apart else ''}overlap)"
    controls = [best[name] for name in best if name not in names[:2]]
    if controls:
        text += "; " + _list([f"{_described(c, counts)} reached {c.mean:.3f}" for c in controls])
    return text + "."


def _described(configuration, counts):
    count = counts[configuration.method]
    return f"the best of {count} {configuration.method} settings" if count > 1 else configuration.method


def _state_sentence(best):
    adamw, sgd_sai = (best[name].runs[0] for name in ("AdamW", "SGD-SaI"))
    if adamw.state_bytes is None or not sgd_sai.state_bytes or not adamw.padded_parameters:
        return []
    a, s = (run.state_bytes / run.padded_parameters for run in (adamw, sgd_sai))
    return [f"SGD-SaI's optimizer state takes {s:.2f} bytes a parameter, AdamW's {a:.2f}."]


def _list(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# ---- what it doesn't show


def caveats(findings):
    """What a reader might take these runs for, and shouldn't; each a sentence or two."""
    runs = findings.runs
    found = _tuning_caveats(findings) if len(runs) > 1 else []
    found += _scale_caveats(runs)
    if any(run.head.get("device") == "sim" for run in runs):
        found.append("Times are the simulator's, on a CPU: they say nothing about a GPU.")
    found += [f"{run.label}: {run.state_text}." for run in runs if not run.finished]
    found += [f"{run.label}: {len(run.skipped):,} updates were skipped." for run in runs if run.skipped]
    for run in runs:
        if run.damaged_lines:
            found.append(f"{run.label}: {len(run.damaged_lines)} lines of its log can't be read.")
    return found


def _tuning_caveats(findings):
    runs, found = findings.runs, []
    few = {1: [], 2: []}
    for name in dict.fromkeys(method(run) for run in runs):
        rates = {run.option_text("learning-rate") for run in runs if method(run) == name}
        few.get(len(rates), []).append(name)
    for names, count in ((few[1], "one learning rate"), (few[2], "two learning rates")):
        if names:
            each = " each" if len(names) > 1 else ""
            verb = "were" if len(names) > 1 else "was"
            found.append(f"{_list(names)} {verb} tried at {count}{each}: that is not a tuned comparison.")
    if all(len(c.runs) == 1 for c in configurations(findings)):
        found.append(
            "One seed each is not a confidence band: how much another seed would change is not known."
        )
    methods = {method(run) for run in runs}
    if "SGD-SaI" in methods and not {"the control sqrt(n)", "plain SGD with momentum"} <= methods:
        found.append(
            "Without the controls (--gain sqrt_n, --gain one) it can't be told what of SGD-SaI's result"
            " is due to the measured g-SNR."
        )
    return found


def _scale_caveats(runs):
    found = []
    parameters = max(run.parameters for run in runs)
    tokens = max((run.train[-1]["tokens"] for run in runs if run.train), default=0)
    if 0 < parameters < 100e6:
        found.append(
            f"A model of {parameters / 1e6:.2g} million parameters is a toy: GPT-2 begins at 124 million, and"
            " what holds here need not hold there."
        )
    if parameters and 0 < tokens < 20 * parameters:
        found.append(
            f"{tokens / parameters:.2g} tokens a parameter is early in training (20 is a common budget);"
            " curves may cross later."
        )
    seen = max((run.head.get("data", {}).get("train", {}).get("tokens", 0) for run in runs), default=0)
    validated, there = validation_tokens(runs[0])
    if 0 < validated < there:
        found.append(f"Validation is on the first {validated:,} of {there:,} tokens of its text.")
    if seen and tokens > seen:
        found.append(f"The training text was read {tokens / seen:.1f} times.")
    return found


def validation_tokens(run):
    """(how many tokens a validation predicts, how many its files hold)."""
    sequences, length = (int(run.options.get(flag, 0)) for flag in ("val-sequences", "seq-len"))
    there = (run.head.get("data", {}).get("val") or {}).get("tokens", 0)
    return (sequences * length if sequences else there), there


# ---- memory of GPT-2's sizes


@dataclass(frozen=True)
class Projection:
    """Bytes that a GPT-2 takes in the bf16 build, activations not counted."""

    size: str
    optimizer: str
    weights: int
    master_weights: int
    gradients: int
    optimizer_state: int

    @property
    def total(self):
        return self.weights + self.master_weights + self.gradients + self.optimizer_state


def projections():
    """For each GPT-2 and both optimizers: bf16 weights, fp32 master weights and gradients, fp32 state."""
    found = []
    for size, (layers, channels, _) in GPT2_SIZES.items():
        padded = padded_parameters(layers, channels)
        for optimizer in ("adamw", "sgd_sai"):
            state = state_bytes(optimizer, padded, 12 * layers + 4, {})
            found.append(Projection(size, optimizer, 2 * padded, 4 * padded, 4 * padded, state))
    return found


def padded_parameters(layers, channels, vocab_size=50257, positions=1024):
    """Of a GPT-2 whose vocabulary is padded to a multiple of 128."""
    padded_vocab = -(-vocab_size // 128) * 128
    layer = 12 * channels * channels + 13 * channels
    return (padded_vocab + positions) * channels + layers * layer + 2 * channels


def final_training_loss(run):
    """The mean over the last twentieth of the steps, None where there are none."""
    losses = [record["loss"] for record in run.train if is_number(record["loss"])]
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last) if last else None

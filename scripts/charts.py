"""The pictures of runs, drawn with matplotlib: as PNG, and as SVG whose colours follow the page that it
stands in.
"""

import html
import io
import re
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from findings import GPT2_SIZES, projections
from runlog import OPTIMIZER_TITLES, WARMUP_STEPS, gsnr_by_type, is_number, si_bytes

# Apart for colour-blind readers too, in this order. The second of each pair is for dark pages.
SERIES = [
    ("#2c6fb0", "#6fb1f0"),
    ("#d0492f", "#ff8f73"),
    ("#1b8a4c", "#5fd191"),
    ("#8e4fb5", "#cf9bf0"),
    ("#9a7400", "#e6c04a"),
    ("#0f8f9c", "#58d3de"),
    ("#b83280", "#f58cc5"),
    ("#5f6670", "#b3bac4"),
]
INK = ("#1c2430", "#e4e8ee")
MUTED = ("#667080", "#98a2b1")
GRID = ("#dfe3e8", "#343c47")
DASHES = [
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]

OWNERS = ["parameters", "master_weights", "gradients", "optimizer_state", "activations", "logits", "scratch"]
OWNERS += ["workspace"]
MAX_POINTS = 500  # of a line: more can't be told apart and make the report large
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "train_gpt2",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Theme:
    """Colours for one kind of output."""

    ink: str
    muted: str
    grid: str
    series: list
    background: str = "none"

    def style(self, index):
        """Keyword arguments that tell line number `index` from the others by colour and by dashes."""
        return {"color": self.series[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)]}


PNG = Theme(INK[0], MUTED[0], GRID[0], [light for light, _ in SERIES], "#ffffff")
# Colours that stand for CSS variables; figure_svg() puts the variables in.
SVG = Theme("#000001", "#000002", "#000003", [f"#0000{16 + i:02x}" for i in range(len(SERIES))])
VARIABLES = {SVG.ink: "--ink", SVG.muted: "--muted", SVG.grid: "--grid"}
VARIABLES |= {color: f"--series-{i}" for i, color in enumerate(SVG.series)}


def css_variables(dark):
    """The declarations of the variables that SVG pictures use."""
    names = [("--ink", INK), ("--muted", MUTED), ("--grid", GRID)]
    names += [(f"--series-{i}", pair) for i, pair in enumerate(SERIES)]
    return " ".join(f"{name}: {pair[dark]};" for name, pair in names)


def figure_svg(figure, name, description):
    """The figure as an <svg> element for a page that has css_variables(). `name` keeps its ids apart from
    others'.
    """
    out = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    tag = rf'<svg viewBox="\1" role="img" aria-label="{html.escape(description)}">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', tag, svg, count=1).strip()


def new_figure(theme, width=4.6, height=3.0, rows=1, columns=1):
    """(figure, its axes as a list); sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        _dress(ax, theme)
    return figure, list(axes.flat)


def _dress(ax, theme):
    ax.grid(color=theme.grid, linewidth=0.7)
    ax.tick_params(colors=theme.muted, labelcolor=theme.ink, length=3)
    for spine in ax.spines.values():
        spine.set_color(theme.muted)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set_color(theme.ink)


# ---- curves


def thinned(xs, ys):
    """At most MAX_POINTS points: the means of neighbours."""
    size = -(-len(xs) // MAX_POINTS)
    if size <= 1:
        return xs, ys
    groups = range(0, len(xs), size)
    return tuple([sum(v[i : i + size]) / len(v[i : i + size]) for i in groups] for v in (xs, ys))


def smoothed(ys):
    """Each value's mean with those before it, over a fiftieth of all."""
    window = max(1, len(ys) // 50)
    out, total = [], 0.0
    for i, y in enumerate(ys):
        total += y - (ys[i - window] if i >= window else 0)
        out.append(total / min(i + 1, window))
    return out


def _time_unit(runs):
    """(seconds in the unit, its name) for the longest run."""
    longest = max(run.clock[-1][2] for run in runs)
    for seconds, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if longest > 3 * seconds:
            return seconds, name
    return 1, "seconds"


def _count_text(value, _position=None):
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _x_axis(ax, runs, against):
    """Labels the axis. Returns what turns (tokens, seconds) into a position on it."""
    if against == "tokens":
        ax.set_xlabel("tokens trained on")
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(_count_text))
        return lambda tokens, _seconds: tokens
    size, unit = _time_unit(runs)
    ax.set_xlabel(f"training time ({unit}, validation not counted)")
    return lambda _tokens, seconds: seconds / size


def draw_validation(ax, runs, against, theme, entropy=None):
    """Validation loss over "tokens" or "time"; the unigram entropy as a line if it lies in view."""
    position = _x_axis(ax, runs, against)
    ax.set_ylabel("validation loss (nats a token)")
    lines = []
    for i, run in enumerate(runs):
        xs = [position(*run.at_step(step)) for step, _ in run.val_losses]
        ys = [loss for _, loss in run.val_losses]
        marker = MARKERS[i % len(MARKERS)] if len(xs) <= 40 else None
        ax.plot(xs, ys, **theme.style(i), linewidth=1.5, marker=marker, markersize=3.5)
        lines.append((xs, ys))
    _focus(ax, lines, theme)
    low, high = ax.get_ylim()
    if entropy is not None and low < entropy < high:
        ax.axhline(entropy, color=theme.muted, linewidth=1, linestyle=(0, (2, 2)))
        _note(
            ax, f"unigram entropy {entropy:.2f}", (0.99, entropy), ("axes fraction", "data"), "bottom", theme
        )


def draw_training(ax, runs, against, theme):
    """Training loss over "tokens" or "time": each step's faintly, and the running mean."""
    position = _x_axis(ax, runs, against)
    ax.set_ylabel("training loss (nats a token)")
    lines = []
    for i, run in enumerate(runs):
        points = [
            (position(tokens, seconds), record["loss"])
            for (_, tokens, seconds), record in zip(run.clock[1:], run.train, strict=True)
            if is_number(record["loss"])
        ]
        if not points:
            continue
        xs, ys = map(list, zip(*points, strict=True))
        ax.plot(*thinned(xs, ys), color=theme.series[i % len(SERIES)], linewidth=0.6, alpha=0.35)
        xs, ys = thinned(xs, smoothed(ys))
        ax.plot(xs, ys, **theme.style(i), linewidth=1.5)
        lines.append((xs, ys))
    _focus(ax, lines, theme)


def _focus(ax, lines, theme):
    """Leaves the first steep fall out of view: the curves' later parts are what is compared."""
    lines = [(xs, ys) for xs, ys in lines if len(xs) > 5]
    if not lines:
        return
    later = [y for xs, ys in lines for x, y in zip(xs, ys, strict=True) if x >= 0.06 * xs[-1]]
    first = max(ys[0] for _, ys in lines)
    low, high = min(later), max(later)
    if high < first and high > low:
        margin = 0.05 * (high - low)
        ax.set_ylim(low - margin, high + margin)
        _note(ax, f"begins at {first:.2f}, above this frame", (0.99, 0.99), "axes fraction", "top", theme)


def _note(ax, text, place, coordinates, vertical, theme):
    style = {"color": theme.muted, "fontsize": 8, "ha": "right", "va": vertical}
    away = 2 if vertical == "bottom" else 0
    ax.annotate(text, place, (0, away), xycoords=coordinates, textcoords="offset points", **style)


def draw_series(ax, runs, name, label, theme, log=False):
    """A number of the train records over tokens; from 0, without the first steps, unless it is
    logarithmic.
    """
    _x_axis(ax, runs, "tokens")
    ax.set_ylabel(label)
    for i, run in enumerate(runs):
        points = [(record["tokens"], record[name]) for record in run.train if is_number(record.get(name))]
        points = [(x, y) for x, y in points if y > 0] if log else points[WARMUP_STEPS:]
        if points:
            ax.plot(*thinned(*map(list, zip(*points, strict=True))), **theme.style(i), linewidth=1.1)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)


def legend_figure_lines(figure, runs, theme):
    """One legend for all pictures of the figure, below them."""
    handles = [
        mpl.lines.Line2D(
            [], [], **theme.style(i), linewidth=2, marker=MARKERS[i % len(MARKERS)], markersize=4
        )
        for i in range(len(runs))
    ]
    columns = 1 if max(len(run.label) for run in runs) > 60 else min(3, len(runs))
    figure.legend(
        handles, [run.label for run in runs], loc="outside lower center", ncols=columns, frameon=False
    )


def losses_png(path, runs, entropy=None):
    """Writes validation and training loss, each over tokens and over time, as one picture."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(PNG, 11, 7.4, 2, 2)
        for ax, against in zip(axes[:2], ("tokens", "time"), strict=True):
            draw_validation(ax, runs, against, PNG, entropy)
        for ax, against in zip(axes[2:], ("tokens", "time"), strict=True):
            draw_training(ax, runs, against, PNG)
        legend_figure_lines(figure, runs, PNG)
        figure.savefig(path, dpi=130)


# ---- memory and g-SNR


def draw_memory(ax, runs, theme):
    """Memory by owner, a stacked bar a run, its name above it."""
    largest = max(sum(run.memory.values()) for run in runs)
    size, unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    for i, run in enumerate(runs):
        left = 0.0
        for owner in owners_of(runs):
            width = run.memory.get(owner, 0) / size
            ax.barh(
                i,
                width,
                0.42,
                left,
                color=theme.series[OWNERS.index(owner)] if owner in OWNERS else theme.muted,
            )
            left += width
        ax.text(
            0, i - 0.27, f"{run.label}: {si_bytes(sum(run.memory.values()))}", color=theme.ink, va="bottom"
        )
    _bars(ax, len(runs), f"memory ({unit})")


def owners_of(runs):
    """The owners in the runs' memory reports, in the order in which they are stacked."""
    found = dict.fromkeys(owner for run in runs for owner in run.memory)
    return [o for o in OWNERS if o in found] + [o for o in found if o not in OWNERS]


def draw_projections(ax, theme):
    """Weights, gradients and state of GPT-2's four sizes with either optimizer."""
    for i, p in enumerate(projections()):
        left = 0.0
        for owner, size in zip(
            OWNERS, (p.weights, p.master_weights, p.gradients, p.optimizer_state), strict=False
        ):
            ax.barh(i, size / 1e9, 0.42, left, color=theme.series[OWNERS.index(owner)])
            left += size / 1e9
        text = f"{p.size}, {OPTIMIZER_TITLES[p.optimizer]}: {si_bytes(p.total)}"
        ax.text(0, i - 0.27, text, color=theme.ink, va="bottom")
    _bars(ax, 2 * len(GPT2_SIZES), "memory without activations (GB)")


def _bars(ax, count, label):
    ax.set_xlabel(label)
    ax.set_ylim(count - 0.6, -0.85)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False)  # its lines would cross the names


def draw_gsnr(ax, run, theme):
    """g-SNR by tensor type: a dot a layer, and a bar at sqrt(n)."""
    types = gsnr_by_type(run)
    for i, records in enumerate(types.values()):
        ax.plot(records[0]["n"] ** 0.5, i, "|", color=theme.series[1], markersize=13, markeredgewidth=2)
        values = [record["gsnr"] for record in records if is_number(record["gsnr"]) and record["gsnr"] > 0]
        ax.plot(
            values, [i] * len(values), "o", color=theme.series[0], markersize=4, alpha=0.7, markeredgewidth=0
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(types)), list(types), fontsize=8)
    ax.set_ylim(len(types) - 0.4, -0.6)
    ax.set_xlabel("g-SNR (a ratio, no unit)")

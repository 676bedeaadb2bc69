"""report.html and summary.md: what scripts/compare.py found, for a reader with a browser, and for an issue
or a chat.
"""

import html
import re
from pathlib import Path

import matplotlib as mpl

from charts import (
    OWNERS,
    STYLE,
    SVG,
    css_variables,
    draw_gsnr,
    draw_memory,
    draw_projections,
    draw_series,
    draw_training,
    draw_validation,
    figure_svg,
    new_figure,
    owners_of,
)
from findings import FACTS, GPT2_SIZES, Row, projections
from runlog import OPTIMIZER_TITLES, gsnr_by_type, is_number, si_bytes

STYLE_SHEET = Path(__file__).with_name("report.css")


def write_report(folder, findings):
    """Writes report.html and summary.md into this folder, each at once. Returns their paths."""
    written = []
    for name, text in (("report.html", page(findings)), ("summary.md", summary(findings))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        written.append(temporary.rename(folder / name))
    return written


# ---- the page


def page(findings):
    """The whole of report.html."""
    runs = findings.runs
    style = (
        STYLE_SHEET.read_text()
        .replace("/* light */", css_variables(0))
        .replace("/* dark */", css_variables(1))
    )
    parts = [
        f"<h1>{_title(runs)}</h1>",
        f'<p class="sub">{_subtitle(runs)}</p>',
        f'<p class="verdict">{_text(findings.verdict)}</p>',
        "<h2>What this doesn't show</h2>",
        "<ul>" + "".join(f"<li>{_text(caveat)}</li>" for caveat in findings.caveats) + "</ul>",
        "<h2>Numbers</h2>",
        _table(findings.rows, runs),
        "<h2>Loss</h2>",
        _legend(runs),
        _loss_charts(findings),
        "<h2>How training went</h2>",
        _legend(runs),
        _progress_charts(runs),
        "<h2>Memory</h2>",
        _memory(runs),
        *_gsnr(runs),
        *_samples(runs),
        "<h2>Options that differ</h2>",
        _table(findings.option_rows, runs) if findings.option_rows else "<p>None.</p>",
        "<h2>All options</h2>",
        _all_options(runs),
        "<h2>Versions and machine</h2>",
        _facts(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_title(runs)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _text(value):
    return html.escape(str(value))


def _title(runs):
    titles = list(dict.fromkeys(run.title for run in runs))
    return _text(" and ".join(titles) + " pretraining GPT-2" if titles else "")


def _subtitle(runs):
    head = runs[0].head
    model = head.get("model", {})
    parts = [
        f"{runs[0].parameters / 1e6:.4g} million parameters ({model.get('layers')} layers,"
        f" {model.get('channels')} channels), context {model.get('seq_len')},"
        f" vocabulary {model.get('vocab_size')}",
        f"{FACTS['GPU'](runs[0])}, {head.get('precision')}",
        f"begun {head.get('time', '?')}, commit {head.get('commit', '?')}",
    ]
    return _text("; ".join(parts))


def _table(rows, runs):
    """A column a run."""
    header = "".join(f"<th>{_text(label)}</th>" for label in ["", *(run.label for run in runs)])
    body = ""
    for row in rows:
        cells = "".join(f"<td>{_text(value)}</td>" for value in row.values)
        body += f"<tr><th>{_text(row.name)}{_note(row.note)}</th>{cells}</tr>"
    return _scrolling(header, body)


def _scrolling(header, body):
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _note(note):
    return f'<span class="note">{_text(note)}</span>' if note else ""


def _legend(runs):
    items = []
    for i, run in enumerate(runs):
        style = SVG.style(i)
        dashes = style["linestyle"]
        dash = "" if dashes == "-" else f' stroke-dasharray="{" ".join(str(3 * d) for d in dashes[1])}"'
        line = f'<line x1="0" y1="8" x2="44" y2="8" stroke="var(--series-{i % 8})" stroke-width="3"{dash}/>'
        items.append(f'<li><svg viewBox="0 0 44 16" aria-hidden="true">{line}</svg>{_text(run.label)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figure(name, description, draw, width=4.6, height=3.0, css=""):
    """A <figure> with a picture that draw(ax) makes, and its description as caption."""
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_figure(SVG, width, height)
        draw(ax)
        svg = figure_svg(figure, name, description)
    return f'<figure class="{css}">{svg}<figcaption>{_text(description)}</figcaption></figure>'


def _loss_charts(findings):
    runs, nats = findings.runs, findings.entropy.nats if findings.entropy else None
    figures = []
    for against, words in (("tokens", "tokens"), ("time", "training time")):
        if any(run.val_losses for run in runs):
            figures.append(
                _figure(
                    f"val-{against}",
                    f"Validation loss over {words}.",
                    lambda ax, against=against: draw_validation(ax, runs, against, SVG, nats),
                )
            )
    for against, words in (("tokens", "tokens"), ("time", "training time")):
        if any(run.train for run in runs):
            figures.append(
                _figure(
                    f"train-{against}",
                    f"Training loss over {words}: every step faintly, and its running mean.",
                    lambda ax, against=against: draw_training(ax, runs, against, SVG),
                )
            )
    return _charts(figures)


def _progress_charts(runs):
    if not any(run.train for run in runs):
        return "<p>No step is in the logs yet.</p>"
    series = (
        ("grad_norm", "gradient norm (no unit)", "Gradient norm of all parameters, before clipping.", True),
        (
            "learning_rate",
            "learning rate (no unit)",
            "Learning rate. The optimizers' scales differ.",
            True,
        ),
        ("step_ms", "time a step (ms)", "Time of each step but the first two.", False),
        ("optimizer_ms", "time of the update (ms)", "Of it the optimizer's update alone.", False),
    )
    return _charts(
        _figure(
            name,
            description,
            lambda ax, name=name, label=label, log=log: draw_series(ax, runs, name, label, SVG, log),
        )
        for name, label, description, log in series
    )


def _charts(figures):
    return '<div class="charts">' + "".join(figures) + "</div>"


def _memory(runs):
    parts = []
    if any(run.memory for run in runs):
        shown = [run for run in runs if run.memory]
        height = 0.9 + 0.42 * len(shown)
        names = owners_of(shown)
        parts += [
            _owner_legend(names),
            _figure(
                "memory",
                "Memory by owner, as these runs allocated it.",
                lambda ax: draw_memory(ax, shown, SVG),
                4.6,
                height,
                "wide",
            ),
            _numbers(
                ["owner", *(run.label for run in shown)],
                [
                    [name.replace("_", " "), *(si_bytes(run.memory.get(name, 0)) for run in shown)]
                    for name in names
                ],
            ),
        ]
    names = [f"{size}, {OPTIMIZER_TITLES[o]}" for size in GPT2_SIZES for o in OPTIMIZER_TITLES]
    parts += [
        "<h2>Memory of GPT-2's sizes</h2>",
        _owner_legend(OWNERS[:4]),
        _figure(
            "projections",
            "Computed for the bf16 build: weights 2 bytes a parameter, fp32 master weights 4, fp32 gradients"
            " 4, state 8 (AdamW) or 4 (SGD-SaI). Activations come on top, by batch and not by optimizer.",
            lambda ax: draw_projections(ax, SVG),
            4.6,
            4.4,
            "wide",
        ),
        _numbers(
            ["model, optimizer", "state", "all", "all, in GiB"],
            [
                [name, si_bytes(p.optimizer_state), si_bytes(p.total), f"{p.total / 2**30:.2f}"]
                for name, p in zip(names, projections(), strict=True)
            ],
        ),
    ]
    return "".join(parts)


def _owner_legend(owners):
    items = []
    for owner in owners:
        color = f"var(--series-{OWNERS.index(owner)})" if owner in OWNERS else "var(--muted)"
        box = f'<rect x="12" width="20" height="16" fill="{color}"/>'
        text = _text(owner.replace("_", " "))
        items.append(f'<li><svg viewBox="0 0 44 16" aria-hidden="true">{box}</svg>{text}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _numbers(header, rows):
    """A table whose columns but the first are numbers."""

    def line(tag, cells):
        return "".join(
            f"<{tag}{' class=number' if i else ''}>{_text(cell)}</{tag}>" for i, cell in enumerate(cells)
        )

    return _scrolling(line("th", header), "".join(f"<tr>{line('td', row)}</tr>" for row in rows))


def _gsnr(runs):
    run = next((run for run in runs if run.gsnr), None)
    if run is None:
        return []
    types = gsnr_by_type(run)
    others = [other.label for other in runs if other.gsnr and other is not run]
    more = f" The figures are those of \u201c{run.label}\u201d; every run measures its own." if others else ""
    return [
        "<h2>Gradient signal-to-noise ratio</h2>",
        _text_block(
            "SGD-SaI measures it once, on the first gradient, for each tensor of each layer, and scales the"
            " tensor's learning rate by it. Where a gradient's mean is near 0 it is the square root of"
            " the number of elements, which needs no measuring: dots show what was measured, a dot a layer,"
            " bars the square root." + more
        ),
        _figure(
            "gsnr",
            "Measured g-SNR (dots) and sqrt(n) (bars), by tensor type.",
            lambda ax: draw_gsnr(ax, run, SVG),
            4.6,
            0.8 + 0.24 * len(types),
            "wide",
        ),
        _numbers(
            ["tensor", "elements n", "sqrt(n)", "g-SNR, min to max", "of sqrt(n)"],
            list(map(_gsnr_row, types.items())),
        ),
    ]


def _text_block(text):
    return f"<p>{_text(text)}</p>"


def _gsnr_row(item):
    name, records = item
    n = records[0]["n"]
    values = [record["gsnr"] for record in records if is_number(record["gsnr"])]
    if not values:
        return [name, f"{n:,}", f"{n**0.5:,.1f}", "-", "-"]
    low, high = min(values), max(values)
    span = f"{low:,.1f}" if f"{low:,.1f}" == f"{high:,.1f}" else f"{low:,.1f} to {high:,.1f}"
    low, high = low / n**0.5, high / n**0.5
    ratio = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
    return [name, f"{n:,}", f"{n**0.5:,.1f}", span, ratio]


def _samples(runs):
    shown = [run for run in runs if run.samples]
    if not shown:
        return []
    blocks = []
    for run in shown:
        sample = run.samples[-1]
        blocks.append(
            f"<div><h3>{_text(run.label)}</h3><p class=note>after {sample['step']:,} steps</p>"
            f"<pre>{_text(printable(sample['text']))}</pre></div>"
        )
    return ["<h2>Samples</h2>", f'<div class="samples">{"".join(blocks)}</div>']


def printable(text):
    """The text without control characters, which are no part of a page."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]", "\ufffd", text)


def _all_options(runs):
    flags = dict.fromkeys(flag for run in runs for flag in run.options)
    return _table([Row(f"--{flag}", [run.option_text(flag) for run in runs]) for flag in flags], runs)


def _facts(runs):
    rows = [
        Row(name, [value_of(run) for run in runs]) for name, value_of in FACTS.items() if name != "command"
    ]
    commands = "".join(f"<pre>{_text(FACTS['command'](run))}</pre>" for run in runs)
    return f"{_table(rows, runs)}<p>The commands:</p>{commands}"


# ---- the summary


def summary(findings):
    """The whole of summary.md."""
    runs = findings.runs
    lines = [
        f"# {html.unescape(_title(runs))}",
        "",
        html.unescape(_subtitle(runs)),
        "",
        f"**{findings.verdict}**",
        "",
    ]
    lines += _markdown_table(findings.rows, runs)
    if findings.option_rows:
        lines += ["", "What differs:", "", *_markdown_table(findings.option_rows, runs)]
    lines += ["", "What this doesn't show:", "", *(f"- {caveat}" for caveat in findings.caveats)]
    lines += ["", "![losses](losses.png)", "", "Commands:", "", "```"]
    lines += [FACTS["command"](run) for run in runs]
    return "\n".join([*lines, "```", ""])


def _markdown_table(rows, runs):
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    body = [line([row.name + (f" ({row.note})" if row.note else ""), *row.values]) for row in rows]
    return [line(["", *(run.label for run in runs)]), line(["---"] * (len(runs) + 1)), *body]

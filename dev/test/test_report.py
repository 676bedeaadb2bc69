"""report.html in a real browser: no error, nothing loaded, nothing overlaps, on a desk, on a phone, in the
dark, in print.

Run: .venv/bin/pytest dev/test/test_report.py      (skipped without Debian's `chromium`, or google-chrome)
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import report
import synthetic_log
from findings import Findings
from runlog import read_log

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "Enter <script>alert(1)</script> & \x1b[31m\x07 </pre> \ufffd " + "O" * 300 + "\nexit"

# What a copy of the report measures about itself when it has loaded, and tells the page that frames it.
PROBE = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(String(event.message || event.target.outerHTML)), true);
window.addEventListener("load", () => {
  const box = node => node.getBoundingClientRect();
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
                         Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const overlaps = [], outside = [];
  const check = (nodes, name) => nodes.forEach((a, i) => nodes.slice(i + 1).forEach(b => {
    if (meet(box(a), box(b))) overlaps.push(name + ": " + a.textContent.slice(0, 40) + " | " +
                                            b.textContent.slice(0, 40));
  }));
  const pictures = [...document.querySelectorAll("figure svg")];
  for (const svg of pictures) {
    const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
    check(texts, svg.getAttribute("aria-label"));
    for (const text of texts) {
      const inner = box(text), outer = box(svg);
      if (inner.left < outer.left - 2 || inner.right > outer.right + 2 || inner.top < outer.top - 2 ||
          inner.bottom > outer.bottom + 2) outside.push(text.textContent);
    }
  }
  check([...document.body.children].filter(node => node.tagName !== "SCRIPT"), "page");
  check([...document.querySelectorAll("figure, .samples > div")], "grid");
  for (const cell of document.querySelectorAll("td, th, pre, li, p"))
    if (cell.clientWidth > 0 && cell.scrollWidth > cell.clientWidth + 1)
      outside.push(cell.textContent.slice(0, 60));
  const style = getComputedStyle(document.body);
  parent.postMessage(JSON.stringify({
    errors, overlaps, outside,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    pictures: pictures.map(svg => ({name: svg.getAttribute("aria-label"), width: box(svg).width,
      texts: [...svg.querySelectorAll("text")].map(text => text.textContent),
      smallest: Math.min(...[...svg.querySelectorAll("text")].map(text =>
        parseFloat(getComputedStyle(text).fontSize) * box(svg).width / svg.viewBox.baseVal.width))})),
    ink: style.color, paper: style.backgroundColor,
  }), "*");
});
</script>
"""
FRAME = """<!DOCTYPE html><body><pre id="result">nothing</pre><script>
addEventListener("message", event => document.getElementById("result").textContent = event.data);
</script><iframe src="copy.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe></body>"""


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no browser here: apt-get install chromium")
    return BROWSER


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{name: folder} of reports about different sets of runs."""
    top = tmp_path_factory.mktemp("reports")
    gpu = {
        "device": "gpu",
        "model": (12, 768, 12, 50257, 1024),
        "total_batch": 524288,
        "start": 11.0,
        "final": 3.3,
    }
    gpu |= {"steps": 3000, "val_every": 100, "step_ms": 380.0}
    sets = {
        "pair": [{"sample": HOSTILE}, {"optimizer": "sgd_sai", "final": 2.58, "sample": HOSTILE}],
        "gpu": [gpu | {"optimizer": name} for name in ("adamw", "sgd_sai")],
        "many": [
            {"final": 2.4},
            {"final": 2.45, "learning_rate": 1e-3},
            *(
                {"optimizer": "sgd_sai", "gain": gain, "final": 2.5}
                for gain in ("raw", "normalized", "sqrt_n", "one")
            ),
            {"optimizer": "sgd_sai", "momentum": 0.0, "steps": 120},
            {"optimizer": "sgd_sai", "lines": 150, "learning_rate": 1e-5},
            {"optimizer": "sgd_sai", "lines": 30, "learning_rate": 3e-5},
        ],
        "one": [{"lines": 14}],
        "headless": [{"lines": 1}],
    }
    folders = {}
    for name, runs in sets.items():
        logs = [synthetic_log.write(top / name / f"run{i}", **arguments) for i, arguments in enumerate(runs)]
        folders[name] = top / name
        report.write_report(folders[name], Findings([read_log(log) for log in logs]))
    return folders


def measure(browser, folder, width, dark=False):
    """What the probe finds when the report is shown in a window of this width."""
    page = (folder / "report.html").read_text()
    (folder / "copy.html").write_text(page.replace("<style>", PROBE + "<style>", 1))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--timeout=20000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'frame.html'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    found = re.search(r'<pre id="result">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert text != "nothing", result.stderr[-2000:]
    return json.loads(text)


@pytest.mark.parametrize("width", [360, 760, 1100])
@pytest.mark.parametrize("name", ["pair", "gpu", "many", "one", "headless"])
def test_shown(browser, reports, name, width):
    found = measure(browser, reports[name], width)
    assert found["errors"] == []
    assert found["loaded"] == []
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["wide"] <= 0
    for picture in found["pictures"]:
        assert picture["width"] <= width
        assert picture["smallest"] >= (7 if width < 500 else 9), picture["name"]  # CSS pixels


def test_the_probe_sees_what_is_wrong(browser, reports, tmp_path):
    page = (reports["one"] / "report.html").read_text()
    texts = (
        '<text x="50" y="50">first</text><text x="52" y="52">second</text><text x="-99" y="9">third</text>'
    )
    page = page.replace("</svg><figcaption>", texts + "</svg><figcaption>", 1)
    page = page.replace(
        "</h1>", '</h1><div style="width: 2000px">wide</div><img src="http://127.0.0.1:9/x.png">', 1
    )
    (tmp_path / "report.html").write_text(page)
    found = measure(browser, tmp_path, 760)
    assert [text.split(": ")[1] for text in found["overlaps"]] == ["first | second"]
    assert found["outside"] == ["third"]
    assert found["wide"] > 0
    assert len(found["errors"]) == 1
    assert found["loaded"] == ["http://127.0.0.1:9/x.png"]


def test_pictures_have_axes_with_units(browser, reports):
    found = measure(browser, reports["pair"], 1100)
    labels = {picture["name"]: " ".join(picture["texts"]) for picture in found["pictures"]}
    assert len(labels) == len(found["pictures"]) == 11
    for name, texts in labels.items():
        words = {
            "Validation loss": ["validation loss (nats a token)"],
            "Training loss": ["training loss (nats a token)"],
            "Memory": ["memory (MB)"],
            "Computed": ["memory without activations (GB)"],
            "Time of": ["time a step (ms)"],
            "Of it": ["time of the update (ms)"],
            "Measured g-SNR": ["g-SNR (a ratio, no unit)"],
            "Gradient norm": ["gradient norm (no unit)"],
            "Learning rate": ["learning rate (no unit)"],
        }
        (wanted,) = [label for start, label in words.items() if name.startswith(start)]
        wanted += ["training time (minutes"] if "over training time" in name else []
        wanted += ["tokens trained on"] if "over tokens" in name else []
        for word in wanted:
            assert word in texts, (name, texts)
        assert sum(bool(re.fullmatch(r"[\d.]+[kM]?", text)) for text in texts.split()) >= 3  # ticks


def luminance(color):
    """Relative luminance (WCAG 2) of "rgb(r, g, b)" or "#rrggbb"."""
    if color.startswith("#"):
        channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        channels = [int(value) for value in re.findall(r"\d+", color)[:3]]
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(browser, reports, dark):
    found = measure(browser, reports["pair"], 1100, dark)
    assert (luminance(found["paper"]) < 0.1) == dark
    assert contrast(found["ink"], found["paper"]) >= 7  # WCAG AAA for text
    for colors in report_colors():
        assert contrast(colors[dark], found["paper"]) >= 3  # WCAG for graphics


def report_colors():
    import charts

    return [*charts.SERIES, charts.MUTED]


def test_prints(browser, reports, tmp_path):
    target = tmp_path / "report.pdf"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--print-to-pdf={target}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{reports['pair'] / 'report.html'}"]
    subprocess.run(command, capture_output=True, check=False, timeout=240)
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", target.read_bytes()))
    assert 3 <= pages <= 12


class Checker(HTMLParser):
    """Tags that are closed in order, ids that are there once, references."""

    VOID = ("meta", "link", "br", "path", "use", "line", "rect", "image")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.references, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)
            elif value and "url(" in value:
                self.references += re.findall(r"url\((.*?)\)", value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", ["pair", "gpu", "many", "one", "headless"])
def test_one_well_formed_file_without_outside_references(reports, name):
    page = (reports[name] / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    for reference in checker.references:
        assert reference == "data:," or (reference.startswith("#") and reference[1:] in checker.ids), (
            reference
        )
    assert not re.search(r"@import|@font-face|<script|javascript:", page)
    assert "\x1b" not in page
    assert len(page) < 1_500_000
    text = " ".join(checker.text)
    runs = [read_log(path) for path in sorted(reports[name].glob("run*"))]
    found = Findings(runs)
    assert found.verdict in text
    for caveat in found.caveats:
        assert caveat in text
    for run in found.runs:
        assert run.label in text
        for flag in run.options:
            assert f"--{flag}" in text


def test_samples_are_text_and_never_markup(reports):
    page = (reports["pair"] / "report.html").read_text()
    assert page.count("Enter &lt;script&gt;alert(1)&lt;/script&gt; &amp; \ufffd[31m\ufffd &lt;/pre&gt;") == 2

"""``largebatch report`` on real runs in every format, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet
import pytest
from conftest import TINY, environment
from made_runs import write_run
from programs import Ended, Programs

from largebatch.runs.folder import RunFolder

GRID = (
    *TINY, "dataset.val_fraction=0.25", "epochs=3", "tracker.layers_every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    """Two optimizers with two seeds each, a diverged run, a failed run, and a folder that isn't a run."""
    folder = tmp_path_factory.mktemp("real")
    for optimizer, seed in itertools.product(("lars", "tvlars"), (0, 1)):
        process.train(folder, *GRID, f"optimizer={optimizer}", f"seed={seed}")
    process.train(folder, *GRID, "optimizer=sgd", "optimizer.lr=1e30")
    runs = folder / "runs"
    failed = shutil.copytree(next(runs.glob("*-sgd-*")), runs / "failed")
    config = (failed / "config.yaml").read_text()
    (failed / "config.yaml").write_text(re.sub("(?m)^seed: 0$", "seed: 1", config))
    RunFolder(failed).update_status(state="failed", message="RuntimeError: <b>no space left</b>")
    (runs / "half").mkdir()
    (runs / "half" / "config.yaml").write_text("dataset: {na")
    return runs


Report = Callable[..., Ended]


@pytest.fixture
def report(process: Programs, tmp_path: Path) -> Report:
    """Return a function that calls ``largebatch report`` in ``tmp_path``."""
    return lambda *arguments: process.call("largebatch", "report", *map(str, arguments), cwd=tmp_path)


@pytest.fixture(scope="module")
def written(runs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-m", "largebatch.cli", "report", str(runs_dir)]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "report.html: 6 runs in 1 comparison(s)\n"
    assert result.stderr.startswith("left out: half: config.yaml can't be read (")
    assert len(result.stderr.splitlines()) == 1
    return cwd / "report.html"


class Page(HTMLParser):
    """Text, addresses and scripts of a page, and the elements that it doesn't close."""

    VOID = ("meta", "input", "br", "wbr", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where == "script":
            self.scripts.append(data)
        elif where != "style" and data.strip():
            self.texts.append(data.strip())
            if "td" in self.open:
                self.cells.append(data.strip())


def test_the_page_is_complete_small_and_self_contained(written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    assert page.open == []
    folders = {address for address in page.addresses if not address.startswith("#")}
    assert len(folders) == 6  # of the runs; nothing else outside of the file is named
    assert all((written.parent / unquote(address) / "config.yaml").exists() for address in folders)
    assert len(page.scripts) == 3  # data of the charts, Plotly, page.js
    assert written.stat().st_size < 6e6
    assert "width=device-width" in written.read_text(encoding="utf-8")


def test_the_page_shows_answer_table_warnings_and_failed_runs(written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    assert re.search(r"At batch 16 \S+ has the highest mean \(\S+ ± \S+ %\). Too few seeds to say", text)
    assert "diverged" in page.cells
    assert sum(bool(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell)) for cell in page.cells) == 2  # LARS and TVLARS
    assert "Runs without a result" in " ".join(page.texts)
    assert text.index("Fewer than 3 seeds") < text.index("Accuracy and training")
    assert "the loss was not finite at step" in text
    assert "RuntimeError: <b>no space left</b>" in text  # as text
    assert "half" in page.cells


def test_every_cell_shows_its_learning_rate_and_keys_break_after_dots(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    table = html.partition('<table class="by-batch comparison">')[2].partition("</table>")[0]
    assert re.findall(r"<small>lr ([^,<]+)", table) == ["6", "18", "1e+30"]
    assert '<th scope="row">optimizer.<wbr>lr</th>' in html


def test_seeds_link_to_run_folders_and_to_wandb(tmp_path: Path, report: Report) -> None:
    names = []
    for seed, url in enumerate(("https://wandb.ai/me/largebatch/runs/1a", "javascript:alert(1)", None, "damaged")):
        run = write_run(tmp_path / "my runs", f"seed={seed}")
        names.append(run.name)
        (run.path / "wandb").mkdir()
        text = json.dumps({"1a": {"rows": 3} | ({"url": url} if url else {})}) if url != "damaged" else "[1"
        (run.path / "wandb" / "uploads.json").write_text(text)
    result = report("my runs")
    assert result.code == 0, result.stderr
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    links = [address for address in page.addresses if not address.startswith("#")]
    assert links == [
        f"my%20runs/{names[0]}/", "https://wandb.ai/me/largebatch/runs/1a", *[f"my%20runs/{n}/" for n in names[1:]],
    ]  # fmt: skip
    assert f"left out: {names[3]}: " in result.stderr
    assert "its link to W&B is left out" in result.stderr


def test_the_same_runs_give_the_same_file(runs_dir: Path, written: Path, tmp_path: Path, report: Report) -> None:
    assert report(runs_dir, "--out", "again.html").code == 0
    assert (tmp_path / "again.html").read_bytes() == written.read_bytes()


def test_markdown_is_printed(runs_dir: Path, tmp_path: Path, report: Report) -> None:
    result = report(runs_dir, "--format", "md")
    lines = result.stdout.splitlines()
    assert "## synthetic · smallcnn · classification" in lines
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line.startswith("| ")}
    assert rows["test accuracy [%]"] == "batch 16"
    assert re.fullmatch(r"\*{0,2}\d+\.\d ± \d+\.\d\*{0,2} \(1 setting, 2 seeds\)", rows["LARS"])
    assert rows["SGD"] == "diverged (1 setting, 0 seeds, 1 diverged, 1 not finished)"
    assert list(tmp_path.iterdir()) == []


def test_csv_and_parquet_have_one_row_for_each_run(runs_dir: Path, tmp_path: Path, report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report(runs_dir, "--format", "csv").stdout)))
    assert len(rows) == 6
    assert report(runs_dir, "--out", "runs.parquet").code == 0
    table = pyarrow.parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    for text, row in zip(rows, table, strict=True):
        assert text == {key: "" if value is None else str(value) for key, value in row.items()}
    for row in table:
        if row["state"] == "finished":
            summary = RunFolder(runs_dir / row["run"]).read_summary()
            assert row["best/test/accuracy"] == summary["best/test/accuracy"]
            assert (row["chosen"], row["reported"]) == (True, "best/test/accuracy")
    assert sorted(row["state"] for row in table) == ["diverged", "failed", *["finished"] * 4]
    assert [row["optimizer.lmbda_relative"] for row in table] == [None, None, 10, 10, None, None]


def test_a_dash_prints_the_page(runs_dir: Path, written: Path, tmp_path: Path, report: Report) -> None:
    assert report(runs_dir, "--out", "-").stdout.strip() == written.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "90"], "--target=90: not an accuracy. Allowed: numbers between 0 and 1"),
        (
            ["--target-metric", "train/los", "--target", "1"],
            "--target-metric=train/los: unknown metric; allowed",
        ),
        (["--target-metric", "embedding/std"], "--target-metric=embedding/std: unknown metric"),
        (["--target-metric", "train/loss"], "--target-metric=train/loss: no loss given. Fix: add --target"),
        (["--target-metric", "train/loss", "--target", "0"], "--target=0: not a loss. Allowed: numbers above 0"),
        (["--out", "report.pdf"], "--out=report.pdf: unknown ending. Allowed: .html"),
        (["--out", "nowhere/report.html"], "there is no folder nowhere"),
        (["--out", "/", "--format", "html"], "--out=/: is a folder"),
        (["--out", "/proc/report.html"], "--out=/proc/report.html: "),
        (["--format", "parquet", "--out", "-"], "name a file"),
        (["--by", "optimizer.denominatr"], "--by=optimizer.denominatr: no run has this key"),
    ],
)
def test_an_invalid_option_is_one_line(
    arguments: list[str], says: str, runs_dir: Path, tmp_path: Path, report: Report
) -> None:
    result = report(runs_dir, *arguments)
    assert result.code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, report: Report) -> None:
    (tmp_path / "photos").mkdir()
    result = report(tmp_path)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0].startswith("left out: photos: not a run folder")
    assert result.stderr.splitlines()[1].endswith("holds no readable run. Fix: give the folder that holds the runs")
    assert not (tmp_path / "report.html").exists()


def test_text_from_run_folders_is_escaped(tmp_path: Path, report: Report) -> None:
    """The page, the data of its charts and the Markdown contain it as text."""
    nasty = "</script><img src=x onerror=alert(1)>|`"
    folder = write_run(tmp_path, "dataset=digits", "optimizer=lars", message=nasty)
    config = folder.config.read_text().replace("name: lars", f"name: '{nasty}'")
    folder.config.write_text(config)
    assert report(tmp_path, "--out", "nasty.html").code == 0
    html = (tmp_path / "nasty.html").read_text(encoding="utf-8")
    assert "<img" not in html.replace("'<img", "")  # Plotly's script has the tag in a string
    page = Page(html)
    assert page.open == []
    assert len(page.scripts) == 3
    assert any(nasty in text for text in page.texts)
    assert "<img" not in report(tmp_path, "--format", "md").stdout.replace("\\<img", "")


# In a browser.

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def shown(page: Path, folder: Path, *more: str) -> tuple[str, list[str]]:
    """Return the document after its scripts ran, and the lines of the console."""
    assert BROWSER is not None
    flags = [
        "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=20000",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    command = [BROWSER, *flags, *more, f"--user-data-dir={folder}", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_every_chart_is_drawn_and_the_console_is_empty(written: Path, tmp_path: Path) -> None:
    document, console = shown(written, tmp_path)
    assert console == []
    assert 'data-drawn="all"' in document
    charts = re.findall(r'<figure class="card" id="([^"]+)"', document)
    assert len(charts) >= 6
    for one in document.split('<figure class="card"')[1:]:
        figure = one.partition("</figure>")[0]
        assert 'class="main-svg"' in figure
        assert re.search(r'class="(js-line|point|hm)"', figure), figure[:300]  # line, marker or heat map
        assert len(re.findall(r'class="[xy]title"', figure)) == 2
        assert "no run for this choice" not in figure


@needs_browser
def test_a_switch_changes_axis_and_curves_on_a_narrow_screen(written: Path, tmp_path: Path) -> None:
    """A script at the end of the page chooses as a reader would."""
    choose = """<script>
    const card = [...document.querySelectorAll("figure.card")].find((one) => one.innerText.includes("Training curves"));
    for (const [key, value] of [["metric", "train/loss"], ["x", "seconds"]])
      card.querySelector(`select[data-key=${key}]`).value = value;
    document.body.dataset.widths = `${document.documentElement.scrollWidth} ${innerWidth}`;
    card.querySelector("select").dispatchEvent(new Event("change", { bubbles: true }));
    </script></body>"""
    page = tmp_path / "chosen.html"
    page.write_text(written.read_text(encoding="utf-8").replace("</body>", choose), encoding="utf-8")
    document, console = shown(page, tmp_path / "profile", "--window-size=400,800")
    assert console == []
    widths = re.search(r'data-widths="(\d+) (\d+)"', document)
    assert widths
    assert int(widths[1]) <= int(widths[2])  # the page isn't wider than a narrow screen
    (figure,) = [
        one.partition("</figure>")[0]
        for one in document.split('<figure class="card"')[1:]
        if "<h4>Training curves</h4>" in one.partition("</figure>")[0]
    ]
    assert re.search(r'class="xtitle"[^>]*>wall time \[s\]<', figure)
    assert re.search(r'class="ytitle"[^>]*>training loss<', figure)


def reported(page: Path, name: str, document: str) -> str:
    """Return the attribute that a script in the page has written."""
    found = re.search(rf'data-{name}="([^"]*)"', document)
    assert found, page
    return found[1]


@needs_browser
def test_charts_follow_dark_mode_and_are_light_on_paper(written: Path, tmp_path: Path) -> None:
    """The scheme is dark, then light, then dark; then the page is printed."""
    scheme = """<head><script>
    let dark = true;
    const heard = [];
    window.matchMedia = (query) => query.includes("prefers-color-scheme")
      ? { get matches() { return dark; }, addEventListener: (_, react) => heard.push(react) }
      : { matches: false };
    </script>"""
    look = """<script>
    const seen = [], widths = [], covered = [];
    const note = () => {
      const chart = document.querySelector(".chart");
      const text = chart.querySelector(".xtitle").style.fill;
      const line = chart.querySelector(".point").style.fill;
      const ground = chart.querySelector(".main-svg").style.background;
      seen.push([ground, text, line, chart.layout.width ?? "auto"].join(" "));
      const charts = [...document.querySelectorAll(".chart")];
      widths.push(charts.map((one) => one.querySelector(".main-svg").clientWidth - one.clientWidth));
      covered.push(charts.filter((one) => {
        const [legend, lines] = [one.querySelector(".legend .bg"), one.querySelector(".nsewdrag")];
        return legend && legend.getBoundingClientRect().bottom > lines.getBoundingClientRect().top;
      }).length);
    };
    const timer = setInterval(() => {
      if (document.body.dataset.drawn !== "all") return;
      clearInterval(timer);
      note();
      for (dark of [false, true]) { heard.forEach((react) => react()); note(); }
      for (const event of ["beforeprint", "afterprint"]) { dispatchEvent(new Event(event)); note(); }
      document.body.dataset.seen = seen.join("; ");
      document.body.dataset.covered = covered.join(" ");
      document.body.dataset.wider = widths.map((all) => Math.max(...all)).join(" ");
    }, 20);
    </script></body>"""
    page = tmp_path / "dark.html"
    html = written.read_text(encoding="utf-8").replace("<head>", scheme, 1)
    page.write_text(look.join(html.rsplit("</body>", 1)), encoding="utf-8")
    document, console = shown(page, tmp_path / "profile")
    assert console == []
    light, dark = "rgb(255, 255, 255) rgb(34, 34, 34)", "rgb(34, 36, 39) rgb(236, 236, 236)"
    blue, lighter = "rgb(0, 114, 178)", "rgb(25, 128, 185)"
    assert re.sub(r" \d+(?=;|$)", " auto", reported(page, "seen", document)).split("; ") == [
        f"{dark} {lighter} auto", f"{light} {blue} auto", f"{dark} {lighter} auto", f"{light} {blue} auto",
        f"{dark} {lighter} auto",
    ]  # fmt: skip
    assert reported(page, "seen", document).split("; ")[3].endswith(" 680")
    assert reported(page, "covered", document) == "0 0 0 0 0"  # charts whose legend hides lines
    on_screen = reported(page, "wider", document).split()
    del on_screen[3]
    assert on_screen == ["0", "0", "0", "0"]  # every chart is as wide as its card, after printing too


@needs_browser
def test_paper_has_no_controls_and_a_phone_breaks_no_key(written: Path, tmp_path: Path) -> None:
    look = """<script>
    document.body.style.width = "390px"; // a browser without a screen has at least 500
    const style = (selector) => getComputedStyle(document.querySelector(selector));
    const range = new Range();
    const lines = (node) => { range.selectNode(node); return range.getClientRects().length; };
    const keys = [...document.querySelectorAll(".keys tbody th")].flatMap((key) => [...key.childNodes]);
    document.body.dataset.broken = keys.filter((node) => node.nodeType === Node.TEXT_NODE && lines(node) > 1).length;
    document.body.dataset.keys = keys.length;
    const looks = [style("select").appearance, style("select").borderStyle, style("details").display];
    document.body.dataset.look = looks.join(" ");
    </script></body>"""
    page = tmp_path / "paper.html"
    html = written.read_text(encoding="utf-8").replace("@media print {", "@media all {", 1)
    page.write_text(look.join(html.rsplit("</body>", 1)), encoding="utf-8")
    document, _ = shown(page, tmp_path / "profile", "--window-size=390,800")
    assert reported(page, "look", document) == "none none none"
    assert reported(page, "broken", document) == "0"
    assert int(reported(page, "keys", document)) > 5

"""report.py and plots.py: the page of a real run, of killed, hostile and long ones, and what a reader does with it.

The browser is headless Chromium (requirements-dev.txt; Debian: chromium, chromium-driver). Without it those tests skip.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import azr
from harness import report
from harness.checkpoint import append
from harness.metrics import compare
from harness.plots import inline, svg_histograms, svg_plot

HERE = Path(__file__).resolve().parent.parent
SMALL = ["--preset", "tiny", "--batch", "3", "--rollouts", "2", "--seed-factor", "1", "--inputs", "4"]
SMALL += ["--engine", "transformers", "--device", "cpu", "--eval-suites", f"tasks:{HERE / 'tiny/test.jsonl'}:6"]
HOSTILE = "<script>alert(1)</script></pre><!-- --><img src=x onerror=alert(2)> \"'&amp;\u2028</details>]]>"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert azr.main([*SMALL, "--eval-every", "1", "--steps", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run_copy(whole_run, tmp_path) -> Path:
    return shutil.copytree(whole_run, tmp_path / "run", ignore=lambda *_: ["checkpoint", "report.html", "curve.svg"])


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    changed = [change(record) for record in records(path)]
    path.write_text("")
    append(path, changed)


class Page(HTMLParser):
    """A page as a browser reads it: its elements, the texts of its table's rows and of its <pre>, all text."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags, self.attributes, self.pre, self.rows, self.text, self.inside = [], [], [], [], "", ""
        self.source = report.write(folder).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "pre":
            self.pre.append("")
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag) -> None:
        self.inside = ""

    def handle_data(self, data) -> None:
        if self.inside == "pre":
            self.pre[-1] += data
        if self.inside not in ("script", "style"):
            self.text += data
            if self.rows:
                self.rows[-1] += data


def test_a_run_ends_with_its_report_and_the_page_has_what_the_run_wrote(whole_run, capsys):
    assert azr.main(["--resume", str(whole_run), "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"report: {whole_run / 'report.html'}" in printed and f"curve: {whole_run / 'curve.svg'}" in printed
    page = Page(whole_run)
    assert page.source == Page(whole_run).source
    before, *_, after = records(whole_run / "metrics.jsonl")
    change = [change for change in compare(before, after) if change.suite == "eval/test"][-1]
    assert f"Held-out accuracy {100 * change.before:.1f}\xa0% → {100 * change.after:.1f}\xa0%" in page.text
    proposals, seeds = records(whole_run / "tasks.jsonl"), records(whole_run / "seeds.jsonl")
    assert f"All {len(proposals) + len(seeds)}: the seeds and every proposal" in page.text
    numbered = [value for name, value in page.attributes if name == "id" and re.fullmatch(r"t\d+", value)]
    assert len(numbered) == len(proposals) + len(seeds)
    for task in [*proposals, *seeds]:
        shown = task.get("program", task.get("answer") or "(no answer)")
        assert any(text.startswith(shown) for text in page.pre)
    rollouts = records(whole_run / "rollouts.jsonl")
    assert all(item["prompt"] in page.pre and item["response"] in page.pre for item in rollouts)
    assert f"{len(rollouts)} of the {len(rollouts)} in rollouts.jsonl" in page.text
    for title in ("Reward of the proposer", "Reward of the solver", "Entropy of the solver", "Seconds of a step"):
        assert title in page.text
    assert page.tags.count("svg") >= 18 and "landlock" in page.text and "--batch" in page.text
    assert "What it does not show" in page.text and "no alarms" in page.text


def test_lineage_leads_back_to_the_zero_triplet():
    tasks = [{"id": "zero", "references": [], "program": "p", "inputs": ["1"], "outputs": ["2"]}]
    tasks += [
        {"id": str(n), "references": [str(n - 1) if n else "zero", "zero", "gone"], "answer": ""} for n in range(9)
    ]
    rows = report.with_lineage(tasks)
    assert [row["generation"] for row in rows] == list(range(10))
    assert [row["id"] for row in rows[3]["line"]] == ["1", "0", "zero"]
    assert [row["id"] for row in rows[9]["line"]] == ["7", "6", "5", "4"]
    assert [row["id"] for row in rows[9]["parents"]] == ["7", "zero"]
    assert rows[0]["text"] == "p\n\nf(1) -> 2" and rows[1]["text"] == "(no answer)"


def test_what_a_sample_shows_comes_with_its_line_and_stays_within_the_limit():
    tasks = [{"id": "0", "references": [], "answer": "x" * 100}]
    tasks += [{"id": str(n), "references": [str(n - 1)], "answer": "x" * 100} for n in range(1, 200)]
    rows = report.with_lineage(tasks)
    chosen = report.choose(rows, ("text",), 100 * (report.ROW + 100))
    numbers = [row["number"] for row in chosen]
    assert 90 <= len(chosen) <= 100 and numbers == sorted(numbers)
    assert sum(all(item in chosen for item in row["line"]) for row in chosen) > len(chosen) / 4
    assert max(numbers) > 150 and min(numbers) < 50
    assert report.choose(rows, ("text",), 10**9) == rows


def test_behaviours_are_counted_per_type():
    def item(kind: str, think: str, answer: str) -> dict:
        response = f"{think}</think>\n<answer>{answer}</answer>"
        return {"role": "solve", "kind": kind, "step": 1, "response": response}

    program = "```python\n# first double it\ndef f(x):\n    # then add one\n    return 2 * x + 1\n```"
    seen = report.behaviours(
        [
            item("induction", "easy", program),
            item("induction", "easy", program.replace("# first double it\n", "")),
            item("abduction", "Let's try 3: f gives 7, which is too big. Try 2.", "```input\n2\n```"),
            item("abduction", "It returns 7. I try 3.", "```input\n3\n```"),
            {"role": "propose"},
        ],
        report.read_tags("auto"),
    )
    assert seen["plans"] == {"induction": [(1, True), (1, False)]}
    assert seen["tries"] == {"induction": [(1, False)] * 2, "abduction": [(1, True), (1, False)]}


def test_what_a_model_wrote_is_text_wherever_it_stands(run_copy):
    tags = Page(run_copy).tags
    about = json.loads((run_copy / "config.json").read_text())
    about["config"]["model"] = about["engine"] = about["sandbox"]["platform"] = HOSTILE
    (run_copy / "config.json").write_text(json.dumps(about))
    texts = {"program", "message", "id", "answer", "verdict", "prompt", "response"}
    for name in ("tasks", "rollouts", "seeds"):
        rewrite(run_copy / f"{name}.jsonl", lambda record: record | {key: HOSTILE for key in texts & record.keys()})
        rewrite(run_copy / f"{name}.jsonl", lambda r: r | {k: [HOSTILE] for k in {"inputs", "outputs"} & r.keys()})
    append(run_copy / "flagged.jsonl", [records(run_copy / "rollouts.jsonl")[0] | {"flags": [HOSTILE]}])
    rewrite(run_copy / "metrics.jsonl", lambda record: record | {"alarms": [HOSTILE], "solve/<script>/count": 1})
    page = Page(run_copy)
    assert page.tags.count("script") == tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)</script></pre><!-- --><img src=x onerror=alert(2)> \"'&amp;\u2028</details>]]>" in page.text
    assert HOSTILE in page.pre and any(text.startswith(f"{HOSTILE}\n\nf({HOSTILE}) -> {HOSTILE}") for text in page.pre)
    [script] = re.findall("<script>(.*?)</script>", page.source, re.DOTALL)
    assert script in (HERE / "harness/report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_network(whole_run):
    page = Page(whole_run)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"} and "@import" not in page.source


def test_a_killed_run_shows_its_whole_lines(run_copy):
    for path in run_copy.rglob("*.jsonl"):
        text = path.read_text()
        if text and path.name != "seeds.jsonl":
            path.write_text(text[: -len(text.splitlines()[-1]) // 2])
    about = json.loads((run_copy / "config.json").read_text())
    about["config"]["steps"] = 9
    (run_copy / "config.json").write_text(json.dumps(about))
    page = Page(run_copy)
    assert "step 1 of 9: it goes on, or was stopped" in page.text
    assert "2 steps" not in page.text and "Reward of the solver" in page.text


def test_a_run_before_its_first_step_and_one_without_evaluations(run_copy):
    def without_evaluation(record: dict) -> dict:
        return {key: value for key, value in record.items() if key != "score" and not key.startswith("eval")}

    everything = (run_copy / "metrics.jsonl").read_text()
    (run_copy / "metrics.jsonl").write_text(everything.splitlines(keepends=True)[0])
    for name in ("tasks", "timing", "rollouts", "flagged"):
        (run_copy / f"{name}.jsonl").unlink()
    page = Page(run_copy)
    assert "There is no later measurement yet" in page.text and "Reward of the solver" not in page.text
    assert not (run_copy / "curve.svg").exists()
    (run_copy / "metrics.jsonl").write_text(everything)
    rewrite(run_copy / "metrics.jsonl", without_evaluation)
    page = Page(run_copy)
    assert "Held-out accuracy was not measured" in page.text and "Reward of the solver" in page.text


def test_a_run_without_proposals_and_one_of_other_task_types(whole_run, run_copy, tmp_path):
    seeds = ["--seeds", str(whole_run / "seeds.jsonl"), "--control", "fixed", "--steps", "1"]
    assert azr.main([*SMALL, *seeds, "--out", str(tmp_path / "fixed")]) == 0
    page = Page(tmp_path / "fixed")
    assert "with --control fixed it solves its seeds" in page.text and "Reward of the proposer" not in page.text
    assert "control: fixed" in page.text and "zero-deduction" in page.text  # seeds of --seeds, out of the buffers
    for path in [*run_copy.rglob("*.jsonl"), run_copy / "config.json"]:
        path.write_text(path.read_text().replace("induction", "divination"))
    page = Page(run_copy)
    assert "abduction, deduction, divination" in page.text and "Solve rates of new tasks: divination" in page.text


@pytest.mark.parametrize(("steps", "most"), [(40, 1_500_000), (500, 10_000_000)])
def test_the_size_is_bounded_and_the_page_says_what_was_left_out(run_copy, steps, most):
    """A run of that many steps, B = 16, out of a real one's records: each proposal is repeated with ids of its own."""
    for name, times in (("metrics", 1), ("timing", 1), ("tasks", 6), ("rollouts", 1), ("flagged", 1)):
        found = [record for record in records(run_copy / f"{name}.jsonl") if record["step"] > 0]
        real = max((record["step"] for record in found), default=1)
        long = []
        for step in range(1, steps + 1):
            for number in range(times):
                for record in (record for record in found if record["step"] == 1 + step % real):
                    record = record | {"step": step}
                    if "id" in record:
                        kept = [id for id in record["references"] if id.startswith(("seed", "zero"))]
                        parent = re.sub(r"^\d+", str(step - 1), record["id"]) + f"-{number}"
                        record |= {"id": re.sub(r"^\d+", str(step), record["id"]) + f"-{number}"}
                        record |= {"references": [*kept, parent], "program": record["program"] + "\n    # <" + "x" * 80}
                    long.append(record)
        with (run_copy / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in long)
    page = report.write(run_copy).read_text(encoding="utf-8")
    assert len(page.encode()) < most
    total = len(records(run_copy / "tasks.jsonl")) + len(records(run_copy / "seeds.jsonl"))
    assert total > 50 * steps and re.search(rf"[\d,]+ of {total:,} tasks, an even sample of all steps", page)
    assert page.count("<details>") > (1000 if steps == 40 else 5000)
    assert ("a point stands for the mean of 5 steps" in page) == (steps == 500)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", None, "is not a run folder"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "records that no run writes"),
        ("config.json", "{}", "records that no run writes"),
        ("metrics.jsonl", None, "no record of a step yet"),
        ("metrics.jsonl", '{"step": 0}\nnonsense\n{"step": 1}\n', "metrics.jsonl, line 2: not a record"),
        ("metrics.jsonl", '{"step": 0, "alarms": 3}\n', "records that no run writes"),
        ("tasks.jsonl", '{"step": 1}\n', "records that no run writes"),
        ("rollouts.jsonl", '{"step": 1, "role": "solve", "response": 3}\n', "records that no run writes"),
    ],
)
def test_a_broken_or_foreign_folder_gets_one_sentence(run_copy, capsys, file, text, words):
    (run_copy / file).unlink() if text is None else (run_copy / file).write_text(text)
    assert report.main([str(run_copy)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("no report: ") and words in message and "\n" not in message
    assert not (run_copy / "report.html").exists()
    assert report.main([]) == report.main([str(HERE / "README.md")]) == 2


def test_without_matplotlib_a_run_ends_well_and_says_why_it_has_no_report(whole_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert azr.main(["--resume", str(whole_run), "--steps", "2"]) == 0
    assert "no report: it needs matplotlib; pip install matplotlib" in capsys.readouterr().out


def test_pictures_for_a_page_leave_their_colours_to_it():
    svg = inline(svg_plot({"a": [(0, 1.0)], "none": [], "b": [(0, 0.0), (1, 2.0)]}, small=True))
    assert svg.startswith("<svg") and "var(--c0)" in svg and "var(--c2)" in svg and "var(--c1)" not in svg
    assert not re.search("#[0-9a-f]{6}|font-family|<metadata", svg) and "currentColor" in svg
    close = svg_plot({"a": [(0, 0.8123), (1, 0.8126)]}, small=True)
    ticks = re.findall(r">([\d.]+)</text>", inline(close))
    assert ticks == re.findall(r">([\d.]+)</text>", close) and max(map(len, ticks)) > 5  # not cut like coordinates
    svg = inline(svg_histograms([(1, [0, 2, 0]), (2, [1, 0, 1])], "C1"))
    assert svg.count("fill: var(--c1)") == 3


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs pip install -r requirements-dev.txt")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path_factory.mktemp('profile')}"
    ).split():
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def show(browser, folder: Path, width: int = 1280, scheme: str = "light", scripts: bool = True) -> Callable:
    """Opens a run's report; returns what evaluates an expression there."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get("about:blank")
    browser.get((folder / "report.html").resolve().as_uri())

    def value(expression: str):
        answer = browser.execute_cdp_cmd("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        return answer["result"].get("value")

    return value


ROWS = "[...document.querySelectorAll('#rows > tr')].filter(row => !row.hidden)"
IN_SIGHT = """(() => { const box = document.querySelector(':target').getBoundingClientRect();
    return box.height > 0 && box.top >= 0 && box.top < innerHeight; })()"""


def click(value: Callable, browser, selector: str) -> None:
    """A real click of the mouse in the middle of an element, after it was scrolled into sight."""
    value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    box = value(f"document.querySelector({selector!r}).getClientRects()[0].toJSON()")
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", place | {"type": kind})


def test_a_reader_sorts_filters_and_follows_a_line(browser, whole_run):
    value = show(browser, whole_run)
    total = value(f"{ROWS}.length")
    for column in ("4", "4", "1"):
        click(value, browser, f"#table th:nth-child({column}) button")
        cells = value(f"{ROWS}.map(row => row.cells[{int(column) - 1}].textContent)")
        numbers = [float(cell) for cell in cells if cell]
        up = value(f"document.querySelector('#table th:nth-child({column})').getAttribute('aria-sort')") == "ascending"
        assert numbers == sorted(numbers, reverse=not up) and len(set(numbers)) > 1
        assert cells[len(numbers) :] == [""] * (total - len(numbers))  # those without a value are last
    assert up
    for name, choice, cell in (("kind", "abduction", 1), ("verdict", "ok", 2), ("admitted", "yes", 4)):
        value(f"document.querySelector('[name={name}]').value = {choice!r}")
        value("document.querySelector('form').dispatchEvent(new Event('input', {bubbles: true}))")
        assert set(value(f"{ROWS}.map(row => row.cells[{cell}].textContent)")) == {choice}
    shown = value(f"{ROWS}.length")
    assert 0 < shown < total and value("document.querySelector('output').textContent") == f"{shown} of {total} shown"
    value(f"{ROWS}.at(-1).id = 'last'")
    click(value, browser, "#last summary")
    hidden = value("document.querySelectorAll('#rows tr[hidden]').length")
    click(value, browser, "#last p a:last-of-type")  # its ancestor is a seed, which the filter hides
    assert value("document.querySelector(':target').closest('details').open") and value(IN_SIGHT)
    assert value("document.querySelectorAll('#rows tr[hidden]').length") == hidden - 1
    assert browser.get_log("browser") == [] and value("performance.getEntriesByType('resource').length") == 0


def test_all_is_there_without_javascript(browser, whole_run):
    value = show(browser, whole_run, scripts=False)
    count = len(records(whole_run / "tasks.jsonl")) + len(records(whole_run / "seeds.jsonl"))
    assert value("document.querySelectorAll('#rows > tr').length") == count
    assert value("getComputedStyle(document.querySelector('form')).display") == "none"
    assert value("document.querySelector('#table th button')") is None
    click(value, browser, "#rows tr:last-child summary")
    assert value("document.querySelector('#rows tr:last-child details').open")
    click(value, browser, "#rows tr:last-child p a")
    assert value("document.querySelector(':target').closest('details').open") and value(IN_SIGHT)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, whole_run, width):
    value = show(browser, whole_run, width)
    sizes = "[innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth]"
    assert value(sizes) == [width, 0]
    value("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert value(sizes) == [width, 0]
    tall = "[...document.querySelectorAll('figure text')].map(text => text.getBoundingClientRect().height)"
    assert min(value(tall)) > 7  # pixels


def test_light_and_dark_have_contrast_in_text_and_curves(browser, whole_run):
    def contrast(value: Callable, selector: str, what: str) -> float:
        def luminance(css: str) -> float:
            channels = [int(channel) / 255 for channel in re.findall(r"\d+", css)[:3]]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        ink = luminance(value(f"getComputedStyle(document.querySelector({selector!r})).{what}"))
        paper = luminance(value("getComputedStyle(document.querySelector('figure')).backgroundColor"))
        return (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)

    papers = []
    for scheme in ("light", "dark"):
        value = show(browser, whole_run, scheme=scheme)
        papers.append(value("getComputedStyle(document.querySelector('figure')).backgroundColor"))
        assert contrast(value, "figure h3", "color") > 7 and contrast(value, "figure p", "color") > 4.5
        assert contrast(value, "figure svg text", "fill") > 7
        for colour in range(3):
            assert contrast(value, f"figure svg path[style*='stroke: var(--c{colour})']", "stroke") > 3
    assert papers[0] != papers[1]

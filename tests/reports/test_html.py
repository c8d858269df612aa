"""The report as text, and then as a real browser sees it."""

import io
import re
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from playwright.sync_api import Browser

from reports.drawing import plot_files
from reports.html import draw, markdown_stages, markdown_table, render_report
from reports.text import threshold
from reports.theme import PALETTE
from schemas.metrics import RAW
from schemas.reports import (
    Changes,
    DataQuality,
    Evaluation,
    GateDecision,
    GatedMetric,
    Population,
    ReportInput,
    ShardFault,
)
from tests.report_fixtures import Visit

HOSTILE = "\"'></td></svg><script>pwned=1</script><img src=x onerror=pwned=1>{{7*7}}</style></title>\u202e&amp;$\\frac{"


class Elements(HTMLParser):
    """Counts elements, gathers ids, links and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def page_text(report_input: ReportInput) -> str:
    return render_report(report_input)


@pytest.fixture(scope="session")
def brief_input(report_input: ReportInput) -> ReportInput:
    """Return the report with its tables and few plots, for tests that do not depend on plots."""
    content = report_input.model_dump()
    for population in content["evaluation"]["populations"].values():
        for mode in population["modes"].values():
            mode["identification"], mode["difference"] = None, {}
            mode["cells"] = {
                name: cell | {"det": None, "histogram": None}
                for name, cell in mode["cells"].items()
                if name in ("all", "half-half")
            }
    return ReportInput.model_validate(content | {"weights": [], "trend": []})


@pytest.fixture(scope="session")
def hostile_text(hostile_input: ReportInput) -> str:
    return render_report(hostile_input)


@pytest.fixture(scope="session")
def hostile_input(report_input: ReportInput) -> ReportInput:
    """Return the report with every text that can come from data replaced by an attack."""
    content = report_input.model_dump(mode="json")
    modes: dict[str, Any] = content["evaluation"]["populations"]["held_out"]["modes"]
    for mode in modes.values():
        mode["cells"][HOSTILE] = {**mode["cells"]["all"], "eer": {"value": None, "reason": HOSTILE}}
        mode["cells"]["frontal-" + HOSTILE.replace("-", "")] = mode["cells"]["frontal-profile"]
        mode["pairs"][0] |= {"protocol": HOSTILE}
        mode["identification"] |= {"gallery": HOSTILE, "probes": HOSTILE}
    modes[HOSTILE] = {**modes["batch_stat"], "mode": HOSTILE}
    content["evaluation"]["populations"]["held_out"]["name"] = HOSTILE
    content["evaluation"]["populations"][HOSTILE] = content["evaluation"]["populations"].pop("held_out")
    content["gated"] = {"population": HOSTILE, "cell": HOSTILE, "metric": "eer"}
    content["gate"] = {"promoted": False, "reason": HOSTILE, "compared_with": HOSTILE}
    content["evaluation"]["notes"] = [HOSTILE]
    content["quality"] |= {
        "quarantined": {HOSTILE: 1},
        "bad_shards": [{"shard": HOSTILE, "reason": HOSTILE + "x" * 400, "kept": False}],
    }
    content["weights"] += [{**content["weights"][0], "mode": HOSTILE, "branch": HOSTILE}]
    content["trend"][-1] |= {"release": HOSTILE}
    content["trend"][-1]["values"][HOSTILE] = content["trend"][-1]["values"]["raw"]
    return ReportInput.model_validate(
        {**content, "release": HOSTILE, "provenance": {HOSTILE: HOSTILE + "y" * 400, "settings": {HOSTILE: [HOSTILE]}}}
    )


@pytest.fixture(scope="session")
def bare_input() -> ReportInput:
    """Return the report of a store without a single subject."""
    return ReportInput(
        release="r1",
        created=datetime(2026, 1, 1),
        evaluation=Evaluation(
            release="r1", resamples=0, seed=0, fmrs=[], unlabelled_rows=10, duplicate_rows=0, populations={}
        ),
        gate=GateDecision(promoted=False, reason="Nothing could be measured: no row has a subject."),
        gated=GatedMetric(population="held_out", cell="all", metric="eer"),
        quality=DataQuality(shards=0, rows_read=0, rows_features=0, quarantined={}),
    )


def test_the_decision_comes_first(page_text: str, report_input: ReportInput) -> None:
    main = page_text[page_text.index("<main>") :]
    assert main.index("Promoted</h1>") < main.index(report_input.gate.reason) < main.index("<table")
    assert "Queries are served from this release." in main


@pytest.mark.parametrize(
    ("compared_with", "sentence"),
    [
        ("r7", 'served from <bdi class="code">r7</bdi>'),
        (RAW, "the last promoted release, if there is one"),
        (None, "the last promoted release, if there is one"),
    ],
)
def test_a_kept_release_says_what_is_served_instead(
    brief_input: ReportInput, compared_with: str | None, sentence: str
) -> None:
    gate = GateDecision(promoted=False, reason="Worse by 1.2 points.", compared_with=compared_with)
    page = render_report(brief_input.model_copy(update={"gate": gate}))
    decision = page[page.index("<main>") : page.index("<nav")]
    assert "Rejected</h1>" in decision
    assert sentence in decision
    assert "Queries are served from this release." not in decision


def test_rows_added_changed_and_removed_are_shown(brief_input: ReportInput) -> None:
    changes = Changes(
        since="r7",
        rows_before=5000,
        rows_added=1200,
        rows_changed=30,
        rows_removed=4,
        shards_before=3,
        shards_removed=0,
    )
    gate = brief_input.gate.replaced(changes=changes)
    page = render_report(brief_input.replaced(gate=gate, quality=brief_input.quality.replaced(rows_in_bad_shards=77)))
    assert "1,200 added, 30 changed, 4 removed since r7" in page
    assert re.search(r"in bad shards without features</th><td>77<", page)
    assert "removed since" not in render_report(brief_input)


def test_the_page_is_the_same_every_time(page_text: str, report_input: ReportInput) -> None:
    assert render_report(report_input) == page_text


def test_the_page_holds_no_script_and_no_address(page_text: str) -> None:
    elements = Elements(page_text)
    assert not {"script", "iframe", "object", "embed", "form", "link", "base"} & set(elements.tags)
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "style"]
    sources = [value or "" for name, value in elements.attributes if name == "src"]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert all((value or "").startswith("#") for name, value in elements.attributes if name == "href")
    assert "http" not in page_text.replace("http-equiv", "")
    policy = next(value or "" for name, value in elements.attributes if name == "content")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_ids_are_unique_and_every_link_leads_somewhere(page_text: str) -> None:
    elements = Elements(page_text)
    assert len(elements.ids) == len(set(elements.ids))
    links = {value[1:] for name, value in elements.attributes if name == "href" and value}
    assert links <= set(elements.ids)
    assert {"metrics", "provenance", "definitions"} <= links


def test_tables_say_whose_threshold_they_use_and_print_it(page_text: str, report_input: ReportInput) -> None:
    text = re.sub(r"\s+", " ", Elements(page_text).text)
    assert "FNMR at global FMR 0.1%" in text
    assert "one threshold per mode for all pose pairs" in text
    assert "Other pose pairs: frontal–half, half–half, half–profile" in text
    for mode in report_input.evaluation.populations["held_out"].modes.values():
        assert threshold(mode.thresholds["1e-3"]) in text
    main = page_text[page_text.index('aria-label="Modes by pose pair, population held_out"') :]
    assert "own FMR" not in main[: main.index("</table>")]


def test_recall_is_that_of_the_indexes_of_the_release(page_text: str) -> None:
    part = page_text[page_text.index("The indexes of this release</h3>") :]
    text = re.sub(r"\s+", " ", Elements(part[: part.index("</section>")]).text)
    cells = re.sub(r"\s+", "", text)
    assert "■per_sampleIVF256,SQ84,87497.2096.34256" in cells
    assert "●rawFlat4,874exact:everyrowiscompared" in cells
    assert "served index" not in page_text


def test_the_stages_of_the_run_are_shown_on_the_page_and_in_markdown(page_text: str, report_input: ReportInput) -> None:
    part = page_text[page_text.index('<section id="stages"') :]
    assert "<td>9,822</td><td>1,690</td>" in part[: part.index("</section>")]
    assert "| reweight | 0.5 | 1.0 | 4,911 | 9,822 | 1,690 |" in markdown_stages(report_input.stages).splitlines()


def test_every_plot_has_an_alternative_text(page_text: str) -> None:
    images = re.findall(r"<img [^>]*>", page_text)
    # 3 metrics, DET and scores of 4 cells, 3 maps of poses, 2 of search, 4 SE blocks, 3 modes over time
    assert len(images) == 3 + 4 + 4 + 3 + 2 + 4 + 3
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


def test_a_metric_that_is_not_estimable_gives_its_reason(page_text: str) -> None:
    assert '<abbr title="not estimable: 12000 impostor pairs are too few">n/e</abbr>' in page_text
    assert re.search(r'<li id="note-detail-\d">not estimable: 12000 impostor pairs are too few</li>', page_text)


def test_differences_are_marked_by_sign_and_word(page_text: str) -> None:
    for sign, word in (("↓", "better"), ("↑", "worse"), ("=", "no difference")):
        assert f'<span aria-hidden="true">{sign}</span> {word}</span>' in page_text


def test_notes_come_before_the_metrics(page_text: str, report_input: ReportInput) -> None:
    note = page_text.index(report_input.evaluation.notes[0])
    assert page_text.index('id="metrics"') < note < page_text.index("<table")


def test_data_quality_names_reasons_and_shards(page_text: str) -> None:
    text = re.sub(r"\s+", " ", Elements(page_text).text)
    assert "4,911 rows were read from 7 shards; 4,874 of them (99.25%) have features." in text
    assert "quarantined: zero norm" in text
    assert "fold08.parquet" in text
    assert "excluded, because a model was trained or selected on them: 250 subjects, 3,481 rows" in text


def test_times_are_printed_in_utc(brief_input: ReportInput) -> None:
    paris = datetime(2026, 3, 14, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    page = render_report(brief_input.model_copy(update={"created": paris}))
    assert '<time datetime="2026-03-13T23:30:00+00:00">13 March 2026, 23:30 UTC</time>' in page


def test_a_store_without_subjects_has_a_report(bare_input: ReportInput) -> None:
    page = render_report(bare_input)
    assert "no labelled rows were evaluated" in page
    assert "<img" not in page
    assert draw(bare_input) == []
    assert markdown_table(bare_input.evaluation) == "Nothing was measured: no labelled rows were evaluated.\n"


def test_another_gated_cell_joins_the_table(brief_input: ReportInput) -> None:
    gated = GatedMetric(population="held_out", cell="half-half", metric="fnmr@1e-2")
    page = render_report(brief_input.model_copy(update={"gated": gated}))
    assert "Gated metric: FNMR at own FMR 1%, half–half" in page
    main, detail = page.split("Every pose pair at thresholds of its own</summary>")
    assert "<bdi>half–half</bdi>" in main[main.index("<nav") :]
    assert "<bdi>half–half</bdi>" in detail


def test_hostile_texts_inject_nothing(hostile_text: str, page_text: str) -> None:
    elements, plain = Elements(hostile_text), Elements(page_text)
    assert set(elements.tags) == set(plain.tags)
    assert {name for name, _ in elements.attributes} == {name for name, _ in plain.attributes}
    assert "<script>pwned=1</script>" in elements.text
    assert "{{7*7}}" in elements.text
    assert "\u202e" not in elements.text


def test_plot_files_are_whole_and_plainly_named(hostile_input: ReportInput) -> None:
    drawn = draw(hostile_input)
    files = plot_files(plot for figure in drawn for plot in figure.plots)
    assert render_report(hostile_input, drawn) == render_report(hostile_input)
    assert len(files) > 40
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(svg|png)", name) for name in files)
    for name, content in files.items():
        if name.endswith(".svg"):
            tags = {part.tag.rpartition("}")[2] for part in ElementTree.fromstring(content).iter()}
            assert not tags & {"script", "image", "foreignObject", "a"}
        else:
            assert content.startswith(b"\x89PNG")


def test_markdown_table_has_a_row_for_each_mode_and_cell(report_input: ReportInput) -> None:
    lines = markdown_table(report_input.evaluation).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 + 4 * 3
    assert len({re.sub(r"\\.", "", row).count("|") for row in rows}) == 1
    assert lines[0].startswith("held\\_out: 100 subjects, 1,393 rows; 250 subjects excluded.")
    raw = report_input.evaluation.populations["held_out"].modes[RAW].cells["frontal-profile"].eer
    assert f"| frontal–profile | raw | {100 * raw.value:.2f} ({100 * raw.low:.2f} to" in "\n".join(lines)


def test_markdown_table_is_safe_from_its_names(hostile_input: ReportInput) -> None:
    only = {"x": Population.model_validate(hostile_input.evaluation.populations[HOSTILE].model_dump())}
    table = markdown_table(hostile_input.evaluation.model_copy(update={"populations": only}))
    assert "<" not in table
    assert "&lt;script&gt;pwned=1&lt;/script&gt;" in table


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, page_text: str, hostile_text: str, bare_input: ReportInput
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    pages = {"plain": page_text, "hostile": hostile_text, "bare": render_report(bare_input)}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.mark.parametrize("name", ["plain", "hostile", "bare"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_the_browser_neither_complains_nor_asks_for_anything(
    browser: Browser, files: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with Visit(browser, files[name], width, scheme) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.complaints == []
        assert [one for one in visit.requests if not one.startswith("data:")] == [files[name].as_uri()]


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_every_plot_fits_the_screen(browser: Browser, files: dict[str, Path], page_text: str, width: int) -> None:
    with Visit(browser, files["plain"], width) as visit:
        images = visit.page.evaluate(
            """Promise.all([...document.images].map(async one => {
              await one.decode();
              const frame = one.getBoundingClientRect();
              return {alt: one.alt, width: frame.width, height: frame.height, right: frame.right};
            }))"""
        )
    assert len(images) == page_text.count("<img ")
    for image in images:
        assert image["width"] > 200, image
        assert image["height"] > 100, image
        assert image["right"] <= width, image


def test_every_text_of_a_plot_is_within_its_frame(browser: Browser, report_input: ReportInput) -> None:
    page = browser.new_page()
    for plot in (plot for figure in draw(report_input) for plot in figure.plots):
        page.set_content(plot.svg.decode().partition("?>")[2])
        shapes, outside = page.evaluate(
            """() => {
              const svg = document.querySelector('svg'), frame = svg.getBoundingClientRect();
              const out = [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1
                    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
              });
              return [svg.querySelectorAll('path, rect').length, out.map(text => text.textContent)];
            }"""
        )
        assert shapes > 5, plot.name
        assert outside == [], plot.name
    page.close()


@pytest.mark.parametrize(
    ("scheme", "media", "theme"), [("light", "screen", 0), ("dark", "screen", 1), ("dark", "print", 0)]
)
def test_page_and_plots_follow_the_theme(
    browser: Browser, files: dict[str, Path], scheme: str, media: Any, theme: int
) -> None:
    with Visit(browser, files["plain"], scheme=scheme) as visit:
        visit.page.emulate_media(media=media)
        colours = visit.page.evaluate(
            """({paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color})"""
        )
        picture = visit.page.locator("img").first.screenshot()
    for role, colour in colours.items():
        assert colour == "rgb({}, {}, {})".format(*rgb(PALETTE[role][theme])), role
    with Image.open(io.BytesIO(picture)) as image:
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {rgb(PALETTE[role][theme]) for role in ("paper", "ink", "per_sample", "batch_stat")} <= seen
    assert rgb(PALETTE["per_sample"][1 - theme]) not in seen


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def test_hostile_texts_stay_texts_in_the_browser(browser: Browser, files: dict[str, Path]) -> None:
    with Visit(browser, files["hostile"]) as visit:
        assert visit.page.evaluate("typeof pwned") == "undefined"
        assert visit.page.locator("script, iframe, object, embed, link, form").count() == 0
        assert visit.page.locator("img:not([src^='data:image/svg+xml;base64,'])").count() == 0
        assert "<script>pwned=1</script>" in visit.page.locator(".reason").inner_text()
        assert visit.page.title().startswith("Rejected: release \"'></td></svg><script>")
        assert visit.page.locator("img[alt*='</td>']").count() > 0


def test_the_policy_stops_a_script_and_a_request_that_got_in_all_the_same(
    browser: Browser, files: dict[str, Path], tmp_path: Path
) -> None:
    attack = "<script>pwned = 1</script><img src='file:///etc/hostname'><p style='color: rgb(1, 2, 3)' id='x'>x</p>"
    broken = tmp_path / "broken.html"
    broken.write_text(files["plain"].read_text(encoding="utf-8").replace("<main>", f"<main>{attack}"), encoding="utf-8")
    with Visit(browser, broken) as visit:
        assert visit.page.evaluate("typeof pwned") == "undefined"
        assert visit.page.evaluate("getComputedStyle(document.getElementById('x')).color") != "rgb(1, 2, 3)"
        assert visit.page.evaluate("document.querySelector('img:not([alt])').naturalWidth") == 0
        assert sum("Content Security Policy" in complaint for complaint in visit.complaints) >= 3


def test_wide_tables_scroll_in_their_own_frame_on_a_phone(browser: Browser, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"], 360) as visit:
        frames = visit.page.evaluate(
            """[...document.querySelectorAll('#metrics > .scroll, #search > .scroll')].map(
                 one => [one.scrollWidth > one.clientWidth, one.clientWidth, one.tabIndex,
                         getComputedStyle(one).overflowX])"""
        )
    assert len(frames) == 4  # metrics; search, expansion, indexes
    for _, width, focus, overflow in frames:
        assert (focus, overflow) == (0, "auto")
        assert width <= 360
    assert all(wide for wide, *_ in frames[:2])


def test_print_is_light_unfolded_and_cuts_nothing_off(browser: Browser, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"], 690, "dark") as visit:
        visit.page.emulate_media(media="print")
        seen = visit.page.evaluate(
            """({ink: getComputedStyle(document.body).color,
               nav: getComputedStyle(document.querySelector('nav')).display,
               words: document.querySelector('dl.words').getBoundingClientRect().height,
               width: document.documentElement.scrollWidth})"""
        )
        pdf = visit.page.pdf()
    assert seen["ink"] == "rgb(27, 32, 38)"
    assert seen["nav"] == "none"
    assert seen["words"] > 200
    assert seen["width"] <= 690
    assert pdf.startswith(b"%PDF")


def test_keyboard_reaches_contents_and_tables(browser: Browser, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate("document.activeElement.textContent") == "Skip to the metrics"
        visit.page.get_by_role("link", name="Provenance").click()
        visit.page.get_by_role("heading", name="Provenance").click()  # clicks only what has come into view
        assert visit.page.url.endswith("#provenance")


def test_a_long_list_of_bad_shards_fits_a_phone(browser: Browser, brief_input: ReportInput, tmp_path: Path) -> None:
    faults = [ShardFault(shard=f"{'a' * 200}-{n}.parquet", reason="b" * 300, kept=False) for n in range(50)]
    quality = brief_input.quality.model_copy(update={"bad_shards": faults})
    file = tmp_path / "bad.html"
    file.write_text(render_report(brief_input.model_copy(update={"quality": quality})), "utf-8")
    with Visit(browser, file, 360) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert visit.page.get_by_text("Bad shards: 50").is_visible()

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from p2pcodistill.report.html import write_report
from p2pcodistill.report.summary import summarise
from p2pcodistill.report.table import headline


class Page(HTMLParser):
    """Collects what a page refers to, its ids, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def write(tmp_path):
    def write_page(arms, *, title="pair", configuration_text="[sites]", versions=None) -> tuple[str, Page]:
        path = tmp_path / "report.html"
        summary = summarise("pair", arms, 2000)
        write_report(
            path,
            title=title,
            summary=summary,
            arms=arms,
            configuration_text=configuration_text,
            versions=versions or {"p2pcodistill": "0.1.0"},
        )
        text = path.read_text(encoding="utf-8")
        return text, Page(text)

    return write_page


def test_the_page_needs_nothing_else(make_arms, write):
    text, page = write(make_arms())
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in text
    assert "default-src 'none'" in text
    assert len(page.ids) == len(set(page.ids))


def test_the_page_tells_the_outcome(make_arms, write):
    arms = make_arms()
    _, page = write(arms, versions={"python": "3.11.9", "torch": "2.13.0"})
    assert headline(summarise("pair", arms, 2000)) in page.text
    for told in ("95 %", "0.65", "117×", "1.0×", "0.14 %", "64.5 MB", "1.473", "torch", "2.13.0"):
        assert told in page.text
    assert "Equal steps are not equal compute" in page.text
    assert "Every site: 940,000 parameters, float32 on cpu." in page.text
    assert page.tags.count("svg") == 3
    assert "To be read with care" not in page.text


def test_several_seeds_get_a_column_and_a_band(make_arms, write):
    _, page = write(make_arms(seeds=(0, 1)))
    assert "means over 2 seeds" in page.text
    assert page.text.count(", mean of 2 seeds") == 2, "the tiles say so too"
    assert page.tags.count("tr") == 1 + 2 * 5 + 1


def test_missing_arms_are_told_and_what_cannot_be_drawn_is_left_out(make_arms, write):
    _, page = write(make_arms(kinds=("alone",)))
    assert "There is no codistilled arm." in page.text
    assert "cannot be told" in page.text
    assert page.tags.count("svg") == 1
    assert "What travelled" not in page.text


def test_everything_from_outside_is_escaped(make_arms, write):
    evil = "</pre><script>alert(1)</script>&"
    text, page = write(make_arms(), title=evil, configuration_text=evil, versions={evil: evil})
    assert "<script>" not in text
    assert page.text.count(evil) == 5  # title twice
    assert "script" not in page.tags


def test_a_site_that_did_not_finish_is_marked(make_arms, write):
    arms = make_arms()
    history = arms[0].sites["tokyo"]
    history.finished, history.num_steps = False, 1200
    history.evaluations = [point for point in history.evaluations if point[0] <= 1200]
    _, page = write(arms)
    assert "1200 (not finished)" in page.text
    assert "tokyo (codistilled) did not finish: it got to step 1200 of 2000." in page.text

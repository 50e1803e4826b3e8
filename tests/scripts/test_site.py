"""The site: it builds without a warning, every link and anchor leads somewhere, and it asks no other host."""

import html.parser
import pathlib
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class _Page(html.parser.HTMLParser):
    """What a page has: ids, links, and what a browser loads by itself."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = {name: value or "" for name, value in attrs}
        self.ids |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if "src" in named:
            self.loads.append(named["src"])
        if tag == "link" and named.get("rel") in ("stylesheet", "preconnect", "icon", "preload", "modulepreload"):
            self.loads.append(named["href"])


@pytest.fixture(scope="module")
def pages(site) -> dict[pathlib.Path, _Page]:
    return {path: _Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_built(site, pages):
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site) for path in pages} == sources


def test_links_and_anchors_lead_somewhere(pages):
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            assert target.exists(), f"{path.name}: {link}"
            if url.fragment and target in pages:
                assert urllib.parse.unquote(url.fragment) in pages[target].ids, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


def test_pages_load_nothing_from_another_host(pages):
    for path, page in pages.items():
        assert page.loads
        for load in page.loads:
            url = urllib.parse.urlsplit(load)
            assert url.scheme in ("", "data"), f"{path.name}: {load}"
            assert not url.netloc, f"{path.name}: {load}"


def test_no_markdown_is_left_over(pages):
    """A block or an include that was not understood stands there as it was written."""
    for path in pages:
        text = path.read_text()
        for leftover in ("```", "--8&lt;--", "--8<--", "@@"):
            assert leftover not in text, f"{path.name}: {leftover}"

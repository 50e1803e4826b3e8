"""The site in a real browser: whole on a desk and on a phone, and it asks nobody but its own server."""

import functools
import http.server
import threading

import pytest
from selenium.webdriver.common.action_chains import ActionChains

from tests.serving.server.browsing import DESK, PHONE, browsing

pytestmark = pytest.mark.browser


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        """Requests are no news."""


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with browsing() as page:
        yield page


@pytest.mark.parametrize(("size", "pattern"), [(DESK, "re*.html"), (PHONE, "**/*.html")], ids=["desk", "phone"])
def test_pages_fit_the_screen_and_load_from_their_own_server_alone(site, address, browser, size, pattern):
    """All on a phone; on a desk, where there is room, the page with the most in it."""
    browser.resize(size)
    names = sorted(path.relative_to(site).as_posix() for path in site.glob(pattern) if path.name != "404.html")
    assert len(names) == 1 if size == DESK else len(names) > 30
    for name in names:
        browser.driver.get(f"{address}/{name}")
        assert browser.one("h1").is_displayed()
        wide, screen = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= screen, f"{name} is {wide} pixels wide"
        loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded
        for url in loaded:
            assert url.startswith((address, "data:")), f"{name} loads {url}"
        broken = (
            "return [...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
        )
        assert browser.run(broken) == [], name
    assert browser.complaints() == []


SEARCHED = """
    const shadows = [...document.querySelectorAll("*")].filter(element => element.shadowRoot);
    return shadows.map(element => element.shadowRoot.textContent).join(" ");
"""


def test_search_finds_an_option(address, browser):
    browser.resize(DESK)
    browser.driver.get(f"{address}/index.html")
    browser.one(".md-search__button").click()
    browser.until(lambda: browser.run("return document.activeElement.shadowRoot !== null"), "the search")
    ActionChains(browser.driver).send_keys("state_checkpoint_interval").perform()
    browser.until(lambda: "Configuration" in browser.run(SEARCHED), "the page that has it")
    assert browser.complaints() == []

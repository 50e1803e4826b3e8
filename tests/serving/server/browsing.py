"""What the tests of the page share: a real browser, and the page in it."""

import contextlib
import shutil
import tempfile
import time

from selenium import webdriver

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

PHONE = (390, 844)
DESK = (1280, 860)


@contextlib.contextmanager
def browsing():
    """Headless Chromium, with a profile of its own and the size of a desk's screen.

    Without Debian's chromium and chromium-driver this is an error: the tests of the page mean nothing without them.
    """
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, (
        f"{' and '.join(missing)} not found: `apt-get install chromium chromium-driver`, "
        "or run the tests without `-m browser`"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={DESK[0]},{DESK[1]}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
        try:
            yield Page(driver)
        finally:
            driver.quit()


class Page:
    """The page in a browser, by its ids and classes."""

    def __init__(self, driver):
        self.driver = driver
        self.address = None

    def open(self, address, view=""):
        """A fresh page: nothing remembered, and no complaint of an earlier one."""
        self.driver.get(f"{address}/pages/icon.svg")
        self.run("localStorage.clear(); sessionStorage.clear()")
        self.complaints()
        self.driver.get(f"{address}/{view}")
        self.address = address

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        """What a reader sees of it."""
        return self.one(selector).text

    def until(self, condition, what, seconds=20):
        """Waits until `condition()` is true and gives its value."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited for {what}; the page says: {self.text('body')!r}"
            time.sleep(0.02)
        return found

    def say(self, text):
        """Types a message and sends it as most people do; does not wait for the answer."""
        self.one("#message").send_keys(text + "\n")

    def ask(self, text):
        """The last answer, once it is whole."""
        turns = len(self.all(".assistant"))
        self.say(text)
        return self.answer(turns + 1)

    def answer(self, turns, seconds=20):
        """The answer of that number, once it is whole."""

        def is_whole():
            return len(self.all(".assistant")) == turns and not self.all(".assistant[aria-busy]")

        self.until(is_whole, f"answer {turns}", seconds)
        return self.all(".assistant")[-1]

    def resize(self, size):
        """Sets the view's size in CSS pixels, without the window's frame."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )

    def colours(self, scheme):
        """As somebody who prefers "light" or "dark"."""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def devtools(self, command, **parameters):
        return self.driver.execute_cdp_cmd(command, parameters)

    def complaints(self):
        """What the browser has written to its console since it was asked last: errors, refused requests, breaches of
        the Content-Security-Policy.
        """
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

"""The page as files over HTTP; in a browser it is tested in test_pages_in_browser.py."""

import re

import fastapi
import pytest
from fastapi.testclient import TestClient

from gdnjax import LLM
from gdnjax.serving.server import errors, pages
from tests.micro import micro_model, micro_params
from tests.serving.server.scripted import STATS


@pytest.fixture(scope="module")
def client():
    app = fastapi.FastAPI()
    errors.install(app)
    app.include_router(pages.router)
    with TestClient(app) as client:
        yield client


def test_page_and_everything_that_it_names_is_there(client):
    index = client.get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    named = {index.url.join(path).path for path in re.findall(r'(?:src|href)="([^#"]+)"', index.text)}
    assert named == {"/pages/main.js", "/pages/style.css", "/pages/icon.svg"}
    seen = set()
    while named - seen:
        path = (named - seen).pop()
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, path
        named |= {answer.url.join(name).path for name in re.findall(r'^import .* from "(\S+)";$', answer.text, re.M)}
    # Every file is one that the page needs.
    assert seen == {f"/pages/{name}" for name in pages.files()} - {"/pages/index.html"}


def test_files_name_no_other_host(client):
    for name in pages.files():
        text = client.get(f"/pages/{name}").text
        hosts = set(re.findall(r"https?://[\w.-]+", text))
        # The name of SVG's elements, at which nothing is asked.
        assert hosts <= {"http://www.w3.org"}, name


@pytest.mark.parametrize("path", ["/", "/pages/main.js", "/pages/style.css"])
def test_answers_forbid_what_is_not_the_servers_own(client, path):
    headers = client.get(path).headers
    policy = dict(entry.split(" ", 1) for entry in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert headers["x-content-type-options"] == "nosniff"


def test_file_that_is_known_is_not_sent_again(client):
    first = client.get("/pages/main.js")
    again = client.get("/pages/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/pages/chat.js", headers={"if-none-match": first.headers["etag"]})
    assert (other.status_code, len(other.content) > 0) == (200, True)


@pytest.mark.parametrize("name", ["__init__.py", "..%2f__init__.py", "%2e%2e/app.py", "nothing.js", ""])
def test_other_files_are_not_served(client, name):
    assert client.get(f"/pages/{name}").status_code == 404


def test_scripted_figures_are_those_of_an_engine():
    """What the tests in a browser show, `LLM.stats()` has."""

    def form(stats):
        if isinstance(stats, dict):
            return {name: form(value) for name, value in stats.items()}
        return None

    with LLM.from_model(micro_model(), micro_params(), max_num_seqs=2, max_model_len=64, warmup=False) as llm:
        real = form(llm.stats())
    scripted = form(STATS)
    for stats in (real, scripted):
        # By reasons, by percentiles, and of a tier that this engine has not.
        for name in ("num_ended", "time_to_first_token", "time_per_output_token", "host_cache"):
            assert name in stats
            del stats[name]
    assert scripted == real

"""The page in a real browser, before a real server with the embedded model."""

import time

import pytest

from gdnjax import SamplingParams, __version__
from tests.serving.server.browsing import browsing

pytestmark = pytest.mark.browser

QUESTION = "A box has 3 apples. 4 more are put in. How many apples are in the box?"


@pytest.fixture(scope="module")
def page(url):
    with browsing() as page:
        page.open(url)
        page.until(lambda: page.text("#model-name") == "tiny", "the model's name")
        page.one("#settings-toggle").click()
        page.one("#temperature").send_keys("0")
        page.one("#settings-close").click()
        yield page
        assert page.complaints() == []


def reply(page, turns):
    # The first one waits for the compiler.
    return page.answer(turns, seconds=300)


def test_conversation_is_that_of_the_engine(page, llm):
    page.say(QUESTION)
    first = reply(page, 1).find_element("css selector", ".prose").text
    page.say("What is 31 + 46?")
    second = reply(page, 2)
    messages = [{"role": "user", "content": QUESTION}]
    greedy = SamplingParams(temperature=0.0, max_tokens=200)
    (expected,) = llm.chat(messages, greedy, use_tqdm=False)
    # Its last line is Markdown's heading.
    assert first == expected.outputs[0].text.replace("#### ", "")
    messages += [{"role": "assistant", "content": expected.outputs[0].text}]
    messages += [{"role": "user", "content": "What is 31 + 46?"}]
    (expected,) = llm.chat(messages, greedy, use_tqdm=False)
    answer = expected.outputs[0]
    assert second.find_element("css selector", ".prose").text == answer.text.replace("#### ", "")
    facts = second.find_element("css selector", ".facts").text
    assert f"{len(answer.token_ids)} tokens · " in facts
    assert f"prompt {len(expected.prompt_token_ids)}, of it " in facts
    assert page.complaints() == []


def test_stop_reaches_the_engine(page, llm, monkeypatch):
    take_turn = llm.engine.take_turn

    def slow_turn(*arguments):
        time.sleep(0.05)
        return take_turn(*arguments)

    page.one("#new-chat").click()
    aborted = llm.stats()["num_ended"].get("abort", 0)
    with monkeypatch.context() as patched:
        # An answer would be over before somebody can stop it.
        patched.setattr(llm.engine, "take_turn", slow_turn)
        page.say("Tell me a story.")
        page.until(lambda: page.text(".assistant .prose"), "the first words", seconds=300)
        page.one("#stop").click()
        answer = reply(page, 1)
        page.until(lambda: llm.stats()["num_running"] == 0, "the engine to be idle")
    assert "stopped" in answer.find_element("css selector", ".facts").text
    assert llm.stats()["num_ended"]["abort"] == aborted + 1


def test_figures_are_the_engines(page, llm):
    page.one("#to-engine").click()
    page.until(lambda: page.all(".card"), "the engine's figures")
    stats = llm.stats()
    text = page.text("#engine")
    cache = stats["prefix_cache"]
    for figure in (
        f"{stats['num_output_tokens']:,} since the start",
        f"{cache['cached_states']} of {stats['slots_total']}",
        f"{cache['evictable_blocks']} kept by the prefix cache",
        f"Requests {stats['num_requests']}",
        f"gdnjax {__version__}",
    ):
        assert figure in text

"""The page in a real browser, against a server that answers by script."""

import time

import pytest
from selenium.webdriver.common.keys import Keys

from tests.serving.server.browsing import DESK, PHONE, browsing
from tests.serving.server.scripted import CALLS, KEY, SCRIPT, STATS, Scripted
from tests.serving.server.sockets import serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page():
    with browsing() as page:
        yield page


@pytest.fixture(scope="module")
def server():
    """One server for all; `requests` has what it was asked."""
    scripted = Scripted(stats=STATS)
    with serving(scripted.app) as address:
        scripted.address = address
        yield scripted


@pytest.fixture
def chat(page, server):
    """A fresh page on a desk. Whatever a test does, the browser finds nothing to complain about."""
    server.requests.clear()
    page.resize(DESK)
    page.open(server.address)
    page.until(lambda: page.text("#model-name") == "scripted", "the model's name")
    yield page
    assert page.complaints() == []


def test_answer_streams_and_is_kept_as_history(chat, server):
    first = chat.ask("hello")
    assert first.find_element("css selector", ".prose").text == "You said: hello"
    assert first.find_element("css selector", ".who").text == "scripted"
    chat.ask("and again")
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "You said: hello"}]
    assert server.requests[-1]["messages"] == [*said, {"role": "user", "content": "and again"}]
    assert server.requests[-1]["model"] == "scripted"
    assert server.requests[-1]["stream"] is True
    # What the reader has not set is the model's own.
    assert set(server.requests[-1]) == {"model", "messages", "stream", "stream_options"}


def test_numbers_of_an_answer_are_told(chat):
    facts = chat.ask("long").find_element("css selector", ".facts").text
    assert "20 tokens" in facts
    assert "tokens/s" in facts
    assert "prompt 12, of it 8 cached" in facts
    assert "cut off at the limit of tokens" in facts


def test_html_of_the_model_is_text(chat):
    answer = chat.ask("script").find_element("css selector", ".prose")
    assert answer.text == SCRIPT.replace("**bold**", "bold")
    assert not answer.find_elements("css selector", "script, img")
    assert answer.find_element("css selector", "strong").text == "bold"
    assert chat.driver.title == "scripted · gdnjax"


def test_html_of_the_reader_is_text(chat):
    chat.ask("<img src=x onerror='document.title = 1'>")
    assert chat.text(".user .text") == "<img src=x onerror='document.title = 1'>"
    assert not chat.all("#log img")
    assert chat.driver.title == "scripted · gdnjax"


def test_policy_forbids_what_the_page_never_does(chat):
    """Whoever got a script into the page could still not run it, nor tell another host."""
    outcome = chat.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const found = {};
        try { document.body.innerHTML += "x"; found.html = "made"; } catch { found.html = "refused"; }
        const script = document.createElement("script");
        try { script.text = "document.title = 'taken'"; document.body.append(script); } catch {}
        fetch("http://127.0.0.1:9/").then(() => done(found), () => done({...found, other: "refused"}));
        """
    )
    assert outcome == {"html": "refused", "other": "refused"}
    assert chat.driver.title == "scripted · gdnjax"
    assert any("Content Security Policy" in complaint for complaint in chat.complaints())


def test_markdown_is_shown(chat):
    answer = chat.ask("markdown").find_element("css selector", ".prose")

    def texts(selector):
        return [element.text for element in answer.find_elements("css selector", selector)]

    assert texts("h4") == ["A heading"]
    assert texts("p strong") == ["bold"]
    assert texts("p em") == ["slanted"]
    assert texts("p s") == ["struck"]
    assert texts("p code") == ["code"]
    assert "snake_case_names and 2 * 3 * 4." in answer.text
    assert texts("ol > li > ul > li") == ["under two", "again"]
    assert texts("blockquote") == ["quoted"]
    assert texts("th") + texts("td") == ["name", "value", "a", "1"]
    assert texts("figure code") == ['print("<b>not bold</b>")']
    assert texts("figcaption span") == ["python"]
    assert [link.get_attribute("href") for link in answer.find_elements("css selector", "a")] == [
        "https://example.org/a"
    ]
    assert "[not](javascript:alert(1))" in answer.text


def test_markdown_takes_time_by_its_length(chat):
    """Whatever a model writes without end, the page goes on."""
    seconds = chat.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        import("./pages/markdown.js").then(({ Prose }) => {
          const found = {};
          const marks = ["*", "**", "_", "`", "[", "\\\\", "* a ", "[a]("];
          const kinds = [...marks, "> ", "- ", "  - a\\n", "| ", "|-", "# ", "~~~", "```x"];
          for (const kind of kinds) {
            for (const text of [kind.repeat(100000 / kind.length), "|a|\\n" + " ".repeat(100000) + kind, kind + "x`"]) {
              const began = performance.now();
              new Prose().show(text);
              found[kind] = Math.max(found[kind] ?? 0, (performance.now() - began) / 1000);
            }
          }
          done(found);
        }, (error) => done(String(error)));
        """
    )
    assert isinstance(seconds, dict), seconds
    assert max(seconds.values()) < 5, seconds


def test_what_has_not_changed_stays_the_same_node(chat):
    """A selection in it is not lost while more is written."""
    assert chat.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        import("./pages/markdown.js").then(({ Prose }) => {
          const prose = new Prose();
          prose.show("one\\n\\n- two\\n\\nthr");
          const nodes = [...prose.element.childNodes];
          prose.show("one\\n\\n- two\\n\\nthree **fo");
          const after = [...prose.element.childNodes];
          done([nodes[0] === after[0], nodes[1] === after[1], nodes[2] === after[2], prose.element.textContent]);
        });
        """
    ) == [True, True, False, "onetwothree **fo"]


def test_thinking_is_folded(chat, server):
    answer = chat.ask("think")
    thinking = answer.find_element("css selector", "details.thinking")
    assert thinking.get_attribute("open") is None
    assert thinking.find_element("css selector", "summary").text.startswith("Thought")
    assert answer.find_element("css selector", ".prose").text == "Yes."
    thinking.find_element("css selector", "summary").click()
    assert thinking.find_element("css selector", "div").text == "I wonder <b>whether</b>"
    chat.ask("hello")
    assert server.requests[-1]["messages"][1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "I wonder <b>whether</b>",
    }


def test_calls_are_shown_and_answered(chat, server):
    answer = chat.ask("call")
    names = [caption.text for caption in answer.find_elements("css selector", ".call figcaption span")]
    assert names == ["call: weather", "call: clock"]
    assert answer.find_element("css selector", ".call pre").text == '{\n  "city": "Oslo"\n}'
    for field, result in zip(answer.find_elements("css selector", ".call textarea"), ("rain", "noon"), strict=True):
        field.send_keys(result)
    answer.find_element("css selector", ".calls > button").click()
    assert chat.answer(2).find_element("css selector", ".prose").text == "The results are rain and noon."
    _, said, *results = server.requests[-1]["messages"]
    assert [(call["id"], call["function"]) for call in said["tool_calls"]] == [
        (CALLS[0]["id"], {"name": "weather", "arguments": '{"city": "Oslo"}'}),
        (CALLS[3]["id"], {"name": "clock", "arguments": "{}"}),
    ]
    assert [(result["tool_call_id"], result["content"]) for result in results] == [
        ("call-1", "rain"),
        ("call-2", "noon"),
    ]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_answer_and_keeps_what_has_come(chat, server, way):
    left = server.left
    chat.say("for ever")
    chat.until(lambda: "3 4 5" in chat.text("#log"), "some of the answer")
    if way == "button":
        chat.one("#stop").click()
    else:
        chat.one("#message").send_keys(Keys.ESCAPE)
    answer = chat.answer(1)
    assert "stopped" in answer.find_element("css selector", ".facts").text
    chat.until(lambda: server.left == left + 1, "the server to notice")
    assert chat.one("#send").is_displayed()
    assert not chat.one("#stop").is_displayed()
    chat.ask("hello")
    assert server.requests[-1]["messages"][1]["content"].startswith("0 1 2 3 4 5")


def test_settings_are_sent_and_remembered(chat, server):
    chat.one("#settings-toggle").click()
    for field, value in (("system", "Be brief."), ("temperature", "0.25"), ("top-p", "0.9"), ("max-tokens", "64")):
        chat.one(f"#{field}").send_keys(value)
    chat.one("#seed").send_keys("0")
    chat.one("#tools").send_keys('[{"type": "function", "function": {"name": "weather"}}]')
    chat.one("#thinking option[value=false]").click()
    chat.driver.refresh()
    chat.until(lambda: chat.text("#model-name") == "scripted", "the model's name")
    chat.ask("hello")
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.25, 0.9, 64, 0)
    assert sent["tools"] == [{"type": "function", "function": {"name": "weather"}}]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    chat.one("#settings-toggle").click()
    chat.one("#settings-reset").click()
    chat.ask("hello")
    assert "temperature" not in server.requests[-1]
    assert server.requests[-1]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("temperature", "-1", "Temperature"),
        ("max-tokens", "0", "Max. tokens"),
        ("tools", "{", "Tools"),
        ("tools", "{}", "list"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_sent(chat, server, field, value, named):
    chat.one("#settings-toggle").click()
    chat.one(f"#{field}").send_keys(value)
    chat.say("hello")
    assert named in chat.text("#settings-wrong")
    assert chat.run("return document.activeElement.id") == field
    assert chat.one("#message").get_attribute("value") == "hello"
    assert server.requests == []


@pytest.mark.parametrize(
    ("message", "said", "kept"),
    [
        ("refuse", "max_tokens is <too> large", ""),
        ("break", "the engine has failed", "So far"),
        ("cut", "The connection to the server was lost.", "So far"),
    ],
)
def test_errors_are_shown_and_asked_again(chat, server, message, said, kept):
    answer = chat.ask(message)
    assert answer.find_element("css selector", ".wrong").text == said
    assert answer.find_element("css selector", ".prose").text == kept
    answer.find_element("css selector", ".again").click()
    chat.until(lambda: len(server.requests) == 2, "the second attempt")
    chat.answer(1)
    assert server.requests[0] == server.requests[1]
    # A refusal is written to the console by the browser itself.
    assert all("400 (Bad Request)" in complaint for complaint in chat.complaints())


def test_new_chat_forgets(chat, server):
    chat.ask("hello")
    chat.say("for ever")
    chat.until(lambda: "2 3" in chat.text("#log"), "some of the answer")
    chat.one("#new-chat").click()
    chat.until(lambda: not chat.all(".turn"), "an empty conversation")
    assert chat.one("#empty").is_displayed()
    chat.until(lambda: chat.one("#send").is_displayed(), "the end of the old answer")
    chat.ask("afresh")
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "afresh"}]


def test_reading_further_up_is_not_disturbed(chat):
    chat.say("many lines")
    chat.until(lambda: "line 60" in chat.text("#log"), "a screenful")
    chat.run("document.querySelector('#log').scrollTop = 0")
    chat.answer(1)
    assert chat.run("return document.querySelector('#log').scrollTop") == 0
    chat.one("#down").click()
    assert (
        chat.run(
            "const log = document.querySelector('#log'); return log.scrollHeight - log.scrollTop - log.clientHeight"
        )
        < 2
    )
    assert not chat.one("#down").is_displayed()


def test_keys_alone_reach_everything(chat, server):
    """Tab goes through what can be done, in the order in which it stands; Shift+Enter is a line, Enter sends."""
    assert chat.run("return document.activeElement.id") == "message"
    chat.one("#message").send_keys("two", Keys.SHIFT + Keys.ENTER, Keys.NULL, "lines")
    assert server.requests == []
    active = chat.driver.switch_to.active_element
    names = []
    for _ in range(3):
        active.send_keys(Keys.TAB)
        active = chat.driver.switch_to.active_element
        names.append(active.get_attribute("id"))
    assert names == ["settings-toggle", "new-chat", "send"]
    active.send_keys(Keys.ENTER)
    assert chat.answer(1).find_element("css selector", ".prose").text == "You said: two\nlines"
    assert chat.run("return document.activeElement.id") == "message"
    chat.one("#settings-toggle").send_keys(Keys.ENTER)
    assert chat.run("return document.activeElement.id") == "system"
    chat.one("#system").send_keys(Keys.ESCAPE)
    assert not chat.one("#settings").is_displayed()
    assert chat.run("return document.activeElement.id") == "settings-toggle"
    chat.one("#to-engine").send_keys(Keys.ENTER)
    chat.until(lambda: chat.one("#engine").is_displayed(), "the engine's view")


def test_every_field_has_a_name(chat):
    chat.one("#settings-toggle").click()
    nameless = chat.run(
        """
        return [...document.querySelectorAll("input, select, textarea, button")].filter((element) =>
          !element.labels?.length && !element.textContent.trim() && !element.ariaLabel
        ).map((element) => element.outerHTML);
        """
    )
    assert nameless == []


CONTRAST = """
  const luminance = (colour) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const found = numbers(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found.slice(0, 3);
    }
    throw new Error("no ground");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const ink = numbers(getComputedStyle(element).color).slice(0, 3);
    const [low, high] = [luminance(ink), luminance(ground(element))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(chat, scheme):
    """4.5 to 1, as the Web Content Accessibility Guidelines ask for (AA)."""
    chat.colours(scheme)
    for message in ("markdown", "think", "call", "break", "long"):
        chat.ask(message)
    chat.one("#settings-toggle").click()
    measured = chat.run(CONTRAST)
    chat.open(chat.address, "#engine")
    chat.until(lambda: chat.all(".card"), "the engine's figures")
    measured += chat.run(CONTRAST)
    chat.colours("")
    assert len(measured) > 100
    assert [entry for entry in measured if entry[0] < 4.5] == []


@pytest.mark.parametrize("view", ["", "#engine"])
def test_nothing_is_wider_than_a_phone(chat, view):
    chat.resize(PHONE)
    if view:
        chat.open(chat.address, view)
        chat.until(lambda: chat.all(".card"), "the engine's figures")
    else:
        for message in ("markdown", "script", "call", "w" * 300):
            chat.ask(message)
        chat.one("#settings-toggle").click()
        assert chat.one("#settings").rect["width"] == PHONE[0]
        chat.one("#settings-close").click()
    wider = chat.run(
        """
        return [...document.querySelectorAll("body *")].filter((element) =>
          element.checkVisibility() && !element.closest(".wide, pre, .hidden, svg") &&
          (element.getBoundingClientRect().right > innerWidth + 1 || element.getBoundingClientRect().left < -1)
        ).map((element) => element.outerHTML.slice(0, 200));
        """
    )
    assert wider == []
    assert chat.run("return document.documentElement.scrollWidth") == PHONE[0]


def test_engine_is_shown_and_followed(chat, server):
    chat.one("#to-engine").click()
    chat.until(lambda: chat.all(".card"), "the engine's figures")
    text = chat.text("#engine")
    for figure in (
        "63% of prompts",
        "80% accepted",
        "2.47 tokens a step",
        "9 of 12",
        "6 checkpoints",
        "140 of 384",
        "100 kept by the prefix cache",
        "244 free",
        "3.0 MiB of 1.0 GiB",
        "First token 31.2 ms 250 ms 1.5 s",
        "Each further token 4.1 ms 6.0 ms 9.0 ms",
        "Draft 1\n90%",
        "Ended: length 3",
        "1 h 2 min",
        "wait for the device\n60.0 s",
    ):
        assert figure in text
    assert "Requests at once, at most 8" in text
    chat.one("#panels summary").click()
    assert "decode_buckets 1, 8" in chat.text("#panels details")
    assert chat.one("#engine .cells").find_elements("css selector", "i.a, i.c") != []
    before = dict(STATS)
    try:
        later = {"uptime": STATS["uptime"] + 2, "num_output_tokens": STATS["num_output_tokens"] + 500, "num_running": 1}
        server.stats.update(later)
        chat.until(lambda: "250 tokens/s" in chat.text("#cards"), "the rate of output")
        assert "1 running, 5 waiting" in chat.text("#cards")
        # What was unfolded stays so.
        assert "decode_buckets 1, 8" in chat.text("#panels details")
    finally:
        server.stats.update(before)


def test_engine_is_asked_only_while_looked_at(page):
    scripted = Scripted(stats=dict(STATS))
    asked = []
    scripted.app.middleware("http")(lambda request, call_next: (asked.append(request.url.path), call_next(request))[1])
    with serving(scripted.app) as address:
        page.open(address)
        page.until(lambda: page.text("#model-name") == "scripted", "the model's name")
        assert "/server_info" not in asked
        page.one("#to-engine").click()
        page.until(lambda: asked.count("/server_info") >= 2, "figures twice")
        page.one("#to-chat").click()
        asked.clear()
        time.sleep(1.5)
        assert "/server_info" not in asked
    page.one("#to-engine").click()
    page.until(lambda: page.one("#engine-wrong").is_displayed(), "the complaint")
    assert page.text("#engine-wrong").startswith("The server does not answer. What is shown is of ")
    assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in page.complaints())


def test_server_that_starts_is_waited_for(page):
    scripted = Scripted()
    scripted.is_ready = False
    with serving(scripted.app) as address:
        page.open(address)
        page.until(lambda: page.text("#model-name") == "the server is starting", "what the server says")
        scripted.is_ready = True
        page.until(lambda: page.text("#model-name") == "scripted", "the model's name")
        assert all("503 (Service Unavailable)" in complaint for complaint in page.complaints())


def test_key_is_asked_for_used_and_not_kept(page):
    scripted = Scripted(key=KEY, stats=STATS)
    with serving(scripted.app) as address:
        page.open(address)
        page.until(lambda: page.one("#key-form").is_displayed(), "the question for a key")
        page.one("#key").send_keys("wrong\n")
        page.until(lambda: page.text("#key-hint") == "That key was refused.", "the refusal")
        page.one("#key").clear()
        page.one("#key").send_keys(KEY + "\n")
        page.until(lambda: page.text("#model-name") == "scripted", "the model's name")
        assert not page.one("#key-form").is_displayed()
        assert page.ask("hello").find_element("css selector", ".prose").text == "You said: hello"
        page.one("#to-engine").click()
        page.until(lambda: page.all(".card"), "the engine's figures")
        assert page.run("return Object.values(localStorage).join()") == ""
        assert all("401 (Unauthorized)" in complaint for complaint in page.complaints())

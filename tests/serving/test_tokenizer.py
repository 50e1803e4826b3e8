"""Loading, chats, forbidden words and generation defaults."""

import itertools
import json
import socket

import pytest

from gdnjax.assets import model_directory
from gdnjax.sampling_params import MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from gdnjax.serving.tokenizer import GenerationDefaults, Tokenizer, load_generation_defaults, text_messages
from tests.make_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.from_directory(directory)


def user(content):
    return [{"role": "user", "content": content}]


def test_encode_decode_round_trip(tokenizer):
    text = "The dog 你好 🚀🚀, zwölf\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_properties_come_from_the_files(tokenizer):
    assert tokenizer.vocab_size == 400
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.hf.eos_token == "<|im_end|>"


def test_special_tokens_are_skipped_on_request(tokenizer):
    ids = [1, *tokenizer.encode("dog"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "dog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>dog<|im_end|>"


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("dog"), 400, 250_000]) == "dog"


def test_helper_gives_the_asked_vocabulary_or_raises(tmp_path):
    write_tokenizer(tmp_path, 512)
    assert Tokenizer.from_directory(tmp_path).vocab_size == 512
    with pytest.raises(ValueError, match="vocab_size=100 cannot be had"):
        write_tokenizer(tmp_path, 100)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_loading_beside_a_model_config_needs_no_network(tmp_path, monkeypatch, tokenizer, model_type):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "One request, 你好"
    assert Tokenizer.from_directory(str(tmp_path)).encode(text) == tokenizer.encode(text)


def test_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer here; expected one of tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such directory"):
        Tokenizer.from_directory(tmp_path / "absent")


def test_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        Tokenizer.from_directory(tmp_path)


def test_chat_template_gives_the_written_prompt(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert ids == tokenizer.encode(prompt)
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(prompt + "<|im_start|>assistant\n")


def test_chat_template_takes_keyword_arguments(tokenizer):
    ids = tokenizer.apply_chat_template(user("Hi"), enable_thinking=False)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("question", ["Hi", "0", "  0", [{"type": "text", "text": "0 1"}]])
def test_chat_with_another_question_parts_where_the_question_begins(tokenizer, question):
    system = [{"role": "system", "content": "Be brief."}]
    chat = tokenizer.apply_chat_template([*system, *user(question), {"role": "assistant", "content": "Yes"}])
    other = tokenizer.with_another_question([*system, *user(question)])
    common = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chat, other, strict=False))]
    assert tokenizer.decode(common, skip_special_tokens=False).rstrip() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    assert tokenizer.with_another_question(system) == []


def test_text_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "dog"}]
    assert tokenizer.apply_chat_template(user(parts)) == tokenizer.apply_chat_template(user("The dog"))


def test_messages_are_not_changed_and_keep_other_keys():
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert text_messages(messages) == [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    assert messages[0]["content"] is None


@pytest.mark.parametrize(
    ("kind", "what"), [("image_url", "images"), ("image", "images"), ("video", "videos"), ("input_audio", "audio")]
)
def test_media_parts_are_errors(tokenizer, kind, what):
    messages = [*user("Hi"), *user([{"type": "text", "text": "see"}, {"type": kind, kind: "x"}])]
    with pytest.raises(ValueError, match=rf"text only: messages\[1\]\['content'\]\[1\].*{kind}.*{what}.*not supported"):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        (None, "non-empty list"),
        (["Hi"], r"messages\[0\] must be a dictionary"),
        ([*user("Hi"), {"content": "Hi"}], r"messages\[1\] has no 'role'"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "assistant"}], r"messages\[0\] has no 'content'"),
        ([{"role": "user", "tool_calls": [{}]}], r"messages\[0\] has no 'content'"),
        ([{"role": "", "content": "Hi"}], r"messages\[0\]\['role'\] must be a non-empty string"),
        (user(None), r"messages\[0\]\['content'\] must be a string or a list of text parts"),
        (user(3), r"messages\[0\]\['content'\] must be a string or a list of text parts"),
        (user(["Hi"]), r"messages\[0\]\['content'\]\[0\] must be a dictionary with a 'type'"),
        (user([{"text": "Hi"}]), r"messages\[0\]\['content'\]\[0\] must be a dictionary with a 'type'"),
        (user([{"type": "refusal"}]), r"unknown type 'refusal'; allowed: \{'type': 'text'"),
        (user([{"type": "text"}]), "'text' must be a string, got None"),
        ([*user("Hi"), *user("a\ud83d")], r"messages\[1\]\['content'\] is no valid text: .* is a lone surrogate"),
    ],
)
def test_malformed_messages_are_errors(messages, message):
    with pytest.raises(ValueError, match=message):
        text_messages(messages)


def test_missing_chat_template_says_what_to_do(directory):
    plain = Tokenizer.from_directory(directory)
    plain.hf.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template; give the prompt as text, or put .*chat_template.jinja"):
        plain.apply_chat_template(user("Hi"))


def test_refusal_of_the_template_is_passed_on(directory):
    strict = Tokenizer.from_directory(directory)
    strict.hf.chat_template = "{{ raise_exception('system message must come first') }}"
    with pytest.raises(ValueError, match=r"the chat template fails at messages\[0\]: system message must come first"):
        strict.apply_chat_template(user("Hi"))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('what?') }}{% endif %}{% endfor %}",
            "what",
        ),
        ("{% for m in messages %}{{ m.name.first + 1 if m.role == 'bad' }}{% endfor %}", "has no attribute 'name'"),
        ("{% for m in messages %}{{ (1, 2)[m.place] + 'a' if m.role == 'bad' }}{% endfor %}", "unsupported operand"),
        ("{% for m in messages %}{{ 1 // 0 if m.role == 'bad' }}{% endfor %}", "integer division"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_failure_of_a_template_names_the_message(directory, template, error, place):
    """Whatever it raises: an error of its own, an undefined name, an error of Python."""
    strict = Tokenizer.from_directory(directory)
    strict.hf.chat_template = template
    messages = user("Hi") * 5
    messages[place] = {"role": "bad", "content": "Hi", "place": 1}
    with pytest.raises(ValueError, match=rf"the chat template fails at messages\[{place}\]: .*{error}"):
        strict.render_chat(messages)


def test_template_that_is_none_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"the chat template cannot be read: .*tag"):
        tokenizer.render_chat(user("Hi"), chat_template="{% nonsense %}")


def test_keyword_that_the_template_does_not_know_is_named(tokenizer):
    """A variable that the template sets or loops over is none of its keywords."""
    message = "neither the chat template nor chat knows 'enable_thnking', 'tools'; the template knows 'enable_thinking'"
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat(user("Hi"), enable_thnking=False, tools=[])
    for name in ("message", "raise_exception", "range"):
        with pytest.raises(ValueError, match=f"knows '{name}'"):
            tokenizer.render_chat(user("Hi"), **{name: 1})
    assert "Hi" in tokenizer.render_chat(user("Hi"), chat_template="{{ messages[0].content + a }}", a="!")


def test_keywords_of_the_embedded_template_are_known():
    tokenizer = Tokenizer.from_directory(model_directory("tiny"))
    assert '{"type": "function"}' in tokenizer.render_chat(user("Hi"), tools=[{"type": "function"}])


OPENAI = [
    *user("What is 2 + 3?"),
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "ü"}'}},
            {"name": "stop", "arguments": ""},
        ],
    },
    {"role": "tool", "content": "5", "tool_call_id": "1"},
]
"""As OpenAI's clients send them: no content beside tool calls, arguments as text."""


def test_messages_of_openai_s_clients_are_taken():
    before = json.dumps(OPENAI)
    _, called, result = text_messages(OPENAI)
    assert called["content"] == ""
    first, second = called["tool_calls"]
    assert first == {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "ü"}}}
    assert second == {"name": "stop", "arguments": {}}
    assert result["content"] == "5"
    assert json.dumps(OPENAI) == before
    dumped = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    assert text_messages([dumped]) == [dumped | {"content": ""}]
    template = "{% for c in messages[1].tool_calls %}{% if c.function %}{% for k, v in c.function.arguments | items %}"
    template += "{{ k }}={{ v }};{% endfor %}{% endif %}{% endfor %}"
    tokenizer = Tokenizer.from_directory(model_directory("tiny"))
    assert tokenizer.render_chat(OPENAI, chat_template=template) == "a=2;b=ü;"


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("add", r"messages\[1\]\['tool_calls'\] must be a list of tool calls, got 'add'"),
        (["add"], r"messages\[1\]\['tool_calls'\]\[0\] must be a dictionary, got 'add'"),
        ([{"function": "add"}], r"\['tool_calls'\]\[0\]\['function'\] must be a dictionary, got 'add'"),
        ([{"function": {"arguments": "{a"}}], r"\['function'\]\['arguments'\] is not JSON: .*got '\{a'"),
        ([{"function": {"arguments": "[1]"}}], r"messages\[1\].*\['arguments'\] must be an object, got '\[1\]'"),
        ([{"arguments": 3}], r"messages\[1\]\['tool_calls'\]\[0\]\['arguments'\] must be an object, got 3"),
    ],
)
def test_malformed_tool_calls_are_named(calls, message):
    with pytest.raises(ValueError, match=message):
        text_messages([*user("Hi"), {"role": "assistant", "content": "", "tool_calls": calls}])


def test_half_a_character_in_a_call_is_named():
    """Escaped, as JSON may have it; tokenizers raise a TypeError that tells nothing."""
    tokenizer = Tokenizer.from_directory(model_directory("tiny"))
    call = {"function": {"name": "add", "arguments": '{"a": "\\ud83d"}'}}
    messages = [*user("Hi"), {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ValueError, match=r"fails at messages\[1\]: what it gives is no valid text: .*lone surrogate"):
        tokenizer.apply_chat_template(messages)


def test_long_text_prints_no_warning(tokenizer, caplog):
    """Whether it is too long is the engine's to say."""
    tokenizer.hf.model_max_length = 5
    try:
        with caplog.at_level("WARNING"):
            assert len(tokenizer.encode("a b c d e f g h")) > 5
            assert len(tokenizer.apply_chat_template(user("a b c d e f"))) > 5
    finally:
        tokenizer.hf.model_max_length = 10**9
    assert not caplog.records


def test_bad_words_are_forbidden_with_and_without_space(tokenizer):
    sequences = tokenizer.bad_word_sequences(["dog", " dog", "xq"])
    assert [tokenizer.decode(sequence) for sequence in sequences] == ["dog", " dog", "xq", " xq"]


@pytest.mark.parametrize("word", ["Supercalifragilistic", " "])
def test_bad_word_of_a_wrong_length_is_an_error(tokenizer, word):
    with pytest.raises(ValueError, match=rf"bad word '{word}'.*allowed: 1 to {MAX_BAD_WORD_TOKENS}"):
        tokenizer.bad_word_sequences(["dog", word])


def test_as_many_words_as_are_allowed_fit_the_device(tokenizer):
    words = [f"{first}{second}" for first in "qxzvQXZV" for second in "jkwy"]
    assert len(words) == MAX_BAD_WORDS
    assert len(SamplingParams(bad_words=words).bad_words) == MAX_BAD_WORDS
    assert len(tokenizer.bad_word_sequences(words)) == MAX_BAD_SEQUENCES


def write_generation_config(directory, config):
    (directory / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def test_generation_defaults_are_read(tmp_path):
    config = {"eos_token_id": [7, 8], "temperature": 1, "top_k": 20, "min_p": None, "max_new_tokens": 300, "x": 1}
    write_generation_config(tmp_path, config)
    sampling = {"temperature": 1.0, "top_k": 20, "max_tokens": 300}
    expected = GenerationDefaults(eos_token_ids=(7, 8), sampling=sampling)
    assert load_generation_defaults(tmp_path) == expected


def test_generation_defaults_without_sampling_are_greedy(tmp_path):
    write_generation_config(tmp_path, {"eos_token_id": 7, "do_sample": False, "temperature": 0.6})
    assert load_generation_defaults(tmp_path) == GenerationDefaults((7,), {"temperature": 0.0})


def test_generation_defaults_may_be_absent(tmp_path):
    assert load_generation_defaults(tmp_path) == GenerationDefaults((), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "expected a JSON object, got list"),
        ({"eos_token_id": "7"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [7, -1]}, "eos_token_id must be a token id"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": 3}, r"top_p must be a finite number in \(0, 1\], got 3"),
    ],
)
def test_malformed_generation_config_is_named(tmp_path, config, message):
    write_generation_config(tmp_path, config)
    with pytest.raises(ValueError, match=rf"generation_config.json: {message}"):
        load_generation_defaults(tmp_path)

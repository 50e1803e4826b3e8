"""Streamed text: whole characters, no part of a stop string, the same however the tokens arrive."""

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.detokenizer import WINDOW, Detokenizer
from gdnjax.serving.tokenizer import Tokenizer
from tests.make_tokenizer import SENTENCES, write_tokenizer

VOCAB_SIZE = 400

# Whole words of the training sentences besides anything at all, so that merges across characters occur.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")), st.sampled_from(SENTENCES)
    )
).map("".join)
TOKENS = st.lists(st.one_of(st.integers(0, VOCAB_SIZE + 10), st.integers(128, 258)), max_size=80)
CUTS = st.lists(st.integers(1, 7), min_size=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, VOCAB_SIZE)
    return Tokenizer.from_directory(path)


def chunked(ids, cuts):
    """The ids in runs, whose lengths are the cuts, repeated."""
    start = 0
    while start < len(ids):
        for cut in cuts:
            yield ids[start : start + cut]
            start += cut


def stream(tokenizer, ids, params=None, cuts=(1,)):
    """The detokeniser after all the ids, and the pieces that it gave."""
    detokenizer = Detokenizer(tokenizer, params or SamplingParams())
    pieces = [detokenizer.append(run) for run in chunked(ids, cuts)]
    return detokenizer, [*pieces, detokenizer.finish()]


@settings(derandomize=True, deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_streamed_text_equals_full_decode(tokenizer, text, cuts):
    ids = tokenizer.encode(text)
    detokenizer, pieces = stream(tokenizer, ids, cuts=cuts)
    assert "".join(pieces) == detokenizer.text == tokenizer.decode(ids)
    assert "\ufffd" not in detokenizer.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.num_tokens_kept == len(ids)
    assert detokenizer.num_characters == len(detokenizer.text)


@settings(derandomize=True, deadline=None)
@given(text=TEXTS, cuts=CUTS, start=st.integers(0, 50), reads=st.integers(1, 5))
def test_text_since_a_character_is_the_rest_of_the_text(tokenizer, text, cuts, start, reads):
    """Whether the whole text was asked for in between or not."""
    detokenizer, shown = Detokenizer(tokenizer, SamplingParams()), ""
    for number, run in enumerate(chunked(tokenizer.encode(text), cuts)):
        detokenizer.append(run)
        shown += detokenizer.text_since(len(shown))
        if number % reads == 0:
            assert detokenizer.text == shown
    detokenizer.finish()
    shown += detokenizer.text_since(len(shown))
    assert shown == detokenizer.text
    assert detokenizer.text_since(start) == shown[start:]
    assert detokenizer.text_since(detokenizer.num_characters) == ""


def test_text_since_a_negative_character_is_refused(tokenizer):
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        Detokenizer(tokenizer, SamplingParams()).text_since(-1)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ids=TOKENS, cuts=CUTS, skip=st.booleans())
def test_arbitrary_tokens_stream_as_they_decode(tokenizer, ids, cuts, skip):
    _, pieces = stream(tokenizer, ids, SamplingParams(skip_special_tokens=skip), cuts)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_character_of_many_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("𓀀")
    assert len(ids) == 4
    _, pieces = stream(tokenizer, ids)
    assert pieces == ["", "", "", "𓀀", ""]


def test_silent_tokens_do_not_break_a_character(tokenizer):
    first, *rest = tokenizer.encode("𓀀")
    ids = [*tokenizer.encode("dog"), first, *[VOCAB_SIZE + 5, 0] * (3 * WINDOW), *rest]
    _, pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "dog𓀀"


def test_unfinished_character_is_flushed_as_replacement(tokenizer):
    ids = tokenizer.encode("dog𓀀")[:-1]
    _, pieces = stream(tokenizer, ids)
    assert "".join(pieces[:-1]) == "dog"
    assert pieces[-1] == "\ufffd"


def test_special_tokens_show_where_they_are_wanted(tokenizer):
    ids = [1, *tokenizer.encode("dog"), 2]
    assert stream(tokenizer, ids)[0].text == "dog"
    assert stream(tokenizer, ids, SamplingParams(skip_special_tokens=False))[0].text == "<|im_start|>dog<|im_end|>"


def word_tokenizer(vocabulary, decoder):
    """A tokenizer whose decoder treats the first token otherwise than the ones after it."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoder
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


def test_decoder_that_drops_the_first_space_keeps_the_others():
    spaced = word_tokenizer(["?", "▁the", "▁dog", "s"], decoders.Metaspace())
    ids = [1, 2, 3, 2] * (2 * WINDOW + 1)
    _, pieces = stream(spaced, ids)
    assert pieces[:5] == ["the", " dog", "s", " dog", " the"]
    assert "".join(pieces) == spaced.decode(ids)


def test_byte_fallback_decoder_waits_for_the_character():
    words = ["?", "▁a", *(f"<0x{byte:02X}>" for byte in "你🚀".encode())]
    fallback = word_tokenizer(words, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    _, pieces = stream(fallback, [1, 2, 3, 4, 1, 5, 6, 7, 8])
    assert pieces == ["a", "", "", "你", " a", "", "", "", "🚀", ""]


def test_stop_string_across_tokens_cuts_the_text(tokenizer):
    ids = tokenizer.encode("The dog jumps high")
    detokenizer, pieces = stream(tokenizer, ids, SamplingParams(stop="g ju"))
    assert detokenizer.text == "".join(pieces) == "The do"
    assert detokenizer.stop_reason == "g ju"
    kept = detokenizer.num_tokens_kept
    assert "g ju" in tokenizer.decode(ids[:kept])
    assert "g ju" not in tokenizer.decode(ids[: kept - 1])


def test_stop_string_inside_an_accepted_run_ignores_the_rest(tokenizer):
    ids = tokenizer.encode("The dog jumps high")
    alone, _ = stream(tokenizer, ids, SamplingParams(stop="jum"))
    run, pieces = stream(tokenizer, ids, SamplingParams(stop="jum"), cuts=[len(ids)])
    assert run.num_tokens_kept == alone.num_tokens_kept < len(ids)
    assert pieces == ["The dog ", ""]


def test_stop_string_is_included_on_request(tokenizer):
    ids = tokenizer.encode("The dog jumps high")
    detokenizer, _ = stream(tokenizer, ids, SamplingParams(stop="g ju", include_stop_str_in_output=True))
    assert detokenizer.text == "The dog ju"


def test_included_stop_string_is_not_held_back(tokenizer):
    ids = [token for letter in "xqz" for token in tokenizer.encode(letter)]
    _, pieces = stream(tokenizer, ids, SamplingParams(stop="qzk", include_stop_str_in_output=True))
    assert pieces == ["x", "q", "z", ""]


def test_begun_stop_string_is_held_back_and_flushed(tokenizer):
    ids = [token for letter in "aab" for token in tokenizer.encode(letter)]
    _, pieces = stream(tokenizer, ids, SamplingParams(stop="abc"))
    assert pieces == ["", "a", "", "ab"]


def test_overlapping_beginnings_of_a_stop_string_are_all_tried(tokenizer):
    ids = [token for letter in "aaabz" for token in tokenizer.encode(letter)]
    detokenizer, pieces = stream(tokenizer, ids, SamplingParams(stop="aab"))
    assert pieces == ["", "", "a", "", "", ""]
    assert (detokenizer.stop_reason, detokenizer.num_tokens_kept) == ("aab", 4)


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        (["og", "do"], "The ", "do"),
        (["ox", "dog"], "The ", "dog"),
        (["o", "og", "dog"], "The d", "o"),
        (["og", "dog"], "The ", "dog"),
    ],
)
def test_earliest_stop_string_wins(tokenizer, stops, text, reason):
    for ids in (tokenizer.encode("The dog"), [token for letter in "The dog" for token in tokenizer.encode(letter)]):
        detokenizer, _ = stream(tokenizer, ids, SamplingParams(stop=stops))
        assert (detokenizer.text, detokenizer.stop_reason) == (text, reason)


def first_stop_by_definition(text, stops):
    """Grows the text by characters until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return max(found, key=len), end
    return None, len(text)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    text=st.text("abc你🚀", max_size=40),
    stops=st.lists(st.text("abc你🚀", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=CUTS,
    include=st.booleans(),
)
def test_stop_strings_cut_as_the_definition_says(tokenizer, text, stops, cuts, include):
    ids = tokenizer.encode(text)
    detokenizer, pieces = stream(tokenizer, ids, SamplingParams(stop=stops, include_stop_str_in_output=include), cuts)
    reason, end = first_stop_by_definition(text, stops)
    expected = text if reason is None else text[: end if include else end - len(reason)]
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stop_reason == reason
    if reason is not None:
        assert len(tokenizer.decode(ids[: detokenizer.num_tokens_kept])) >= end
        assert not tokenizer.decode(ids[: detokenizer.num_tokens_kept - 1]).startswith(text[:end])


def test_stop_strings_before_min_tokens_are_let_pass(tokenizer):
    ids = [token for letter in "ababab" for token in tokenizer.encode(letter)]
    detokenizer, _ = stream(tokenizer, ids, SamplingParams(stop="ab", min_tokens=3))
    assert (detokenizer.text, detokenizer.num_tokens_kept) == ("ab", 4)
    detokenizer, _ = stream(tokenizer, ids, SamplingParams(stop="ab", min_tokens=2))
    assert (detokenizer.text, detokenizer.num_tokens_kept) == ("", 2)


def test_stop_string_let_pass_inside_a_begun_one_is_not_found_later(tokenizer):
    ids = [token for letter in "abx" for token in tokenizer.encode(letter)]
    detokenizer, _ = stream(tokenizer, ids, SamplingParams(stop=["b", "abc"], min_tokens=3))
    assert (detokenizer.text, detokenizer.stop_reason) == ("abx", None)


def test_long_output_costs_a_bounded_window(tokenizer, monkeypatch):
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip))
    ids = tokenizer.encode("你好 the dog 🚀 " * 50)
    stream(tokenizer, ids)
    assert max(lengths) <= 2 * WINDOW
    assert len(lengths) <= 1.2 * len(ids)


def test_closed_text_takes_no_more_tokens(tokenizer):
    detokenizer, _ = stream(tokenizer, [10])
    assert detokenizer.finish() == ""
    with pytest.raises(RuntimeError, match="after finish"):
        detokenizer.append([10])


def test_without_tokenizer_there_is_no_text():
    detokenizer, pieces = stream(None, [5, 6, 7])
    assert pieces == ["", "", "", ""]
    assert (detokenizer.text, detokenizer.stop_reason, detokenizer.num_tokens_kept) == ("", None, 3)


def test_without_tokenizer_stop_strings_are_an_error():
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        Detokenizer(None, SamplingParams(stop="x"))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(ids=TOKENS, more=TOKENS, sentences=st.integers(0, len(SENTENCES)), special=st.booleans())
def test_deferred_text_equals_streamed_text(tokenizer, ids, more, sentences, special):
    """Whatever the tokens, broken characters among them, and wherever somebody looks at it."""
    params = SamplingParams(skip_special_tokens=special)
    ids = [*ids, *tokenizer.encode("".join(SENTENCES[:sentences])), *more]
    streamed, _ = stream(tokenizer, ids, params)
    for look in (None, len(ids) // 3):
        deferred = Detokenizer(tokenizer, params)
        deferred.defer()
        for count, token in enumerate(ids):
            assert deferred.append([token]) == ""
            if count == look:
                assert streamed.text.startswith(deferred.text)
        deferred.finish()
        assert (deferred.text, deferred.num_tokens_kept) == (streamed.text, streamed.num_tokens_kept)


def test_deferred_text_is_made_many_tokens_at_once(tokenizer, monkeypatch):
    decode, calls = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda *given: calls.append(None) or decode(*given))
    deferred = Detokenizer(tokenizer, SamplingParams()).fresh()
    deferred.defer()
    ids = tokenizer.encode("".join(SENTENCES) * 5)
    for token in ids:
        deferred.append([token])
    assert not calls
    assert deferred.fresh().append(ids) == ""
    deferred.finish()
    assert deferred.text == "".join(SENTENCES) * 5
    assert 0 < len(calls) < len(ids) / 10


def test_stop_strings_are_found_as_they_come_though_text_is_deferred(tokenizer):
    ids = tokenizer.encode(SENTENCES[0])
    deferred = Detokenizer(tokenizer, SamplingParams(stop=[SENTENCES[0][3:6]]))
    deferred.defer()
    for token in ids:
        deferred.append([token])
    assert deferred.stop_reason == SENTENCES[0][3:6]


def test_text_that_cannot_be_made_fails_once(tokenizer, monkeypatch):
    """Who finishes it is told; who reads it then gets what there is, so that others' outputs are to be had."""
    deferred = Detokenizer(tokenizer, SamplingParams())
    deferred.defer()
    deferred.append(tokenizer.encode(SENTENCES[0]))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            deferred.finish()
    assert deferred.text == ""

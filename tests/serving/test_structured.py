"""Structured output: masks by definition, and an engine that draws by them, whatever happens to its requests."""

import collections
import dataclasses
import functools
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, EngineConfig, SamplingParams, StructuredOutputsParams, build_model, full_logits
from gdnjax.serving.parsing import THINK_CLOSE, THINK_OPEN
from gdnjax.serving.structured import Grammars, masks_of
from tests.draws import IMPOSSIBLE, fit, softmax
from tests.micro import MICRO, SHALLOW, shallow_params, spread
from tests.serving.structures import EOS, SPECIAL, tokenizer_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def ids(text: str, tags: bool = True) -> list[int]:
    return tokenizer_of(tags).encode(text, add_special_tokens=False)


@functools.cache
def grammars_of(tags: bool = True) -> Grammars:
    return Grammars(tokenizer_of(tags), MICRO.vocab_size)


def structured(**structure) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**structure))


def matcher_of(prompt: str = "no", tags: bool = True, stops=(EOS,), **structure):
    return grammars_of(tags).matcher(structured(**structure), ids(prompt, tags), stops)


def tokens_in(mask) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


TEXTS = ("no", "nothing", "north", "north 10", "yes", "yesterday", "ab", "abc", "é", "10", "12", "[a, b]")


def bytes_of(token: int) -> bytes:
    """Of a token alone, which may be a part of a character."""
    letters = {chr(code): byte for byte, code in _byte_codes().items()}
    return bytes(letters[letter] for letter in tokenizer_of().hf.convert_ids_to_tokens(token))


@functools.cache
def _byte_codes() -> dict[int, int]:
    """GPT-2's: which character stands for a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return dict(zip([*plain, *others], [*plain, *range(256, 256 + len(others))], strict=True))


def test_masks_are_those_of_a_brute_force_over_the_vocabulary():
    """Every token is tried behind everything that can be produced: it is allowed where some text goes on with it, but
    where the grammar forces what comes next; there one way to write that is enough. And all of the texts can be
    produced.
    """
    words = [text.encode() for text in TEXTS]
    texts = {token: bytes_of(token) for token in range(len(SPECIAL), tokenizer_of().vocab_size - 2)}
    produced, forced, free = set(), 0, 0
    waiting = [([], b"")]
    while waiting:
        tokens, behind = waiting.pop()
        matcher = matcher_of(choice=TEXTS)
        matcher.follow(tokens)
        found = tokens_in(matcher.mask())
        rest = [word[len(behind) :] for word in words if word.startswith(behind)]
        assert matcher.may_end == (EOS in found) == (b"" in rest)
        assert matcher.is_complete == (rest == [b""])
        produced |= {behind} if matcher.may_end else set()
        found.discard(EOS)
        expected = {token for token, text in texts.items() if any(word.startswith(text) for word in rest)}
        if b"" not in rest and len({word[0] for word in rest}) == 1:
            assert found
            assert found <= expected
            forced += 1
        else:
            assert found == expected
            free += 1
        waiting += [([*tokens, token], behind + texts[token]) for token in found]
    assert produced == set(words)
    assert (forced > 5, free > 10) == (True, True)


def test_masks_of_several_are_those_of_each():
    matchers = [
        matcher_of(choice=TEXTS),
        matcher_of(regex="[0-9]+"),
        matcher_of(prompt=THINK_OPEN, regex="a"),
        matcher_of(regex="(?:)"),
    ]
    for mask, matcher in zip(masks_of(matchers), matchers, strict=True):
        np.testing.assert_array_equal(mask, matcher.mask())
    assert len({mask.tobytes() for mask in masks_of(matchers)}) == 4


def test_state_is_a_function_of_the_tokens_that_were_followed():
    """Whatever way they came; and a call that was cut off leaves nothing behind."""
    way = ids("[12, 10]")
    fresh = [matcher_of(regex=r"\[([0-9]+, )*[0-9]+\]") for _ in way]
    for count, matcher in enumerate(fresh):
        matcher.follow(way[:count])
    one = matcher_of(regex=r"\[([0-9]+, )*[0-9]+\]")
    take, taken = one._take, []

    def cut_off(token):
        take(token)
        taken.append(token)
        if len(taken) == 2:
            raise KeyboardInterrupt

    for count in (0, 3, 3, 1, 4, 2, len(way) - 1, 0):
        one.follow(way[:count])
        np.testing.assert_array_equal(one.mask(), fresh[count].mask())
    one._take = cut_off
    with pytest.raises(KeyboardInterrupt):
        one.follow(way[:4])
    one._take = take
    one.follow(way[:4])
    np.testing.assert_array_equal(one.mask(), fresh[4].mask())
    other = one.fresh()
    np.testing.assert_array_equal(other.mask(), fresh[0].mask())


OPEN, CLOSE = (tokenizer_of().token_of(tag) for tag in (THINK_OPEN, THINK_CLOSE))


@pytest.mark.parametrize("tags", [True, False], ids=["tags are tokens", "tags are text"])
def test_grammar_begins_behind_thinking(tags):
    """That of the prompt: anything but an end may be drawn until the tag that closes it."""
    prompt, plain = f"<|im_start|>no\n{THINK_OPEN}\n", matcher_of(regex="[0-9]+", tags=tags)
    matcher = matcher_of(prompt, tags=tags, regex="[0-9]+")
    way = ids(f"yes no 10 < /think {THINK_CLOSE}", tags)
    for count in range(len(way)):
        matcher.follow(way[:count])
        assert tokens_in(matcher.mask()) == set(range(MICRO.vocab_size)) - {EOS}
        assert not matcher.may_end
        assert not matcher.is_complete
    matcher.follow(way)
    np.testing.assert_array_equal(matcher.mask(), plain.mask())
    more = ids("10", tags)
    matcher.follow([*way, *more])
    plain.follow(more)
    np.testing.assert_array_equal(matcher.mask(), plain.mask())
    assert matcher.may_end
    matcher.follow(way[:2])
    assert EOS not in tokens_in(matcher.mask())


@pytest.mark.parametrize(
    ("prompt", "may_open"),
    [
        ("<|im_start|>no\n", True),
        # It has been closed already, or this is no chat.
        (f"<|im_start|>no\n{THINK_OPEN}\n\n{THINK_CLOSE}\n\n", False),
        ("no north", False),
        (f"<|im_start|>no\n{THINK_OPEN}yes{THINK_CLOSE}no<|im_end|><|im_start|>yes\n<|im_end|><|im_start|>no\n", True),
    ],
)
def test_model_may_begin_with_thinking_where_a_chat_leaves_it_to_it(prompt, may_open):
    matcher, plain = matcher_of(prompt, regex="[0-9]+"), matcher_of("no", regex="[0-9]+")
    assert tokens_in(matcher.mask()) - tokens_in(plain.mask()) == ({OPEN} if may_open else set())
    if may_open:
        matcher.follow([OPEN])
        assert tokens_in(matcher.mask()) == set(range(MICRO.vocab_size)) - {EOS}
        matcher.follow([OPEN, *ids("no"), CLOSE])
        np.testing.assert_array_equal(matcher.mask(), plain.mask())
        # Once only, and first.
        digit = ids("1")
        matcher.follow(digit)
        assert OPEN not in tokens_in(matcher.mask())


def test_stop_tokens_are_allowed_where_the_grammar_may_end():
    """Those of the request alone: an end that it ignores is never drawn."""
    stop = ids("no")[0]
    matcher, ignoring = matcher_of(stops=(EOS, stop), regex="[0-9]{2,}"), matcher_of(stops=(), regex="[0-9]{2,}")
    for count in range(4):
        digits = ids("1") * count
        matcher.follow(digits)
        ignoring.follow(digits)
        assert tokens_in(matcher.mask()) & {EOS, stop} == ({EOS, stop} if count > 1 else set())
        assert EOS not in tokens_in(ignoring.mask())


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"regex": "[a"}, r"structured_outputs\.regex is no grammar: .*unclosed character class"),
        ({"regex": "(?=a)b"}, r"structured_outputs\.regex is no grammar: .*look-around"),
        ({"json": {"type": "objekt"}}, r"structured_outputs\.json is no grammar: Invalid type: objekt"),
        ({"json": {"not": {}}}, r"structured_outputs\.json is no grammar: .*not"),
        ({"json": {"enum": []}}, r"structured_outputs\.json is no grammar: Unsatisfiable"),
        ({"grammar": "start: foo"}, r"structured_outputs\.grammar is no grammar: .*unknown name"),
    ],
    ids=str,
)
def test_grammar_that_is_none_is_named(structure, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        matcher_of(**structure)


def test_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ValueError, match=r"needs llguidance, which is not installed: pip install 'gdnjax\[structured\]'"
    ):
        Grammars(tokenizer_of(), MICRO.vocab_size).matcher(structured(regex="a"), [5], ())


def test_grammars_are_compiled_once_and_dropped_when_they_are_many(monkeypatch):
    monkeypatch.setattr("gdnjax.serving.structured.MAX_GRAMMARS", 2)
    grammars = Grammars(tokenizer_of(), MICRO.vocab_size)
    for regex in ("a", "b", "a", "c"):
        grammars.matcher(structured(regex=regex), [5], ())
    assert [structure.regex for structure in grammars._compiled] == ["a", "c"]


def test_nobody_waits_for_the_grammar_of_another(monkeypatch):
    grammars = Grammars(tokenizer_of(), MICRO.vocab_size)
    grammars.matcher(structured(regex="a"), [5], ())
    begun, go_on = threading.Event(), threading.Event()
    compile_it = type(grammars._library).compile

    def slow(library, structure):
        begun.set()
        assert go_on.wait(30)
        return compile_it(library, structure)

    monkeypatch.setattr(type(grammars._library), "compile", slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(grammars.matcher, structured(regex="b"), [5], ())
        assert begun.wait(30)
        try:
            pool.submit(grammars.matcher, structured(regex="a"), [5], ()).result(timeout=30)
        finally:
            go_on.set()
        assert not waiting.result().may_end


# Engines.

CONFIG = EngineConfig(
    max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,), decode_buckets=(4,), num_kv_blocks=64,
    max_logprobs=3, warmup=False,
)  # fmt: skip
MAX_MODEL_LEN = 128
DRAFTS = {"num_speculative_tokens": 2}
REJECTION = {**DRAFTS, "draft_acceptance": "rejection"}


def engine_of(tp: int = 1, tokenizer=None, **options) -> LLM:
    config = dataclasses.replace(CONFIG, tensor_parallel_size=tp, **options)
    mtp = config.num_speculative_tokens > 0
    return LLM.from_model(
        build_model(SHALLOW, "float32", tp, mtp=mtp), spread(shallow_params(mtp), tp), config,
        max_model_len=MAX_MODEL_LEN,
        tokenizer=tokenizer or tokenizer_of(), eos_token_ids=(EOS,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    """Warmed up: nothing compiles in what follows."""
    with engine_of(warmup=True) as found:
        yield found


LIST = r"\[([0-9]{1,3}, )*[0-9]{1,3}\]"


def asking(regex: str = LIST, **values) -> SamplingParams:
    values = {"max_tokens": 60, "seed": 1} | values
    return SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex), **values)


PROMPTS = [ids(text) for text in ("no", "yes north", "south 10 ab", "abc cab [")]
KINDS = [
    asking(),
    asking("(ab|no){3,9}", temperature=0.0),
    asking("[0-9]{20}", top_k=3, top_p=0.9, logprobs=2, repetition_penalty=1.2),
    asking("[a-z ]{5,40}é", n=2, bad_words=["no"], logit_bias={ids("s")[0]: 2.0}),
]


def outputs_of(llm: LLM, prompts=PROMPTS, params=KINDS) -> list:
    return [[*output.outputs] for output in llm.generate(prompts, params, use_tqdm=False)]


def check(samples, params) -> None:
    for sample in samples:
        pattern = params.structured_outputs.regex
        whole = re.fullmatch(pattern, sample.text)
        assert whole if sample.finish_reason == "stop" else sample.finish_reason == "length"
        assert sample.stop_reason is None


def test_outputs_match_whatever_else_is_asked_for(llm):
    traces, found = llm.engine.num_compilations, outputs_of(llm)
    for samples, params in zip(found, KINDS, strict=True):
        check(samples, params)
        assert len({sample.text for sample in samples}) == params.n
    assert {sample.finish_reason for samples in found for sample in samples} >= {"stop"}
    assert all(ids("no")[0] not in sample.token_ids for sample in found[3])
    assert all(len(sample.logprobs) == len(sample.token_ids) for sample in found[2])
    assert outputs_of(llm) == found
    assert llm.engine.num_compilations == traces


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{**REJECTION, "tp": 2}, {**DRAFTS, "batch_invariant": True}], ids=str)
def test_other_engines_draw_the_same(llm, options):
    """With drafts, of which none is ever verified; by two ranks, whose parts end within a word; in invariant mode."""
    with engine_of(**options) as other:
        tokens = [[sample.token_ids for sample in samples] for samples in outputs_of(other)]
        assert tokens == [[sample.token_ids for sample in samples] for samples in outputs_of(llm)]
        stats = other.stats()["speculation"]
        assert (stats["num_draft_tokens"], stats["num_accepted_draft_tokens"]) == (0, 0)


def test_neighbours_draw_what_they_draw_without_them(llm):
    """And are not kept waiting: they move on in every turn."""
    others = [
        SamplingParams(max_tokens=40, seed=8, ignore_eos=True),
        SamplingParams(max_tokens=40, seed=9, top_k=5, ignore_eos=True),
    ]
    alone = [samples[0].token_ids for samples in outputs_of(llm, PROMPTS[:2], others)]
    turns = llm.engine.counters.num_turns
    both = outputs_of(llm, PROMPTS, [*others, *KINDS[:2]])
    assert [samples[0].token_ids for samples in both[:2]] == alone
    assert llm.engine.counters.num_turns - turns < 45
    for samples, params in zip(both[2:], KINDS[:2], strict=True):
        check(samples, params)
        assert samples == outputs_of(llm, [PROMPTS[KINDS.index(params) + 2]], params)[0]


def test_who_was_preempted_in_the_middle_goes_on_to_the_token(llm):
    (expected,), (other,) = outputs_of(llm, PROMPTS[:1], KINDS[2])[0], outputs_of(llm, PROMPTS[1:2], KINDS[0])[0]
    groups = [llm.submit(PROMPTS[0], KINDS[2]), llm.submit(PROMPTS[1], KINDS[0])]
    for _ in range(9):
        llm.step()
    for group in groups:
        assert 0 < len(group.requests[0].output_token_ids) < 20
        llm.engine.preempt(group.requests[0])
    while llm.step():
        pass
    assert [group.output().outputs[0].token_ids for group in groups] == [expected.token_ids, other.token_ids]
    assert [group.requests[0].num_preemptions for group in groups] == [1, 1]


@pytest.mark.parametrize("where", ["runner.dispatch", "runner.read", "scheduler.commit"])
def test_turn_that_is_cut_off_costs_no_request_its_place_in_the_grammar(llm, where, monkeypatch):
    (expected,) = outputs_of(llm, PROMPTS[:1], KINDS[2])[0]
    group = llm.submit(PROMPTS[0], KINDS[2])
    for _ in range(9):
        llm.step()
    part, name = where.split(".")
    owner = getattr(llm.engine, part)
    inner = getattr(owner, name)

    def outer(*arguments):
        inner(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, outer)
    # A turn that waits for what is in flight dispatches nothing.
    with pytest.raises(KeyboardInterrupt):
        llm.step() and llm.step()
    monkeypatch.undo()
    while llm.step():
        pass
    assert group.output().outputs[0].token_ids == expected.token_ids


def test_another_process_goes_on_to_the_token(llm, tmp_path):
    expected = outputs_of(llm, PROMPTS[:2], KINDS[2:4])
    groups = [llm.submit(prompt, params) for prompt, params in zip(PROMPTS[:2], KINDS[2:4], strict=True)]
    for _ in range(9):
        llm.step()
    llm.save_state(tmp_path / "state")
    llm.engine.abort(*[request for group in groups for request in group.requests])
    while llm.step():
        pass
    back = llm.restore(tmp_path / "state")
    assert all(request.output_token_ids for group in back for request in group.requests)
    while llm.step():
        pass
    found = [[sample.token_ids for sample in group.output().outputs] for group in back]
    assert found == [[sample.token_ids for sample in samples] for samples in expected]


def test_output_ends_with_its_grammar_whatever_should_end_it(llm):
    """Neither an end that is ignored nor a minimum that is not reached is waited for."""
    params = [asking("(no|yes)", ignore_eos=True), asking("(no|yes)", min_tokens=30), asking("(?:)", ignore_eos=True)]
    found = [samples[0] for samples in outputs_of(llm, PROMPTS[:3], params)]
    assert [(sample.text in ("no", "yes"), sample.finish_reason) for sample in found[:2]] == [(True, "stop")] * 2
    assert (found[2].text, found[2].finish_reason) == ("", "stop")
    # The last token that it may have.
    (two,) = outputs_of(llm, PROMPTS[:1], asking("[0-9]{2}", max_tokens=2))[0]
    assert (len(two.text), two.finish_reason) == (2, "stop")
    (one,) = outputs_of(llm, PROMPTS[:1], asking("[0-9]{2}", max_tokens=1, allowed_token_ids=ids("1")))[0]
    assert (one.text, one.finish_reason) == ("1", "length")


def test_what_nothing_satisfies_ends_with_an_error(llm):
    """Never as if it were not asked for."""
    (none,) = outputs_of(llm, PROMPTS[:1], asking("[0-9]{2}", allowed_token_ids=ids("n")))[0]
    assert (none.text, none.finish_reason) == ("", "error")
    assert none.stop_reason == "no token may be drawn: bans and masks forbid all of them"
    group = llm.submit(PROMPTS[0], KINDS[2])
    while len(group.requests[0].output_token_ids) < 5:
        llm.step()
    # As a grammar that has come to one of its limits.
    group.requests[0].matcher._matcher.consume_token(EOS)
    while llm.step():
        pass
    (sample,) = group.output().outputs
    assert sample.finish_reason == "error"
    assert "token" in sample.stop_reason


def test_grammar_without_a_tokenizer_is_refused_by_name():
    with LLM.from_model(build_model(SHALLOW, "float32"), shallow_params(), CONFIG, max_model_len=MAX_MODEL_LEN) as bare:
        number = bare.frontend.num_requests
        with pytest.raises(ValueError, match=r"prompt 0: structured_outputs needs a tokenizer"):
            bare.generate([[5, 6]], asking(), use_tqdm=False)
        assert bare.frontend.num_requests == number


@pytest.mark.short_cases("150")
@pytest.mark.parametrize("count", [150, 400])
def test_draws_are_the_models_own_among_what_is_allowed(llm, count):
    """Chi-square; the model's own distribution, and one that leaves out a token, must not fit."""
    prompt, regex = PROMPTS[1], "(no|yes|10|\\[|s)[a-z0-9]*"
    (samples,) = outputs_of(llm, [prompt], asking(regex, max_tokens=1, n=count))
    tokens = [sample.token_ids[0] for sample in samples]
    params = jax.tree.map(jnp.asarray, shallow_params())
    logits = np.asarray(full_logits(build_model(SHALLOW, "float32"), params, jnp.array(prompt)), np.float64)[-1]
    allowed = np.isin(np.arange(MICRO.vocab_size), list(tokens_in(matcher_of("yes north", regex=regex).mask())))
    probability = softmax(np.where(allowed, logits, -np.inf))
    assert 5 < allowed.sum() < 20
    assert fit(tokens, probability) > 1e-3
    assert fit(tokens, softmax(logits)) < IMPOSSIBLE
    without = np.where(np.arange(MICRO.vocab_size) == probability.argmax(), 0, probability)
    assert fit(tokens, without / without.sum()) < IMPOSSIBLE


def test_engine_thinks_first_where_the_prompt_says_so(llm):
    """Closed at once, or later: what is behind the tag matches."""
    prompt = ids(f"<|im_start|>no\n{THINK_OPEN}\n")
    lengths = collections.Counter()
    for bias in (100.0, 4.0):
        params = asking("[0-9]{3}", logit_bias={CLOSE: bias}, n=3, max_tokens=100)
        for sample in outputs_of(llm, [prompt], params)[0]:
            thoughts, answer = sample.text.split(THINK_CLOSE)
            assert sample.finish_reason == "stop"
            assert re.fullmatch("[0-9]{3}", answer)
            lengths[bool(thoughts)] += 1
    assert lengths.keys() == {True, False}


def test_requests_with_a_structure_go_in_step(llm):
    """Of four that begin at different times all decode in the same turns, so that none needs turns of its own."""
    groups, seen = [], set()
    dispatch = llm.engine.runner.dispatch

    def watched(plan):
        seen.add(frozenset(request.request_id for request in plan.decoding))
        return dispatch(plan)

    llm.engine.runner.dispatch = watched
    try:
        for number in range(4):
            groups.append(llm.submit(PROMPTS[number], asking("[0-9]{30}", seed=number)))
            llm.step()
            llm.step()
        seen.clear()
        for _ in range(8):
            llm.step()
    finally:
        llm.engine.runner.dispatch = dispatch
    assert seen == {frozenset(group.request_id for group in groups)}
    llm.engine.abort(*[request for group in groups for request in group.requests])
    assert not llm.step()
    assert isinstance(jax.device_get(llm.engine.runner.state.masks), np.ndarray)

"""The public API: what users call, what they get, and what happens to whatever is wrong."""

import asyncio
import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import pickle
import shutil
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gdnjax import LLM, AsyncLLM, EngineConfig, RequestOutput, SamplingParams, StreamOutput, full_logits
from gdnjax.serving import engine as engine_module
from gdnjax.serving import frontend as frontend_module
from gdnjax.serving import llm as llm_module
from gdnjax.serving import metrics as metrics_module
from gdnjax.serving import runner as runner_module
from gdnjax.serving import scheduler as scheduler_module
from gdnjax.serving import submission as submission_module
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.scheduler import NOTHING_ALLOWED
from tests.make_tokenizer import write_tokenizer
from tests.models.test_parity import GOLDENS
from tests.pools import pool_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

VOCAB, EOS = 307, 305
IM_END = 2
"""The tokenizer's own EOS, which the files beside it do not name."""

SEVEN = 25
"""The token of "7" in the tokenizer of these tests."""

MAX_MODEL_LEN = 192

OPTIONS = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "block_size": 16,
    "max_model_len": MAX_MODEL_LEN,
    "num_kv_blocks": 20,
    # One size of each step: tokens are then the same, bit for bit, alone and in a batch, and little is compiled.
    "prefill_buckets": (128,),
    "decode_buckets": (4,),
    "max_logprobs": 5,
    "warmup": False,
}

TEXT = "The quick brown fox"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
RANDOM = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A whole checkpoint: stored weights, a tokenizer, and sampling defaults."""
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(GOLDENS / "qwen3_5", path)
    write_tokenizer(path, vocab_size=300)
    defaults = {"eos_token_id": [EOS, 302], "temperature": 0.7, "top_k": 1, "top_p": 0.9}
    (path / "generation_config.json").write_text(json.dumps(defaults))
    return path


@pytest.fixture(scope="module")
def llm(directory):
    with LLM(directory, use_tqdm=False, **OPTIONS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After every test that used the engine, everything is free again."""
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm")
        engine.engine.scheduler.check_integrity()
        stats = engine.stats()
        used = [stats[name] for name in ("num_running", "num_waiting", "slots_used", "blocks_used")]
        assert used == [0, 0, 0, 0]


def run(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(output):
    return list(output.outputs[0].token_ids)


def ids(length, seed=0):
    return np.random.default_rng([seed, length]).integers(3, 299, length).tolist()


# Shapes of the API.


def test_generate_takes_a_prompt_or_several_in_every_form(llm):
    token_ids = llm.tokenizer.encode(TEXT)
    (expected,) = run(llm, TEXT)
    assert isinstance(expected, RequestOutput)
    assert expected.prompt == TEXT
    assert list(expected.prompt_token_ids) == token_ids
    for prompts in (
        [TEXT],
        token_ids,
        [token_ids],
        tuple(token_ids),
        {"prompt": TEXT},
        [{"prompt_token_ids": token_ids}],
    ):
        (output,) = run(llm, prompts)
        assert tokens_of(output) == tokens_of(expected)
        assert output.outputs[0].text == expected.outputs[0].text


@pytest.mark.usefixtures("without_type_checks")
def test_numpy_token_ids_are_taken(llm):
    token_ids = np.array(ids(7))
    expected = tokens_of(run(llm, token_ids.tolist())[0])
    for prompts in (token_ids, [token_ids], {"prompt_token_ids": token_ids}):
        (output,) = run(llm, prompts)
        assert tokens_of(output) == expected


def test_outputs_come_in_the_order_of_the_prompts(llm):
    """More prompts than run at once, of different lengths, some longer than a step."""
    prompts = [ids(n) for n in (1, 150, 64, 3, 130, 65, 2)]
    outputs = run(llm, prompts)
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert len({output.request_id for output in outputs}) == len(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert tokens_of(run(llm, prompt)[0]) == tokens_of(output)


def test_no_prompts_give_no_outputs(llm):
    assert run(llm, []) == []


def test_fields_of_an_output_fit_together(llm):
    (output,) = run(llm, [ids(70)], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    (completion,) = output.outputs
    assert output.prompt is None
    assert output.finished
    assert completion.finished
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert len(completion.token_ids) == 5
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert completion.logprobs is completion.cumulative_logprob is output.prompt_logprobs is None
    times = output.metrics
    assert (times.num_prompt_tokens, times.num_output_tokens, output.num_cached_tokens) == (70, 5, 0)
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time


def test_sampling_params_are_one_for_all_or_one_each(llm):
    prompts = [ids(5), ids(6), ids(7)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + i, ignore_eos=True, seed=i) for i in range(3)]
    outputs = run(llm, prompts, params)
    assert [len(tokens_of(output)) for output in outputs] == [1, 2, 3]
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert tokens_of(run(llm, prompt, one)[0]) == tokens_of(output)
    with pytest.raises(ValueError, match="3 prompts but 2 sampling params; give one for all or one each"):
        run(llm, prompts, params[:2])


def test_default_sampling_params_are_the_checkpoints(llm):
    """top_k 1 makes them greedy, whatever the temperature."""
    defaults = llm.default_sampling_params()
    assert defaults == SamplingParams(temperature=0.7, top_k=1, top_p=0.9)
    assert llm.default_sampling_params(max_tokens=3, top_k=0) == SamplingParams(
        temperature=0.7, top_p=0.9, max_tokens=3
    )
    (output,) = llm.generate(ids(9), use_tqdm=False)
    (expected,) = run(llm, ids(9), SamplingParams(temperature=0.0, max_tokens=16))
    assert tokens_of(output) == tokens_of(expected)


def test_chat_is_generate_through_the_template(llm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    (expected,) = run(llm, prompt)
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert tokens_of(output) == tokens_of(expected)
    assert output.prompt == prompt
    both = llm.chat([messages, messages[1:]], GREEDY, use_tqdm=False)
    assert [tokens_of(o) for o in both] == [tokens_of(o) for o in (output, *llm.chat(messages[1:], GREEDY, False))]
    (thinking,) = llm.chat(messages, GREEDY, False, add_generation_prompt=False)
    assert len(thinking.prompt_token_ids) < len(output.prompt_token_ids)
    (off,) = llm.chat(messages, GREEDY, False, enable_thinking=False)
    assert llm.tokenizer.decode(off.prompt_token_ids).endswith("<think>\n\n</think>\n\n")
    (same,) = llm.chat(messages, GREEDY, False, chat_template_kwargs={"enable_thinking": False})
    assert same.prompt_token_ids == off.prompt_token_ids


def test_tokenizer_is_the_checkpoints(llm):
    assert llm.get_tokenizer().decode(llm.tokenizer.encode(TEXT)) == TEXT


# Samples and seeds.


def test_first_of_several_samples_is_the_one_sample(llm):
    prompt = ids(20)
    (one,) = run(llm, prompt, RANDOM)
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True, n=3)
    (three,) = run(llm, prompt, params)
    assert [completion.index for completion in three.outputs] == [0, 1, 2]
    assert three.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({completion.token_ids for completion in three.outputs}) == 3
    assert three.metrics.num_output_tokens == 24


def test_same_seed_gives_the_same_tokens_alone_and_in_a_batch(llm):
    prompt = ids(20)
    (alone,) = run(llm, prompt, RANDOM)
    others = SamplingParams(temperature=2.0, top_k=3, repetition_penalty=1.5, max_tokens=12, ignore_eos=True)
    outputs = run(llm, [ids(70), prompt, ids(3), prompt, ids(140)], [others, RANDOM, others, RANDOM, others])
    assert tokens_of(outputs[1]) == tokens_of(outputs[3]) == tokens_of(alone)


def test_other_seeds_give_other_tokens(llm):
    prompt = ids(20)
    params = [SamplingParams(seed=seed, max_tokens=8, ignore_eos=True) for seed in (0, 1, 1 << 40, (1 << 64) - 1)]
    outputs = run(llm, [prompt] * 4, params)
    assert len({tuple(tokens_of(output)) for output in outputs}) == 4


def test_requests_without_a_seed_draw_differently(llm):
    outputs = run(llm, [ids(20)] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len({tuple(tokens_of(output)) for output in outputs}) == 4


# Streams.


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        RANDOM,
        SamplingParams(temperature=0.0, max_tokens=1),
        SamplingParams(temperature=1.0, seed=2, max_tokens=40, stop=["e", "a"]),
    ],
)
def test_stream_pieces_make_up_what_generate_gives(llm, params):
    (expected,) = run(llm, TEXT, params)
    pieces = list(llm.stream(TEXT, params))
    assert all(isinstance(piece, StreamOutput) for piece in pieces)
    assert "".join(map(str, pieces)) == expected.outputs[0].text
    assert [token for piece in pieces for token in piece.token_ids] == tokens_of(expected)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    last = pieces[-1]
    assert last.finish_reason == expected.outputs[0].finish_reason
    assert last.output.outputs == expected.outputs
    assert all(piece.output is None for piece in pieces[:-1])


def test_leaving_a_stream_early_frees_everything(llm):
    for piece in llm.stream(ids(100), GREEDY):
        assert piece.token_ids
        break
    gc.collect()
    assert llm.stats()["slots_used"] == llm.stats()["blocks_used"] == llm.stats()["num_running"] == 0
    assert tokens_of(run(llm, ids(5))[0]) == tokens_of(run(llm, ids(5))[0])


def test_stream_that_is_never_read_holds_nothing(llm):
    llm.stream(ids(100), GREEDY)
    assert llm.stats()["num_waiting"] == 0


def test_stream_goes_on_beside_another_call(llm):
    """The other call runs the engine until it is done itself, and the stream's request with it."""
    (expected,) = run(llm, TEXT, GREEDY)
    stream = llm.stream(TEXT, GREEDY)
    pieces = [next(stream)]
    run(llm, [ids(30), ids(8)], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    pieces += stream
    assert "".join(map(str, pieces)) == expected.outputs[0].text
    assert [token for piece in pieces for token in piece.token_ids] == tokens_of(expected)
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].output is not None


def test_two_streams_take_turns(llm):
    prompts = (TEXT, "One request, one slot")
    expected = [tokens_of(run(llm, prompt)[0]) for prompt in prompts]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    found = [[], []]
    for _ in range(GREEDY.max_tokens):
        for stream, tokens in zip(streams, found, strict=True):
            tokens += [token for piece in [next(stream, None)] if piece is not None for token in piece.token_ids]
    for stream, tokens in zip(streams, found, strict=True):
        tokens += [token for piece in stream for token in piece.token_ids]
    assert found == expected


def test_stream_yields_one_sample(llm):
    with pytest.raises(ValueError, match="stream yields one sample, got n=2; use generate"):
        llm.stream(TEXT, SamplingParams(n=2))


# Endings.


def text_of(llm, **params):
    return run(llm, ids(12), SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params)))[0]


def test_max_tokens_ends_by_length(llm):
    (completion,) = text_of(llm, max_tokens=3).outputs
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


def test_context_length_ends_by_length(llm):
    prompt = ids(MAX_MODEL_LEN - 3)
    (output,) = run(llm, prompt, SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
    assert (len(tokens_of(output)), output.outputs[0].finish_reason) == (3, "length")


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_the_text(llm, include):
    whole = text_of(llm).outputs[0]
    at = next(
        i for i in range(2, len(whole.text) - 1) if whole.text[i].isascii() and whole.text.index(whole.text[i]) == i
    )
    stop = whole.text[at]
    (completion,) = text_of(llm, stop=["never this", stop], include_stop_str_in_output=include).outputs
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == whole.text[: at + include]
    kept = len(completion.token_ids)
    assert completion.token_ids == whole.token_ids[:kept]
    assert stop in llm.tokenizer.decode(completion.token_ids)
    assert stop not in llm.tokenizer.decode(completion.token_ids[:-1])


def test_stop_token_ends_with_its_id(llm):
    whole = tokens_of(text_of(llm))
    token = whole[4]
    first = whole.index(token)
    (completion,) = text_of(llm, stop_token_ids=[token]).outputs
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
    assert list(completion.token_ids) == whole[: first + 1]
    assert completion.text == llm.tokenizer.decode(whole[:first])


WANTS_EOS = {EOS: 1000.0}


@pytest.mark.parametrize("eos", [EOS, 302, IM_END])
def test_every_eos_of_the_checkpoint_ends_without_a_reason(llm, eos):
    (completion,) = text_of(llm, ignore_eos=False, logit_bias={eos: 1000.0}).outputs
    assert completion.token_ids == (eos,)
    assert (completion.finish_reason, completion.stop_reason, completion.text) == ("stop", None, "")


def test_ignored_eos_goes_on(llm):
    (completion,) = text_of(llm, logit_bias=WANTS_EOS).outputs
    assert completion.token_ids == (EOS,) * 12
    assert completion.finish_reason == "length"


def test_min_tokens_come_before_eos(llm):
    (completion,) = text_of(llm, ignore_eos=False, logit_bias=WANTS_EOS, min_tokens=5).outputs
    assert len(completion.token_ids) == 6
    assert completion.token_ids[-1] == EOS
    assert not {EOS, 302} & set(completion.token_ids[:-1])
    assert completion.finish_reason == "stop"


def test_allowed_ids_and_bad_words_bind_every_token(llm):
    allowed = list(range(40, 60))
    (completion,) = text_of(llm, allowed_token_ids=allowed).outputs
    assert set(completion.token_ids) <= set(allowed)
    whole = text_of(llm).outputs[0].text
    word = next(char for char in whole if char.isascii() and char.isalpha())
    (completion,) = text_of(llm, bad_words=[word]).outputs
    single = llm.tokenizer.bad_word_sequences([word])
    assert all(sequence[0] not in completion.token_ids for sequence in single if len(sequence) == 1)


def test_output_ends_where_masks_leave_no_token(llm):
    """7 may be drawn, and not once more behind itself: nothing that is forbidden takes its place."""
    sequences = llm.tokenizer.bad_word_sequences(["77"])
    assert [SEVEN, SEVEN] in sequences
    (output,) = run(llm, TEXT, SamplingParams(allowed_token_ids=[SEVEN], bad_words=["77"], max_tokens=5, logprobs=1))
    (completion,) = output.outputs
    assert (completion.token_ids, completion.text, len(completion.logprobs)) == ((SEVEN,), "7", 1)
    assert (completion.finish_reason, completion.stop_reason) == ("error", NOTHING_ALLOWED)


def test_presence_penalty_forbids_repeats_where_it_outweighs_the_logits(llm):
    """A bias that makes three tokens equal and far ahead; the penalty lets each win once."""
    (completion,) = text_of(
        llm, logit_bias={10: 1000.0, 11: 1000.0, 12: 1000.0}, frequency_penalty=2.0, max_tokens=3, presence_penalty=2.0
    ).outputs
    assert set(completion.token_ids) <= {10, 11, 12}


# Log-probabilities.


@functools.lru_cache(maxsize=1)
def _logits_function(llm):
    return jax.jit(functools.partial(full_logits, llm.model))


def model_logprobs(llm, token_ids):
    """log softmax of the model's logits at every position, by one prefill, in float64."""
    padded = np.zeros((96,), np.int32)
    padded[: len(token_ids)] = token_ids
    logits = np.asarray(_logits_function(llm)(llm.params, padded, jnp.int32(len(token_ids))), np.float64)
    logits = logits[: len(token_ids)] - logits[: len(token_ids)].max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


CLOSE = 2e-4
"""Decode against one prefill: other orders of float32 summation move these logits by up to 1e-5 of their magnitude,
which is about 5 (see test_parity)."""


def check_entry(entry, expected, token, most, llm):
    """One position's dictionary against the log-probabilities of the whole vocabulary."""
    order = np.argsort(-expected, kind="stable")
    assert entry[token].logprob == pytest.approx(expected[token], abs=CLOSE)
    # Near ties may swap ranks.
    better = int((expected > expected[token] + CLOSE).sum())
    almost = int((expected > expected[token] - CLOSE).sum())
    assert 1 + better <= entry[token].rank <= almost
    ranked = sorted((e.rank, t) for t, e in entry.items() if e.rank <= most)
    assert [rank for rank, _ in ranked] == list(range(1, most + 1))
    for rank, other in ranked:
        assert entry[other].logprob == pytest.approx(expected[order[rank - 1]], abs=CLOSE)
    assert len(entry) in (most, most + 1)
    for other, found in entry.items():
        assert found.decoded_token == llm.tokenizer.decode([other], skip_special_tokens=False)


@pytest.mark.parametrize("most", [0, 1, 5])
def test_logprobs_are_those_of_the_model(llm, most):
    """Before temperature, penalties and masks."""
    prompt = ids(30)
    params = SamplingParams(
        temperature=1.5, top_k=20, presence_penalty=1.0, seed=3, max_tokens=6, logprobs=most, ignore_eos=True
    )
    (completion,) = run(llm, prompt, params)[0].outputs
    expected = model_logprobs(llm, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
    assert len(completion.logprobs) == 6
    for i, token in enumerate(completion.token_ids):
        check_entry(completion.logprobs[i], expected[i], token, most, llm)
    total = sum(entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_greedy_tokens_have_rank_one(llm):
    (completion,) = text_of(llm, logprobs=0).outputs
    ranks = [entry[token].rank for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert ranks == [1] * len(ranks)


def test_prompt_logprobs_are_those_of_the_model(llm):
    prompts = [ids(90), ids(1), ids(65)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    for prompt, output in zip(prompts, run(llm, prompts, params), strict=True):
        expected = model_logprobs(llm, prompt)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for i, entry in enumerate(output.prompt_logprobs[1:]):
            check_entry(entry, expected[i], prompt[i + 1], 2, llm)


def test_prompt_logprobs_of_a_prompt_in_pieces_equal_those_in_one(llm):
    """150 tokens are two pieces; its first 90 are one."""
    prompt = ids(150)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    whole, part = (run(llm, p, params)[0].prompt_logprobs for p in (prompt, prompt[:90]))
    assert len(whole) == 150
    for i in range(1, 90):
        assert whole[i][prompt[i]].logprob == pytest.approx(part[i][prompt[i]].logprob, abs=CLOSE)


def test_logprobs_do_not_change_the_tokens(llm):
    plain, full = (tokens_of(text_of(llm, temperature=1.0, seed=1, logprobs=most)) for most in (None, 3))
    assert plain == full


# Bad input: each an error that names what is wrong and what is allowed, and nobody else notices.

BAD_PROMPTS = [
    ("", GREEDY, "prompt 1 is empty"),
    ([], GREEDY, "prompt 1 is empty; a prompt needs at least one token"),
    (ids(MAX_MODEL_LEN), GREEDY, f"prompt 1 has {MAX_MODEL_LEN} tokens, and max_model_len=.*allowed: at most 191"),
    ([5, VOCAB], GREEDY, f"prompt 1 has token id {VOCAB}, outside the vocabulary; allowed: 0 to {VOCAB - 1}"),
    ([5, -1], GREEDY, "prompt 1 has token id -1, outside the vocabulary"),
    ({"prompt": TEXT, "multi_modal_data": {}}, GREEDY, "prompt 1 has 'multi_modal_data'; text only: allowed is"),
    ({"prompt": TEXT, "prompt_token_ids": [1]}, GREEDY, "prompt 1 must have exactly one of"),
    ({}, GREEDY, "prompt 1 must have exactly one of"),
    (TEXT, SamplingParams(logprobs=6), "prompt 1: logprobs=6 exceeds max_logprobs=5"),
    (TEXT, SamplingParams(prompt_logprobs=6), "prompt 1: prompt_logprobs=6 exceeds max_logprobs=5"),
    (TEXT, SamplingParams(stop_token_ids=[VOCAB]), f"prompt 1: stop_token_ids has token id {VOCAB}, outside"),
    (TEXT, SamplingParams(logit_bias={VOCAB: 1.0}), f"prompt 1: logit_bias has token id {VOCAB}, outside"),
    (TEXT, SamplingParams(allowed_token_ids=[VOCAB]), f"prompt 1: allowed_token_ids has token id {VOCAB}, outside"),
    (TEXT, SamplingParams(stop_token_ids=list(range(16))), "prompt 1: EOS and .* together are 18 ids; allowed: 16"),
    (TEXT, SamplingParams(allowed_token_ids=[9], logit_bias={9: -math.inf}), "prompt 1: .* leaves no token to draw"),
    (TEXT, SamplingParams(allowed_token_ids=[9], stop_token_ids=[9], min_tokens=1), "prompt 1: .* leaves no token"),
    (TEXT, SamplingParams(allowed_token_ids=[SEVEN], bad_words=["7"]), "prompt 1: .* leaves no token to draw"),
    (TEXT, SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -1e300)), "prompt 1: .* forbid all 307 tokens"),
    (TEXT, SamplingParams(bad_words=["x" * 100]), "prompt 1: bad word 'xxx.*allowed: 1 to 8"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "params", "message"), BAD_PROMPTS, ids=[m[:50] for _, _, m in BAD_PROMPTS])
def test_bad_prompt_queues_nothing_and_disturbs_nobody(llm, prompt, params, message):
    """In the middle of a list, beside a stream in progress, which goes on."""
    (expected,) = run(llm, TEXT)
    stream = llm.stream(TEXT, GREEDY)
    pieces = [next(stream)]
    before = llm.stats()
    with pytest.raises(ValueError, match=message):
        run(llm, [TEXT, prompt, ids(5)], [GREEDY, params, GREEDY])
    after = llm.stats()
    unchanged = ("num_requests", "num_running", "num_waiting", "slots_used", "blocks_used", "num_turns")
    assert [after[name] for name in unchanged] == [before[name] for name in unchanged]
    pieces += stream
    assert "".join(map(str, pieces)) == expected.outputs[0].text


@pytest.mark.parametrize(("prompt", "params", "message"), BAD_PROMPTS, ids=[m[:50] for _, _, m in BAD_PROMPTS])
def test_stream_raises_at_the_call(llm, prompt, params, message):
    with pytest.raises(ValueError, match=message.replace("prompt 1", "prompt 0")):
        llm.stream(prompt, params)


def test_prompt_that_the_pool_can_never_hold_is_refused(directory):
    with LLM(directory, use_tqdm=False, **(OPTIONS | {"num_kv_blocks": 4})) as small:
        message = r"prompt 0: a prompt of 60 tokens with up to 8 output tokens needs 5 KV blocks, the pool has 4"
        with pytest.raises(ValueError, match=message):
            run(small, ids(60))
        assert small.stats()["num_waiting"] == 0


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("prompt", [5, None, 1.5, [None], [1.5], [[1.5]], [True], [TEXT, 5], [[TEXT]]], ids=str)
def test_prompt_of_another_type_is_refused(llm, prompt):
    with pytest.raises((ValueError, TypeError), match=r"must be .*text.*list.* of token ids, got"):
        run(llm, prompt)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("params", [{"temperature": 0.0}, [{"temperature": 0.0}], 5, ["x"]], ids=str)
def test_sampling_params_of_another_type_are_refused(llm, params):
    with pytest.raises((ValueError, TypeError), match="SamplingParams"):
        run(llm, [TEXT], params)


@pytest.mark.parametrize(
    "values",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"stop": ""}, {"stop": ["a", ""]}, {"stop_token_ids": [-1]}],
    ids=str,
)
def test_bad_sampling_params_never_reach_the_engine(values):
    (name,) = values
    with pytest.raises(ValueError, match=name):
        SamplingParams(**values)


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_image_in_a_chat_is_refused_and_never_dropped(llm, kind):
    good = [{"role": "user", "content": "Hello"}]
    bad = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]}]
    before = llm.stats()["num_requests"]
    with pytest.raises(ValueError, match=rf"text only: messages\[0\]\['content'\]\[1\] has type '{kind}'.*allowed"):
        llm.chat([good, bad], GREEDY, use_tqdm=False)
    assert llm.stats()["num_requests"] == before
    assert len(llm.chat([good], GREEDY, use_tqdm=False)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_thnking": False}, "neither the chat template nor chat knows 'enable_thnking'"),
        ({"chat_template_kwargs": {"tools": []}}, "neither the chat template nor chat knows 'tools'"),
        ({"chat_template_kwargs": {"enable_thinking": 1}, "enable_thinking": 2}, "enable_thinking stands in chat_temp"),
        ({"chat_template_kwargs": {"add_generation_prompt": 1}}, "may not have add_generation_prompt"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs must be a dictionary, got 'thinking'"),
        ({"tokenize": False}, "may not have tokenize"),
        ({"tools": [{"type": "function", "function": {"nam": "f"}}]}, r"tools\[0\] has no name"),
        ({"chat_template_kwargs": {"tools": {"name": "f"}}}, "tools must be a list of tools, got {'name': 'f'}"),
        ({"tools": [3]}, r"tools\[0\] must be an object, got 3"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_option_of_a_chat_is_named(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY, use_tqdm=False, **options)


def test_functions_are_tools_and_other_callables_are_none(llm):
    """As transformers has it, which reads their hints and docstrings."""
    chat = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ValueError, match=r"tools\[1\]: there are two tools of the name 'run'"):
        llm.chat(chat, GREEDY, use_tqdm=False, tools=[run, {"name": "run"}])
    with pytest.raises(ValueError, match=r"tools\[0\] must be an object, got functools.partial"):
        llm.chat(chat, GREEDY, use_tqdm=False, tools=[functools.partial(run, 1)])


def test_bad_conversation_is_named_by_its_index(llm):
    good, bad = [{"role": "user", "content": "Hello"}], [{"role": "user", "content": 5}]
    with pytest.raises(ValueError, match=r"conversation 1: messages\[0\]\['content'\] must be a string"):
        llm.chat([good, bad], GREEDY, use_tqdm=False)
    failing = {"chat_template": "{{ raise_exception('no') if messages[0].content == 'Hello' }}x"}
    with pytest.raises(ValueError, match=r"conversation 1: the chat template fails at messages\[0\]: no"):
        llm.chat([[{"role": "user", "content": "Hi"}], good], GREEDY, use_tqdm=False, **failing)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\] must be a string"),
    ],
)
def test_bad_chat_is_named(llm, messages, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, GREEDY, use_tqdm=False)


# Bad checkpoints and settings.


@pytest.fixture
def checkpoint_copy(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    return tmp_path / "copy"


def edit_config(directory, change):
    file = directory / "config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def edit_weights(directory, change):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def truncate(directory, share):
    file = directory / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


NORM = "model.language_model.norm.weight"


def cast_norm(dtype):
    return lambda d: edit_weights(d, lambda tensors: tensors.update({NORM: tensors[NORM].astype(dtype)}))


BREAKS = {
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"no config\.json here; expected"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ValueError, r"config\.json: not valid JSON"),
    "model_type": (
        lambda d: edit_config(d, lambda raw: raw.update(model_type="llama")),
        ValueError,
        "unsupported model_type 'llama'; supported: deepseek_v3, .*qwen3_5",
    ),
    "quantised": (
        lambda d: edit_config(d, lambda raw: raw.update(quantization_config={"quant_method": "modelopt"})),
        ValueError,
        "quantization_config: quant_method 'modelopt' is not supported; use a checkpoint in bfloat16, FP8",
    ),
    "dtype in config": (
        lambda d: edit_config(d, lambda raw: raw.update(dtype="float16")),
        ValueError,
        "unsupported checkpoint dtype 'float16'; supported: float32, bfloat16",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        FileNotFoundError,
        "no checkpoint here; expected a Hugging Face one",
    ),
    "truncated weights": (lambda d: truncate(d, 0.7), ValueError, r"model\.safetensors: damaged"),
    "truncated header": (lambda d: truncate(d, 0.001), ValueError, r"model\.safetensors: damaged"),
    "empty weights": (lambda d: truncate(d, 0), ValueError, r"model\.safetensors: damaged"),
    "garbage": (
        lambda d: (d / "model.safetensors").write_bytes(b"not a tensor" * 100),
        ValueError,
        r"model\.safetensors: damaged",
    ),
    "float16 tensor": (cast_norm(np.float16), ValueError, "norm.weight"),
    "integer tensor": (cast_norm(np.int32), ValueError, "norm.weight"),
    "missing tensor": (
        lambda d: edit_weights(d, lambda tensors: tensors.pop(NORM)),
        ValueError,
        r"1 missing: norm\.weight",
    ),
    "unexpected tensor": (
        lambda d: edit_weights(d, lambda tensors: tensors.update(stray=np.zeros(3, np.float32))),
        ValueError,
        "1 unexpected: stray",
    ),
    "misshaped tensor": (
        lambda d: edit_weights(d, lambda tensors: tensors.update({NORM: np.zeros(3, np.float32)})),
        ValueError,
        r"norm\.weight is \(3,\), expected \(32,\)",
    ),
    "damaged tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        ValueError,
        "the tokenizer cannot be read",
    ),
    "EOS outside the vocabulary": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [5, 999999]}'),
        ValueError,
        r"generation_config\.json: eos_token_id: 999999 is outside the vocabulary; allowed: 0 to 306",
    ),
    "EOS of config.json outside the vocabulary": (
        lambda d: edit_config(d, lambda raw: raw["text_config"].update(eos_token_id=307)),
        ValueError,
        r"config\.json: eos_token_id must be of ids from 0 to 306",
    ),
    "too many EOS": (
        lambda d: (d / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(30))})),
        ValueError,
        r"31 ids end a sequence, of .*generation_config\.json: eos_token_id \(30\), .*config\.json.* \(1\), the tok",
    ),
    "another head": (
        lambda d: edit_config(d, lambda raw: raw.update(tie_word_embeddings=True)),
        ValueError,
        "lm_head.weight differs from model.language_model.embed_tokens.weight, and tie_word_embeddings=true",
    ),
    "damaged defaults": (
        lambda d: (d / "generation_config.json").write_text('{"top_p": 7}'),
        ValueError,
        r"generation_config\.json: top_p",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_bad_checkpoint_is_named_before_anything_is_allocated(checkpoint_copy, monkeypatch, name):
    damage, error, message = BREAKS[name]
    damage(checkpoint_copy)
    monkeypatch.setattr(llm_module, "Engine", lambda *_: pytest.fail("the engine was built"))
    before = {id(array) for array in jax.live_arrays()}
    with pytest.raises(error, match=message):
        LLM(checkpoint_copy, use_tqdm=False, **OPTIONS)
    assert {id(array) for array in jax.live_arrays()} <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 2048}, "max_model_len=2048 exceeds the model's context of 1024 tokens"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide intermediate_size=40"),
        ({"tensor_parallel_size": 8}, "tensor_parallel_size=8 needs 8 devices, JAX sees 4"),
        ({"kernels": "pallas"}, "kernels='pallas' on cpu: the kernels are compiled for ROCm and CUDA; allowed: 'auto'"),
        ({"max_seqs": 3}, "unknown engine options: max_seqs; allowed: max_num_seqs"),
        ({"num_speculative_tokens": 1}, "needs a model with an MTP head, and config.json counts none"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
    ids=str,
)
def test_bad_setting_is_named_before_anything_is_allocated(directory, monkeypatch, options, message):
    monkeypatch.setattr(llm_module, "Engine", lambda *_: pytest.fail("the engine was built"))
    with pytest.raises(ValueError, match=message):
        LLM(directory, use_tqdm=False, **(OPTIONS | options))


def test_pool_that_does_not_fit_is_named_in_bytes(directory):
    with pytest.raises(MemoryError, match="bytes short"):
        LLM(directory, use_tqdm=False, **(OPTIONS | {"num_kv_blocks": 10**10}))


def test_config_and_keywords_exclude_each_other(directory):
    with pytest.raises(ValueError, match="give an EngineConfig or its fields, not both: got max_num_seqs"):
        LLM(directory, EngineConfig(**OPTIONS), max_num_seqs=3)


def test_absent_directory_is_named(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such directory; a model is a local checkpoint directory"):
        LLM(tmp_path / "absent")
    with pytest.raises(
        FileNotFoundError, match="absent: no such directory; a tokenizer is read from a local directory"
    ):
        LLM(directory, tokenizer=tmp_path / "absent", use_tqdm=False, **OPTIONS)


def test_checkpoint_without_tokenizer_takes_token_ids_only(checkpoint_copy):
    for file in checkpoint_copy.glob("tokenizer*"):
        file.unlink()
    with LLM(checkpoint_copy, use_tqdm=False, **OPTIONS) as bare:
        for call in (
            lambda: run(bare, TEXT),
            lambda: bare.chat([{"role": "user", "content": "x"}]),
            bare.get_tokenizer,
        ):
            with pytest.raises(ValueError, match="needs a tokenizer, and this checkpoint has none; pass tokenizer="):
                call()
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            run(bare, [5], SamplingParams(stop="x"))
        assert bare.stats()["num_waiting"] == 0


# Life of an engine.


@pytest.mark.thorough
def test_prepared_engine_compiles_nothing_for_plain_requests(directory):
    with LLM(directory, use_tqdm=False, **OPTIONS | {"decode_buckets": (1, 4)}) as llm:
        llm.engine.prepare([1, 3])
        compiled = llm.engine.num_compilations
        # Admit, seal, prefill, and two sizes of decode.
        assert compiled == 5
        prompts = [list(range(start, start + 20)) for start in range(3)]
        llm.generate(prompts, GREEDY, use_tqdm=False)
        llm.generate(prompts[0], GREEDY, use_tqdm=False)
        assert llm.engine.num_compilations == compiled


def test_stats_count_what_was_done(llm):
    llm.reset_prefix_cache()
    run(llm, ids(10))
    before = llm.stats()
    run(llm, [ids(10), ids(20)], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    after = llm.stats()
    gained = {name: after[name] - before[name] for name in before if isinstance(before[name], int | float)}
    assert (gained["num_requests"], gained["num_prompt_tokens"], gained["num_output_tokens"]) == (2, 30, 6)
    assert gained["num_turns"] == gained["num_device_reads"] > 0
    assert gained["num_compilations"] == gained["num_preemptions"] == 0
    assert gained["uptime"] > 0
    assert after["output_tokens_per_second"] > 0
    assert 0 < after["padding_waste"] < 1
    assert (after["slots_total"], after["blocks_total"]) == (12, 20)
    assert after["prefix_cache"]["queried_tokens"] - before["prefix_cache"]["queried_tokens"] == 30
    for name in ("time_to_first_token", "time_per_output_token"):
        assert 0 < after[name]["p50"] <= after[name]["p90"] <= after[name]["p99"]
    for name in ("plan", "pack", "dispatch", "read", "commit", "detokenise"):
        assert after["seconds"][name] > before["seconds"][name]


def test_stats_are_logged_while_the_engine_works(llm, monkeypatch, caplog):
    monkeypatch.setattr(metrics_module, "WINDOW", 0.0)
    with caplog.at_level("INFO", logger="gdnjax"):
        run(llm, ids(10))
    lines = [record.getMessage() for record in caplog.records]
    assert any("running 1, waiting 0 | slots 1/12, blocks" in line and "output tok/s" in line for line in lines)


# The prefix cache, as callers see it.


def test_repeated_prompt_is_cached_and_answered_alike(llm):
    llm.reset_prefix_cache()
    prompt = ids(70)
    first, second = run(llm, [prompt])[0], run(llm, [prompt])[0]
    assert (first.num_cached_tokens, first.cache_miss_reason) == (0, "nothing cached begins like it")
    assert (second.num_cached_tokens, second.cache_miss_reason) == (64, None)
    assert tokens_of(second) == tokens_of(first)
    assert llm.reset_prefix_cache() is True
    assert run(llm, [prompt])[0].num_cached_tokens == 0


def test_generated_tokens_are_cached_up_to_the_last(llm):
    llm.reset_prefix_cache()
    prompt = ids(37)
    (first,) = run(llm, [prompt])
    (longer,) = run(llm, [prompt + tokens_of(first) + ids(3)])
    # Its last token was drawn and never fed.
    assert longer.num_cached_tokens == len(prompt) + len(tokens_of(first)) - 1


@pytest.mark.thorough
def test_reason_of_a_miss_is_told(llm, directory):
    llm.reset_prefix_cache()
    assert run(llm, ids(9))[0].cache_miss_reason == "shorter than a block"
    asking = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    run(llm, [ids(40)])
    (output,) = run(llm, [ids(40)], asking)
    assert (output.num_cached_tokens, output.cache_miss_reason) == (0, "prompt_logprobs need every position")
    with LLM(directory, use_tqdm=False, **(OPTIONS | {"enable_prefix_caching": False})) as off:
        for _ in range(2):
            (output,) = run(off, [ids(40)])
            assert (output.num_cached_tokens, output.cache_miss_reason) == (0, "the prefix cache is off")


def test_samples_of_a_prompt_share_it(llm):
    llm.reset_prefix_cache()
    before = llm.stats()["num_prompt_tokens"]
    run(llm, [ids(70)], SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=2, ignore_eos=True))
    assert llm.stats()["num_prompt_tokens"] - before == 70 + 2 * 6


def test_next_turn_of_a_chat_goes_on_from_the_last(llm):
    llm.reset_prefix_cache()
    chat = [{"role": "user", "content": "How are you? " * 4}]
    (first,) = llm.chat(chat, GREEDY, use_tqdm=False)
    chat += [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": "And now?"}]
    (second,) = llm.chat(chat, GREEDY, use_tqdm=False)
    # What was answered is not what the next turn says was answered, so they part at the generation prompt.
    common = frontend_module._common_length(first.prompt_token_ids, second.prompt_token_ids)
    assert second.num_cached_tokens == common // 16 * 16 > 0


def test_second_chat_goes_on_from_the_end_of_the_system_prompt(llm):
    llm.reset_prefix_cache()
    system = {"role": "system", "content": "The state forgets. " * 4}
    chats = [[system, {"role": "user", "content": question}] for question in ("How?", "When?", "0 or 1?")]
    outputs = [llm.chat(chat, GREEDY, use_tqdm=False, add_generation_prompt=i < 2)[0] for i, chat in enumerate(chats)]
    common = frontend_module._common_length(outputs[0].prompt_token_ids, outputs[1].prompt_token_ids)
    assert [output.num_cached_tokens for output in outputs] == [0, *[common // 16 * 16] * 2]
    assert common // 16 * 16 > 32


# Streams of asyncio over the same engine.


def test_chats_and_texts_of_streams_are_those_of_the_llm(llm):
    """Prompts, answers, and the states that the next turn and other chats go on from."""
    system = {"role": "system", "content": "The state forgets. " * 4}
    chats = [[system, {"role": "user", "content": question}] for question in ("How?", "When?")]
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}{{ tools }}"
    kept = dataclasses.replace(GREEDY, logprobs=2)
    expected = llm.chat(chats, kept, use_tqdm=False)
    (text,) = run(llm, TEXT, kept)

    async def read(stream):
        return await stream.prepared(), [piece async for piece in stream]

    async def scene(front):
        for chat, output in zip(chats, expected, strict=True):
            submission, pieces = await read(front.chat(chat, kept))
            assert submission.prompt == output.prompt
            # Behind the generation prompt's "assistant" the next turn parts from this one, and others at the question.
            (request,) = submission.requests
            assert 0 < request.system_end < request.turn_start < len(submission.token_ids)
            (sample,) = pieces[-1].output.outputs
            assert sample == output.outputs[0]
            assert [entry for piece in pieces for entry in piece.logprobs] == sample.logprobs
        _, pieces = await read(front.generate(TEXT, kept))
        assert pieces[-1].output.outputs == text.outputs
        going_on = front.chat(
            [*chats[0], {"role": "assistant", "content": "It"}],
            GREEDY,
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert (await going_on.prepared()).prompt.endswith("assistant\nIt")
        await going_on.aclose()
        tooled = front.chat(chats[0], GREEDY, chat_template=template, tools=[{"name": "f"}])
        assert (await tooled.prepared()).prompt.endswith("How?[{'name': 'f'}]")
        await tooled.aclose()
        for options, error in [
            ({"tools": [{"name": "f"}]}, "neither the chat template nor chat knows 'tools'"),
            ({"chat_template_kwargs": {"thinking": True}}, "neither the chat template nor chat knows 'thinking'"),
            ({"continue_final_message": True}, "give add_generation_prompt=False, too"),
            ({"chat_template": "{% if %}"}, "the chat template cannot be read"),
        ]:
            with pytest.raises(ValueError, match=error):
                await front.chat(chats[0], GREEDY, **options).prepared()

    front = AsyncLLM.from_llm(llm)
    try:
        asyncio.run(asyncio.wait_for(scene(front), 300))
    finally:
        # The LLM goes on.
        front._loop.stop("the test is over")


# Order, deadlines, and loops of one's own.


def test_urgent_prompt_comes_first(llm):
    outputs = llm.generate([ids(20, seed) for seed in range(6)], GREEDY, use_tqdm=False, priority=[0, 0, 0, 0, 0, -1])
    started = [output.metrics.first_scheduled_time for output in outputs]
    assert started[5] <= min(started[:5])
    assert started[5] < started[4]


def test_overdue_requests_are_aborted_and_others_go_on(llm):
    late = llm.submit(ids(20), SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True), timeout=1e-6)
    beside = llm.submit(ids(20, 1), GREEDY)
    while llm.step():
        pass
    assert (late.output().outputs[0].finish_reason, late.output().outputs[0].stop_reason) == ("abort", "timeout")
    assert tokens_of(beside.output()) == tokens_of(run(llm, [ids(20, 1)])[0])


def test_submitted_prompt_is_moved_on_by_steps_and_can_be_aborted(llm):
    kept, dropped = llm.submit(ids(20), GREEDY), llm.submit(ids(21), GREEDY)
    assert not kept.finished
    for _ in range(4):
        assert llm.step()
    llm.abort(dropped)
    while llm.step():
        pass
    assert kept.finished
    assert dropped.output().outputs[0].finish_reason == "abort"
    assert tokens_of(kept.output()) == tokens_of(run(llm, [ids(20)])[0])
    so_far = tokens_of(dropped.output())
    assert so_far == tokens_of(run(llm, [ids(21)])[0])[: len(so_far)]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"priority": "high"}, "priority must be an integer or a list of them, got 'high'"),
        ({"priority": 1.5}, "priority must be an integer or a list of them, got 1.5"),
        ({"priority": [0, 1, 2]}, "2 prompts but 3 priorities; give one for all or one each"),
        ({"priority": [0, True]}, "priority must be an integer, got True"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, or None, got 0"),
        ({"timeout": "soon"}, "timeout must be a number of seconds above 0, or None, got 'soon'"),
    ],
    ids=str,
)
def test_bad_priority_or_timeout_queues_nothing(llm, given, message):
    before = llm.stats()["num_requests"]
    with pytest.raises(ValueError, match=message):
        llm.generate([TEXT, TEXT], GREEDY, use_tqdm=False, **given)
    assert llm.stats()["num_requests"] == before


def raising(function, number: int, error: BaseException):
    """The function, but its call of that number raises in its place."""
    calls = itertools.count(1)

    def called(*arguments):
        if next(calls) == number:
            raise error
        return function(*arguments)

    return called


def test_interrupted_wait_for_the_device_loses_no_tokens_of_others(llm, monkeypatch):
    other = llm.submit(ids(20), GREEDY)
    monkeypatch.setattr(llm.engine.runner, "read", raising(llm.engine.runner.read, 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(llm, [ids(10)])
    while llm.step():
        pass
    monkeypatch.undo()
    assert tokens_of(other.output()) == tokens_of(run(llm, [ids(20)])[0])


def test_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "step", raising(llm.engine.step, 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(llm, [ids(10), ids(150), ids(5), ids(6), ids(7)])
    assert (llm.stats()["num_running"], llm.stats()["num_waiting"]) == (0, 0)
    monkeypatch.undo()
    (expected,) = run(llm, TEXT)
    assert tokens_of(run(llm, TEXT)[0]) == tokens_of(expected)


def test_failed_dispatch_costs_nobody_else_anything(llm, monkeypatch):
    """The call that fails raises; a stream beside it goes on, and the engine serves the next."""
    (expected,) = run(llm, TEXT)
    stream = llm.stream(TEXT, GREEDY)
    pieces = [next(stream)]

    def broken(plan):
        raise RuntimeError("out of order")

    monkeypatch.setattr(llm.engine.runner, "dispatch", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        run(llm, TEXT)
    monkeypatch.undo()
    pieces += stream
    assert "".join(map(str, pieces)) == expected.outputs[0].text
    assert tokens_of(pieces[-1].output) == tokens_of(expected)
    assert (llm.stats()["num_running"], llm.stats()["num_waiting"]) == (0, 0)
    assert tokens_of(run(llm, TEXT)[0]) == tokens_of(expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("RESOURCE_EXHAUSTED")], ids=str)
def test_error_after_the_pools_were_donated_leaves_an_engine_that_works(llm, monkeypatch, error):
    """A step has taken the pools and returned others, and nobody has got them."""
    (expected,) = run(llm, TEXT)
    beside = llm.submit(ids(20), GREEDY)
    whole, calls = llm.engine.runner._run, []

    def cut_off(call):
        result = whole(call)
        calls.append(None)
        if len(calls) == 4:
            raise error
        return result

    monkeypatch.setattr(llm.engine.runner, "_run", cut_off)
    with pytest.raises(type(error)):
        run(llm, TEXT)
    assert not pool_of(llm.engine.runner.state, "k").is_deleted()
    while llm.step():
        pass
    assert tokens_of(run(llm, TEXT)[0]) == tokens_of(expected)
    assert tokens_of(beside.output()) == tokens_of(run(llm, [ids(20)])[0])
    assert llm.reset_prefix_cache()


def test_failure_that_shows_when_tokens_are_read_is_told_once(llm, monkeypatch):
    """What has failed on the device is not read again, and what it had computed is computed anew."""
    beside = llm.submit(ids(20), GREEDY)
    error = RuntimeError("the device has failed")
    monkeypatch.setattr(llm.engine.runner, "read", raising(llm.engine.runner.read, 3, error))
    with pytest.raises(RuntimeError, match="the device has failed"):
        run(llm, TEXT)
    while llm.step():
        pass
    assert tokens_of(beside.output()) == tokens_of(run(llm, [ids(20)])[0])


def test_interrupt_while_requests_are_queued_is_an_interrupt(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.scheduler, "add", raising(llm.engine.scheduler.add, 2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(llm, [ids(10), ids(11), ids(12)])
    monkeypatch.undo()
    assert not llm.engine.has_work
    assert len(run(llm, [ids(10)])) == 1


def test_tokenizer_that_fails_for_one_request_ends_that_request_alone(llm, monkeypatch):
    prompts, expected = [ids(20), ids(30)], run(llm, [ids(20), ids(30)])
    append = Detokenizer.append
    doomed = llm.submit(prompts[0], GREEDY)
    beside = llm.submit(prompts[1], GREEDY)

    def fails(detokenizer, token_ids):
        if detokenizer is doomed.requests[0].detokenizer and doomed.requests[0].num_committed >= 3:
            raise UnicodeError("no such letter")
        return append(detokenizer, token_ids)

    monkeypatch.setattr(Detokenizer, "append", fails)
    told = []
    while llm.engine.has_work:
        told += [request for request in llm.engine.step() if request.finished]
    (failed,) = doomed.output().outputs
    assert (failed.finish_reason, failed.stop_reason) == ("error", "UnicodeError: no such letter")
    assert tokens_of(beside.output()) == tokens_of(expected[1])
    assert {*told} == {*doomed.requests, *beside.requests}


def test_threads_may_share_an_engine(llm):
    """Their requests run in the same turns, and each gets its own answers."""
    prompts = [[ids(10 + 7 * caller + call) for call in range(3)] for caller in range(4)]
    expected = [[tokens_of(run(llm, [prompt])[0]) for prompt in own] for own in prompts]

    def call(own):
        return [tokens_of(run(llm, [prompt])[0]) for prompt in own]

    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(call, prompts))
    assert found == expected


def test_turns_of_other_threads_end_no_stream_within_a_piece(llm, monkeypatch):
    """Texts and tokens of the pieces are those of the output, though others step as soon as they are let."""
    text_since, others = Detokenizer.text_since, []

    def slow(detokenizer, start):
        text = text_since(detokenizer, start)
        others.append(threading.Thread(target=lambda: [llm.step() for _ in range(8)]))
        others[-1].start()
        # It waits for the piece; one that does not is through by then.
        others[-1].join(timeout=1.0)
        monkeypatch.setattr(Detokenizer, "text_since", text_since)
        return text

    # Compiles, if nobody has.
    run(llm, TEXT)
    monkeypatch.setattr(Detokenizer, "text_since", slow)
    pieces = list(llm.stream(TEXT, dataclasses.replace(GREEDY, max_tokens=6)))
    for other in others:
        other.join()
    output = pieces[-1].output.outputs[0]
    assert "".join(map(str, pieces)) == output.text
    assert sum((piece.token_ids for piece in pieces), ()) == output.token_ids


def test_statistics_wait_for_the_turn_of_another_thread(llm, monkeypatch):
    """They were a RuntimeError now and then: a deque that changed while it was looked at."""
    asked, order, plan = [], [], llm.engine.scheduler.plan

    def slow(**options):
        asked.append(threading.Thread(target=lambda: order.append(len(llm.stats()))))
        asked[-1].start()
        asked[-1].join(timeout=0.2)
        order.append("turn")
        monkeypatch.undo()
        return plan(**options)

    monkeypatch.setattr(llm.engine.scheduler, "plan", slow)
    llm.engine.step()
    asked[0].join()
    assert order[0] == "turn"


def test_what_ended_by_a_deadline_or_an_abort_is_told(llm):
    before = llm.stats()["num_ended"]
    late, aborted = llm.submit(ids(20), GREEDY, timeout=1e-9), llm.submit(ids(21), GREEDY)
    llm.abort(aborted)
    assert {*llm.engine.step()} >= {*late.requests, *aborted.requests}
    assert late.output().outputs[0].stop_reason == "timeout"
    assert llm.engine.step() == []
    now = llm.stats()["num_ended"]
    assert {reason: now[reason] - before.get(reason, 0) for reason in ("abort", "timeout")} == {
        "abort": 1,
        "timeout": 1,
    }


def test_failed_call_changes_no_later_seed(llm):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    before = llm.frontend.num_requests
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        run(llm, [TEXT, []], params)
    assert llm.frontend.num_requests == before


def test_closed_engine_refuses_every_call(directory):
    with LLM(directory, use_tqdm=False, **OPTIONS) as closed:
        pass
    closed.close()
    for call in (
        lambda: run(closed, TEXT),
        lambda: closed.generate(TEXT),
        lambda: closed.stream(TEXT),
        lambda: closed.chat([{"role": "user", "content": "Hello"}]),
    ):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            call()
    assert closed.stats()["num_requests"] == 0


def test_close_ends_what_was_submitted(directory):
    closed = LLM(directory, use_tqdm=False, **OPTIONS)
    submission = closed.submit(TEXT, GREEDY)
    closed.step()
    closed.close()
    assert submission.finished
    assert submission.output().outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        closed.step()
    closed.abort(submission)


def test_stream_of_a_closed_engine_ends_with_an_error(directory):
    closed = LLM(directory, use_tqdm=False, **OPTIONS)
    stream = closed.stream(TEXT, GREEDY)
    next(stream)
    closed.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        list(stream)


def test_engine_is_closed_when_its_block_raises(directory):
    with pytest.raises(KeyError), LLM(directory, use_tqdm=False, **OPTIONS) as closed:
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        closed.generate(TEXT)


def test_deadline_does_not_count_what_compiles(llm, monkeypatch):
    """By a clock of its own, in which a step takes 100 s the first time, as one does that is compiled."""
    now, traces = [1000.0], [0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter, sleep=time.sleep)
    for module in (engine_module, runner_module, frontend_module, scheduler_module, submission_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(llm.engine.runner, "compile_seconds", 0.0)
    steps = llm.engine.runner.steps

    def slow(step, compiles):
        def call(*arguments):
            now[0] += 100.0 if compiles and not traces[0] else 1.0
            traces[0] += compiles
            return step(*arguments)

        return call

    for compiles, ends in ((True, "length"), (False, "timeout")):
        now[0], traces[0] = 1000.0, 0
        slowed = dataclasses.replace(
            steps, admit=slow(steps.admit, compiles), num_traces=lambda: steps.num_traces() + min(1, traces[0])
        )
        monkeypatch.setattr(llm.engine.runner, "steps", slowed)
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        timeout = 50.0 if compiles else 0.5
        (output,) = llm.generate([ids(20)], params, use_tqdm=False, timeout=timeout)
        assert (output.outputs[0].stop_reason or output.outputs[0].finish_reason) == ends


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_llm_is_neither_copied_nor_pickled(llm, copied):
    with pytest.raises(TypeError, match="an LLM cannot be copied or pickled; make another"):
        copied(llm)


def test_wrong_types_are_named_where_nobody_checks_annotations():
    """In a process without the test run's checks, as users have it."""
    program = """
from gdnjax import LLM, batch_generate
for call in (
    lambda: LLM(None),
    lambda: LLM.abort(None, "x"),
    lambda: batch_generate(type("Model", (), {"vocab_size": 9}), {}, [[1]], None, None, max_new_tokens=1),
):
    try:
        call()
    except (TypeError, ValueError) as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    model, aborted, tokens = done.stdout.splitlines()
    assert model == "a model is a checkpoint directory, or 'tiny' for the embedded one, got None"
    assert aborted == "abort takes what submit has returned, got 'x'"
    assert tokens.startswith("tokens must be an integer array [prompts, width]")

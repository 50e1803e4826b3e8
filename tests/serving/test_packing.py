"""Plans become padded numpy batches: every token in its place, padding pointing at nothing."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gdnjax.config import CHUNK
from gdnjax.sampling_params import MAX_BAD_WORD_TOKENS, SamplingParams
from gdnjax.serving import packing
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.request import Request
from gdnjax.serving.scheduler import Piece
from gdnjax.state import NO_TOKEN

ROWS = 4


def make_request(prompt_length=5, slot=1, **params):
    params = SamplingParams(**({"max_tokens": 8} | params))
    return Request(
        request_id="r",
        prompt_token_ids=[100 * slot + i for i in range(prompt_length)],
        params=params,
        max_length=prompt_length + params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        seed=0,
        detokenizer=Detokenizer(None, params),
        slot=slot,
    )


@pytest.mark.parametrize(("size", "bucket"), [(0, 1), (1, 1), (2, 8), (8, 8), (9, 20), (20, 20)])
def test_smallest_bucket_that_holds_is_chosen(size, bucket):
    assert packing.bucket_for(size, (1, 8, 20)) == bucket


def test_size_past_the_buckets_is_an_error():
    with pytest.raises(ValueError, match=r"21 exceeds the largest compiled bucket; compiled: \(1, 8, 20\)"):
        packing.bucket_for(21, (1, 8, 20))


PIECES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 150), st.booleans(), st.integers(1, 30)), max_size=ROWS)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
@hypothesis.given(PIECES, st.integers(0, 100))
def test_prefill_batch_holds_every_token_once(drawn, padding):
    """For any pieces that start at multiples of CHUNK and any bucket, also one that is no multiple of CHUNK."""
    pieces = []
    for slot, (chunks, length, is_last, rest) in enumerate(drawn, start=1):
        start = chunks * CHUNK
        is_last = is_last or length % CHUNK != 0
        request = make_request(start + length + (0 if is_last else rest), slot=slot)
        pieces.append(Piece(request, start, length, is_last))
    tokens = max(1, sum(piece.length for piece in pieces)) + padding
    batch = packing.pack_prefill(pieces, tokens=tokens, rows=ROWS)
    place = 0
    chunks = [c for c in zip(batch.chunk_row, batch.chunk_start, batch.chunk_length, strict=True) if c[2]]
    for row, piece in enumerate(pieces):
        prompt = piece.request.prompt_token_ids
        here = slice(place, place + piece.length)
        assert (batch.slot[row], batch.start[row], batch.length[row]) == (piece.request.slot, place, piece.length)
        assert batch.is_last[row] == piece.is_last
        np.testing.assert_array_equal(batch.tokens[here], prompt[piece.start : piece.start + piece.length])
        assert (batch.token_row[here] == row).all()
        assert batch.token_valid[here].all()
        following = prompt[piece.start + 1 : piece.start + piece.length + 1]
        expected = [*following, *[NO_TOKEN] * (piece.length - len(following))]
        np.testing.assert_array_equal(batch.target[here], expected)
        own = [(int(start), int(length)) for r, start, length in chunks if r == row]
        # In order, gapless, whole but for the last.
        assert [start for start, _ in own] == list(range(place, place + piece.length, CHUNK))
        assert sum(length for _, length in own) == piece.length
        assert all(length == CHUNK for _, length in own[:-1])
        place += piece.length
    assert not batch.token_valid[place:].any()
    assert (batch.target[place:] == NO_TOKEN).all()
    for values in (batch.slot, batch.length, batch.is_last):
        assert not values[len(pieces) :].any()
    # The shapes depend on the bucket alone.
    assert len(batch.chunk_row) == tokens // CHUNK + ROWS


def test_admission_fields_are_those_of_the_request():
    requests = [
        make_request(
            7,
            slot=3,
            temperature=0.5,
            top_k=-1,
            top_p=0.9,
            min_p=0.1,
            min_tokens=2,
            stop_token_ids=[5, 6],
            max_tokens=4,
        ),
        make_request(2, slot=1, top_k=40),
    ]
    requests[0].blocks, requests[0].logit_row = [9, 4], 2
    requests[0].seed = 0x1122334455667788
    requests[1].seed = (1 << 64) - 1
    batch = packing.pack_admissions(requests, rows=ROWS, table_width=5)
    np.testing.assert_array_equal(batch.slot, [3, 1, 0, 0])
    np.testing.assert_array_equal(batch.max_length, [11, 10, 0, 0])
    np.testing.assert_array_equal(batch.min_length, [9, 2, 0, 0])
    np.testing.assert_array_equal(batch.block_table[0], [9, 4, 0, 0, 0])
    assert not batch.block_table[1:].any()
    np.testing.assert_array_equal(batch.stop_tokens[0, :3], [5, 6, NO_TOKEN])
    assert (batch.stop_tokens[1:] == NO_TOKEN).all()
    np.testing.assert_array_equal(batch.temperature, np.float32([0.5, 1, 0, 0]))
    np.testing.assert_array_equal(batch.top_k, [0, 40, 0, 0])
    np.testing.assert_array_equal(batch.top_p, np.float32([0.9, 1, 1, 1]))
    np.testing.assert_array_equal(batch.min_p, np.float32([0.1, 0, 0, 0]))
    np.testing.assert_array_equal(batch.seed[:2], [[0x55667788, 0x11223344], [0xFFFFFFFF, 0xFFFFFFFF]])
    np.testing.assert_array_equal(batch.logit_row, [2, 0, 0, 0])


def test_huge_limits_do_not_overflow():
    """max_tokens beyond any model is cut to the model's length; the minimum must follow it."""
    request = make_request(5, max_tokens=1 << 40, min_tokens=1 << 40, top_k=(1 << 31) - 1)
    request.max_length = 300
    batch = packing.pack_admissions([request], rows=1, table_width=1)
    assert batch.min_length[0] == 300
    assert batch.top_k[0] == (1 << 31) - 1


def test_logit_row_holds_prompt_bias_and_bans():
    request = make_request(
        3, logit_bias={4: 1.5, 101: -2.0, 7: -np.inf}, allowed_token_ids=[4, 101], repetition_penalty=1.2
    )
    request.logit_row, request.bad_words = 2, [[5], [6, 7, 8]]
    batch = packing.pack_logit_row(request, vocab_size=200, padded_vocab_size=204)
    assert batch.row == 2
    np.testing.assert_array_equal(np.flatnonzero(batch.in_prompt), [100, 101, 102])
    expected = np.full(204, -np.inf)
    expected[4], expected[101], expected[200:] = 1.5, -2.0, 0.0
    np.testing.assert_array_equal(batch.bias, np.float32(expected))
    np.testing.assert_array_equal(batch.bad_words[0], [*[NO_TOKEN] * (MAX_BAD_WORD_TOKENS - 1), 5])
    np.testing.assert_array_equal(batch.bad_words[1], [*[NO_TOKEN] * (MAX_BAD_WORD_TOKENS - 3), 6, 7, 8])
    assert (batch.bad_words[2:] == NO_TOKEN).all()
    assert batch.repetition == np.float32(1.2)


def test_logit_row_of_nobody_is_neutral():
    batch = packing.pack_logit_row(None, vocab_size=20, padded_vocab_size=20)
    assert batch.row == 0
    assert not batch.bias.any()
    assert not batch.in_prompt.any()
    assert (batch.bad_words == NO_TOKEN).all()
    assert (batch.repetition, batch.frequency, batch.presence) == (1, 0, 0)


def test_decode_batch_lists_slots_and_pads_with_null():
    requests = [make_request(slot=4), make_request(slot=2)]
    np.testing.assert_array_equal(packing.pack_decode(requests, rows=5).slot, [4, 2, 0, 0, 0])

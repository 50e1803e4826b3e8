"""Plans become padded numpy batches: every token in its place, padding pointing at nothing."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gdnjax.config import CHUNK, EngineConfig
from gdnjax.sampling_params import MAX_BAD_WORD_TOKENS, SamplingParams
from gdnjax.serving import packing
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.plan import Admission, Growth, Piece, Seal, max_chunks, max_growth
from gdnjax.serving.request import Request
from gdnjax.state import IN_PROMPT, MOST_COUNTED, NO_TOKEN

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


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [([10], 64), ([64], 64), ([65], 256), ([5] * 9, 64), ([5] * 10, 256), ([5] * 13, 1024), ([20] * 12, 256)],
)
def test_prefill_bucket_has_a_row_for_every_piece(lengths, bucket):
    config = EngineConfig(max_num_seqs=64)
    pieces = [Piece(make_request(n, slot=i + 1), 0, n, True, i + 1) for i, n in enumerate(lengths)]
    assert packing.prefill_bucket(pieces, config.prefill_buckets, config.prefill_rows_of) == bucket
    rows = config.prefill_rows_of(bucket)
    batch = packing.pack_prefill(pieces, tokens=bucket, rows=rows, table_width=1)
    assert batch.length.tolist() == lengths + [0] * (rows - len(lengths))


def test_prefill_bucket_has_room_for_every_chunk():
    """Cut at a checkpoint, each of these has two."""
    config = EngineConfig(max_num_seqs=64)
    pieces = [Piece(make_request(6, slot=i), 0, 6, True, i, ((4, 20 + i),)) for i in range(1, 7)]
    assert packing.prefill_bucket(pieces[:5], config.prefill_buckets, config.prefill_rows_of) == 64
    assert packing.prefill_bucket(pieces, config.prefill_buckets, config.prefill_rows_of) == 256


PIECES = st.lists(
    st.tuples(
        st.integers(0, 150), st.integers(1, 150), st.booleans(), st.integers(1, 30), st.sets(st.integers(1, 300))
    ),
    max_size=ROWS,
)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
@hypothesis.given(PIECES, st.integers(0, 100))
def test_prefill_batch_holds_every_token_once(drawn, padding):
    """For any pieces, forks and checkpoints, and any bucket, also one that is no multiple of CHUNK."""
    pieces = []
    for slot, (start, length, is_last, rest, positions) in enumerate(drawn, start=1):
        request = make_request(start + length + (0 if is_last else rest), slot=slot)
        request.blocks, request.num_cached = [slot, 10 + slot], start // 2
        # At most one off the grid, which is what the chunk table has room for.
        inside = sorted(p for p in positions if start < p <= start + length)
        kept = [p for p in inside if p % CHUNK == 0] + [p for p in inside if p % CHUNK][:1]
        checkpoints = tuple((p, 50 + i) for i, p in enumerate(sorted(kept)))
        pieces.append(Piece(request, start, length, is_last, slot if start % 2 else 30 + slot, checkpoints))
    # A bucket is at least a chunk for each cut piece.
    tokens = max(1, sum(piece.length for piece in pieces)) + padding + CHUNK * len(pieces)
    batch = packing.pack_prefill(pieces, tokens=tokens, rows=ROWS, table_width=3)
    place = 0
    for row, piece in enumerate(pieces):
        prompt = piece.request.prompt_token_ids
        here = slice(place, place + piece.length)
        assert (batch.slot[row], batch.start[row], batch.length[row]) == (piece.request.slot, place, piece.length)
        assert (batch.is_last[row], batch.read_slot[row]) == (piece.is_last, piece.read_slot)
        assert batch.kv_start[row] == piece.request.num_cached
        np.testing.assert_array_equal(batch.block_table[row], [*piece.request.blocks, 0])
        np.testing.assert_array_equal(batch.tokens[here], prompt[piece.start : piece.end])
        assert (batch.token_row[here] == row).all()
        assert batch.token_valid[here].all()
        following = prompt[piece.start + 1 : piece.end + 1]
        expected = [*following, *[NO_TOKEN] * (piece.length - len(following))]
        np.testing.assert_array_equal(batch.target[here], expected)
        check_chunks(batch, row, piece)
        place += piece.length
    assert not batch.token_valid[place:].any()
    assert (batch.target[place:] == NO_TOKEN).all()
    for values in (batch.slot, batch.length, batch.is_last, batch.read_slot, batch.block_table, batch.kv_start):
        assert not values[len(pieces) :].any()
    assert not batch.chunk_checkpoint[batch.chunk_length == 0].any()
    # The shapes depend on the bucket alone.
    assert len(batch.chunk_row) == len(batch.chunk_checkpoint) == max_chunks(tokens, ROWS)


def check_chunks(batch, row, piece):
    """In order, gapless, never across a multiple of CHUNK; a checkpoint stands at the end of its chunk."""
    position, kept = piece.start, {}
    table = np.stack([batch.chunk_row, batch.chunk_start, batch.chunk_length, batch.chunk_checkpoint], axis=1)
    for _, start, length, slot in table[(batch.chunk_row == row) & (batch.chunk_length > 0)].tolist():
        assert start - batch.start[row] == position - piece.start
        assert position // CHUNK == (position + length - 1) // CHUNK
        position += length
        assert position in (piece.end, *dict(piece.checkpoints)) or position % CHUNK == 0
        if slot:
            kept[position] = slot
    assert position == piece.end
    assert kept == dict(piece.checkpoints)


def test_step_without_checkpoints_has_no_code_for_them():
    piece = Piece(make_request(70), 0, 70, True, 1)
    assert (
        packing.pack_prefill([piece], tokens=128, rows=ROWS, table_width=1, checkpoints=False).chunk_checkpoint is None
    )


def test_resumed_request_is_fed_what_it_had_produced():
    request = make_request(5)
    request.output_token_ids = [7, 8, 9]
    batch = packing.pack_prefill([Piece(request, 3, 5, True, 1)], tokens=8, rows=1, table_width=1)
    np.testing.assert_array_equal(batch.tokens, [103, 104, 7, 8, 9, 0, 0, 0])
    # Prompt log-probabilities are of the prompt alone.
    np.testing.assert_array_equal(batch.target, [104, *[NO_TOKEN] * 7])


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
    admissions = [Admission(requests[0], 20, 7, 4), Admission(requests[1], 0, 0, 0)]
    batch = packing.pack_admissions(admissions, rows=ROWS, table_width=5)
    np.testing.assert_array_equal(batch.length, [20, 0, 0, 0])
    np.testing.assert_array_equal([batch.copy_from, batch.copy_to], [[7, 0, 0, 0], [4, 0, 0, 0]])
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
    batch = packing.pack_admissions([Admission(request, 0, 0, 0)], rows=1, table_width=1)
    assert batch.min_length[0] == 300
    assert batch.top_k[0] == (1 << 31) - 1


def test_logit_row_holds_bias_and_bans():
    request = make_request(3, logit_bias={4: 1.5, 101: -2.0, 7: -np.inf}, allowed_token_ids=[4, 101])
    request.logit_row, request.bad_words = 2, [[5], [6, 7, 8]]
    batch = packing.pack_logit_row(request, vocab_size=200, padded_vocab_size=204)
    assert batch.row == 2
    expected = np.full(204, -np.inf)
    expected[4], expected[101], expected[200:] = 1.5, -2.0, 0.0
    np.testing.assert_array_equal(batch.bias, np.float32(expected))
    np.testing.assert_array_equal(batch.bad_words[0], [*[NO_TOKEN] * (MAX_BAD_WORD_TOKENS - 1), 5])
    np.testing.assert_array_equal(batch.bad_words[1], [*[NO_TOKEN] * (MAX_BAD_WORD_TOKENS - 3), 6, 7, 8])
    assert (batch.bad_words[2:] == NO_TOKEN).all()
    assert (batch.recent == NO_TOKEN).all()


@pytest.mark.parametrize("produced", [[9], [9, 4, 9], [*range(10, 30), 4, 4]], ids=len)
def test_logit_row_of_a_resumed_request_has_its_last_tokens(produced):
    request = make_request(3, bad_words=["x"])
    request.output_token_ids = produced
    batch = packing.pack_logit_row(request, vocab_size=200, padded_vocab_size=204)
    recent = produced[-(MAX_BAD_WORD_TOKENS - 1) :]
    np.testing.assert_array_equal(batch.recent, [NO_TOKEN] * (MAX_BAD_WORD_TOKENS - 1 - len(recent)) + recent)


def test_logit_row_of_nobody_is_neutral():
    batch = packing.pack_logit_row(None, vocab_size=20, padded_vocab_size=20)
    assert batch.row == 0
    assert not batch.bias.any()
    assert (batch.bad_words == NO_TOKEN).all()


def counts_after(batches, rows: int, vocab_size: int) -> np.ndarray:
    """The table that was full of something else, after these batches."""
    table = np.full((rows, vocab_size), 77, np.uint16)
    for batch in batches:
        table[batch.emptied] = 0
        here = batch.token != NO_TOKEN
        # An entry is given once, in whichever batch.
        assert not table[batch.row[here], batch.token[here]].any()
        table[batch.row[here], batch.token[here]] = batch.value[here]
    return table


@pytest.mark.parametrize("length", [3, 5000])
def test_counts_of_a_request_are_those_of_its_tokens(length):
    """Of one that comes and of one that was preempted; many distinct tokens take several steps."""
    numbers = np.random.default_rng(length)
    fresh, resumed, other = (make_request(length, presence_penalty=1.5) for _ in range(3))
    fresh.count_row, resumed.count_row = 2, 3
    for request in (fresh, resumed):
        request.prompt_token_ids = numbers.integers(0, 9000, length).tolist()
    resumed.output_token_ids = [*numbers.integers(0, 9000, 2 * length).tolist(), *[5] * (MOST_COUNTED + 9)]
    batches = packing.pack_counts([fresh, other, resumed], 9000, rows=4)
    assert (len(batches) > 5) == (length > 3)
    table = counts_after(batches, 5, 9000)
    assert (table[[1, 4]] == 77).all()
    for request in (fresh, resumed):
        counts = np.minimum(np.bincount(request.output_token_ids, minlength=9000), MOST_COUNTED)
        entries = counts | np.isin(np.arange(9000), request.prompt_token_ids) * IN_PROMPT
        np.testing.assert_array_equal(table[request.count_row], entries)
    assert table[3, 5] & MOST_COUNTED == MOST_COUNTED


def test_nobody_with_penalties_needs_no_step():
    assert packing.pack_counts([make_request(5), make_request(5, logit_bias={1: 2.0})], 300, rows=4) == []


@pytest.mark.parametrize("drafts", [False, True])
def test_decode_batch_lists_slots_and_pads_with_null(drafts):
    requests = [make_request(slot=4), make_request(slot=2)]
    growth = {1: [Growth(3, 17), Growth(4, 9)]}
    batch = packing.pack_decode(requests, growth, [1, 4], rows=5, table_width=6, grown_width=3, drafts=drafts)
    np.testing.assert_array_equal(batch.slot, [4, 2, 0, 0, 0])
    # An index past the table changes nothing.
    np.testing.assert_array_equal(batch.grown_index, [[6, 6, 6], [3, 4, 6], *[[6, 6, 6]] * 3])
    np.testing.assert_array_equal(batch.grown_block, [[0, 0, 0], [17, 9, 0], *[[0, 0, 0]] * 3])
    if drafts:
        np.testing.assert_array_equal(batch.max_drafts, [0, 3, 0, 0, 0])
    else:
        assert batch.max_drafts is None


def test_decode_batch_of_nobody_is_padding():
    batch = packing.pack_decode([], {}, [], rows=2, table_width=6, grown_width=1, drafts=True)
    assert not batch.slot.any()
    assert not batch.max_drafts.any()
    assert (batch.grown_index == 6).all()


@pytest.mark.parametrize(
    ("drafts", "size", "blocks"), [(0, 1, 1), (0, 16, 1), (3, 1, 4), (3, 4, 1), (4, 4, 2), (7, 2, 4)]
)
def test_row_gets_at_most_the_blocks_of_what_it_may_emit(drafts, size, blocks):
    assert max_growth(drafts, size) == blocks


def test_seals_are_listed_in_order_and_counted():
    batch = packing.pack_seals([Seal(3, 3, 17), Seal(1, 6, 1 << 20)], rows=4)
    np.testing.assert_array_equal(batch.read_slot, [3, 1, 0, 0])
    np.testing.assert_array_equal(batch.write_slot, [3, 6, 0, 0])
    np.testing.assert_array_equal(batch.position, [17, 1 << 20, 0, 0])
    assert batch.count == 2
    assert all(values.dtype == np.int32 for values in (batch.read_slot, batch.write_slot, batch.position, batch.count))

"""Plans to padded batches: numpy arrays of a compiled size. A size that no bucket covers is an error."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gdnjax.batch import AdmitBatch, CountBatch, DecodeBatch, LogitRowBatch, MaskBatch, PrefillBatch, SealBatch
from gdnjax.sampling_params import MASK_BITS, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_STOP_TOKENS
from gdnjax.serving.plan import Admission, Growth, Piece, Seal, max_chunks
from gdnjax.serving.request import Request
from gdnjax.state import ALL_ALLOWED, IN_PROMPT, MOST_COUNTED, NO_TOKEN

COUNT_ENTRIES = 2048
"""Token counts that one step fills in: the distinct tokens of most prompts."""


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`. Raises ValueError where none does: never a silent recompile."""
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise ValueError(f"{size} exceeds the largest compiled bucket; compiled: {tuple(buckets)}")


def prefill_bucket(pieces: Sequence[Piece], buckets: Sequence[int], rows_of: Callable[[int], int]) -> int:
    """The smallest bucket of tokens that has room for these pieces' tokens, rows and chunks; see `bucket_for`."""
    chunks = sum(len(piece.chunks()) for piece in pieces)
    fits = [size for size in buckets if len(pieces) <= rows_of(size) and chunks <= max_chunks(size, rows_of(size))]
    return bucket_for(sum(piece.length for piece in pieces), fits)


def pack_admissions(admissions: Sequence[Admission], *, rows: int, table_width: int, tails: bool = True) -> AdmitBatch:
    """Up to `rows` requests; the padding rows reset slot 0 to what it is and copy block 0 to itself."""
    requests = [admission.request for admission in admissions]

    def column(values, dtype, padding):
        out = np.full((rows,), padding, dtype)
        out[: len(requests)] = list(values)
        return out

    stop_tokens = np.full((rows, MAX_STOP_TOKENS), NO_TOKEN, np.int32)
    block_table = np.zeros((rows, table_width), np.int32)
    seed = np.zeros((rows, 2), np.uint32)
    for i, request in enumerate(requests):
        stop_tokens[i, : len(request.stop_token_ids)] = request.stop_token_ids
        block_table[i, : len(request.blocks)] = request.blocks
        seed[i] = request.seed & 0xFFFFFFFF, request.seed >> 32
    params = [request.params for request in requests]
    return AdmitBatch(
        slot=column((r.slot for r in requests), np.int32, 0),
        length=column((admission.position for admission in admissions), np.int32, 0),
        max_length=column((r.max_length for r in requests), np.int32, 0),
        # Past max_length a minimum changes nothing, and it may exceed an int32.
        min_length=column((min(r.prompt_length + r.params.min_tokens, r.max_length) for r in requests), np.int32, 0),
        stop_tokens=stop_tokens,
        block_table=block_table,
        temperature=column((p.temperature for p in params), np.float32, 0),
        top_k=column((max(p.top_k, 0) for p in params), np.int32, 0),
        top_p=column((p.top_p for p in params), np.float32, 1),
        min_p=column((p.min_p for p in params), np.float32, 0),
        seed=seed,
        repetition=column((p.repetition_penalty for p in params), np.float32, 1),
        frequency=column((p.frequency_penalty for p in params), np.float32, 0),
        presence=column((p.presence_penalty for p in params), np.float32, 0),
        count_row=column((r.count_row for r in requests), np.int32, 0),
        logit_row=column((r.logit_row for r in requests), np.int32, 0),
        copy_from=column((admission.copy_from for admission in admissions), np.int32, 0) if tails else None,
        copy_to=column((admission.copy_to for admission in admissions), np.int32, 0) if tails else None,
    )


def pack_counts(requests: Sequence[Request], vocab_size: int, *, rows: int) -> list[CountBatch]:
    """What fills the count rows of those that have one: up to `rows` of them, each counted from its tokens."""
    counted = [request for request in requests if request.count_row]
    if not counted:
        return []
    found = [_token_counts(request, vocab_size) for request in counted]
    row = np.concatenate(
        [np.full(len(tokens), request.count_row) for request, (tokens, _) in zip(counted, found, strict=True)]
    )
    token, value = (np.concatenate(column) for column in zip(*found, strict=True))
    cuts = range(0, len(row), COUNT_ENTRIES)
    entries = [tuple(column[cut : cut + COUNT_ENTRIES] for column in (row, token, value)) for cut in cuts]
    # The first step empties the rows, before it fills them.
    emptied = [[request.count_row for request in counted], *[[]] * (len(entries) - 1)]
    return [count_batch(rows_now, now, rows=rows) for rows_now, now in zip(emptied, entries, strict=True)]


def count_batch(emptied: Sequence[int], entries: Sequence[np.ndarray], *, rows: int) -> CountBatch:
    """A batch of these entries: rows, tokens and values."""
    fields = (np.zeros(COUNT_ENTRIES, np.int32), np.full(COUNT_ENTRIES, NO_TOKEN, np.int32))
    fields += (np.zeros(COUNT_ENTRIES, np.uint16),)
    for field, values in zip(fields, entries, strict=False):
        field[: len(values)] = values
    out = np.zeros(rows, np.int32)
    out[: len(emptied)] = emptied
    return CountBatch(out, *fields)


def _token_counts(request: Request, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens of a request, and what ServeState.token_counts has of each. One that was preempted has
    produced some already.
    """
    entry = np.zeros(vocab_size, np.uint16)
    entry[request.prompt_token_ids] = IN_PROMPT
    if request.output_token_ids:
        times = np.bincount(request.output_token_ids, minlength=vocab_size)
        entry |= np.minimum(times, MOST_COUNTED).astype(np.uint16)
    tokens = np.flatnonzero(entry != 0)
    return tokens, entry[tokens]


def pack_logit_row(request: Request | None, vocab_size: int, padded_vocab_size: int) -> LogitRowBatch:
    """The row of a request that needs one; None gives what resets the null row."""
    bias = np.zeros((padded_vocab_size,), np.float32)
    recent = np.full((MAX_BAD_WORD_TOKENS - 1,), NO_TOKEN, np.int32)
    bad_words = np.full((MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32)
    if request is not None:
        params = request.params
        # A request that was preempted has produced tokens already.
        last = request.output_token_ids[-len(recent) :]
        recent[len(recent) - len(last) :] = last
        if params.allowed_token_ids is not None:
            bias[:vocab_size] = -np.inf
            bias[list(params.allowed_token_ids)] = 0.0
        for token, value in (params.logit_bias or {}).items():
            bias[token] += value
        for i, word in enumerate(request.bad_words):
            bad_words[i, MAX_BAD_WORD_TOKENS - len(word) :] = word
    return LogitRowBatch(
        row=np.int32(request.logit_row if request is not None else 0),
        recent=recent,
        bias=bias,
        bad_words=bad_words,
    )


def pack_masks(masks: np.ndarray, *, rows: int, vocab_size: int, ranks: int) -> MaskBatch:
    """Masks [n, words] uint32 of up to `rows` requests; the other rows allow all. Each of `ranks` has words of its own
    for its part of the vocabulary.
    """
    width = -(-vocab_size // ranks)
    words = np.full((rows, ranks * -(-width // MASK_BITS)), ALL_ALLOWED)
    if len(masks):
        # Parts that end with a word stand in the masks as they are.
        masks = masks if width % MASK_BITS == 0 or ranks == 1 else _cut_anew(masks, width, ranks)
        words[: len(masks)] = 0
        words[: len(masks), : masks.shape[1]] = masks
    return MaskBatch(words)


def _cut_anew(masks: np.ndarray, width: int, ranks: int) -> np.ndarray:
    """Masks whose words begin anew at each multiple of `width` tokens."""
    bits = np.unpackbits(masks.astype("<u4").view(np.uint8), axis=1, bitorder="little")[:, : width * ranks]
    bits = np.pad(bits, ((0, 0), (0, width * ranks - bits.shape[1]))).reshape(len(masks), ranks, width)
    bits = np.pad(bits, ((0, 0), (0, 0), (0, -width % MASK_BITS)))
    return np.packbits(bits, axis=2, bitorder="little").reshape(len(masks), -1).view("<u4").astype(np.uint32)


def pack_prefill(
    pieces: Sequence[Piece],
    *,
    tokens: int,
    rows: int,
    table_width: int,
    checkpoints: bool = True,
    mask_rows: Mapping[Request, int] | None = None,
) -> PrefillBatch:
    """Pieces one after another in `tokens` places, with the chunk table and the rows' block tables.

    Without `checkpoints` no piece may want one, and the step has no code for them; nor for masks without `mask_rows`,
    which are those of the requests that have one.
    """
    num_chunks = max_chunks(tokens, rows)
    batch = PrefillBatch(
        tokens=np.zeros((tokens,), np.int32),
        token_row=np.zeros((tokens,), np.int32),
        token_valid=np.zeros((tokens,), bool),
        slot=np.zeros((rows,), np.int32),
        start=np.zeros((rows,), np.int32),
        length=np.zeros((rows,), np.int32),
        is_last=np.zeros((rows,), bool),
        chunk_row=np.zeros((num_chunks,), np.int32),
        chunk_start=np.zeros((num_chunks,), np.int32),
        chunk_length=np.zeros((num_chunks,), np.int32),
        target=np.full((tokens,), NO_TOKEN, np.int32),
        read_slot=np.zeros((rows,), np.int32),
        block_table=np.zeros((rows, table_width), np.int32),
        kv_start=np.zeros((rows,), np.int32),
        chunk_checkpoint=np.zeros((num_chunks,), np.int32) if checkpoints else None,
        mask_row=_mask_column([piece.request for piece in pieces], mask_rows, rows),
    )
    place = chunk = 0
    for row, piece in enumerate(pieces):
        request = piece.request
        here = slice(place, place + piece.length)
        batch.tokens[here] = request.tokens(piece.start, piece.end)
        successors = request.prompt_token_ids[piece.start + 1 : piece.end + 1]
        batch.target[place : place + len(successors)] = successors
        batch.token_row[here] = row
        batch.token_valid[here] = True
        batch.slot[row], batch.read_slot[row] = request.slot, piece.read_slot
        batch.block_table[row, : len(request.blocks)] = request.blocks
        batch.kv_start[row] = request.num_cached
        batch.start[row], batch.length[row], batch.is_last[row] = place, piece.length, piece.is_last
        for start, length, slot in piece.chunks():
            batch.chunk_row[chunk] = row
            batch.chunk_start[chunk] = place + start - piece.start
            batch.chunk_length[chunk] = length
            if slot:
                batch.chunk_checkpoint[chunk] = slot
            chunk += 1
        place += piece.length
    return batch


def _mask_column(requests: Sequence[Request], mask_rows: Mapping[Request, int] | None, rows: int) -> np.ndarray | None:
    if mask_rows is None:
        return None
    column = np.zeros((rows,), np.int32)
    if mask_rows:
        column[: len(requests)] = [mask_rows.get(request, 0) for request in requests]
    return column


def pack_decode(
    requests: Sequence[Request],
    growth: Mapping[int, Sequence[Growth]],
    bounds: Sequence[int],
    *,
    rows: int,
    table_width: int,
    grown_width: int,
    drafts: bool,
    mask_rows: Mapping[Request, int] | None = None,
) -> DecodeBatch:
    """Rows of decoding requests with their `bounds`; `growth`, up to `grown_width` blocks each, is by row.

    An index past the table is one that nobody has. Without `drafts` the step has no code for them, nor for masks
    without `mask_rows`.
    """
    slot = np.zeros((rows,), np.int32)
    slot[: len(requests)] = [request.slot for request in requests]
    index = np.full((rows, grown_width), table_width, np.int32)
    block = np.zeros((rows, grown_width), np.int32)
    for row, blocks in growth.items():
        for place, grown in enumerate(blocks):
            index[row, place], block[row, place] = grown.index, grown.block
    max_drafts = None
    if drafts:
        max_drafts = np.zeros((rows,), np.int32)
        max_drafts[: len(bounds)] = bounds
        max_drafts[: len(bounds)] -= 1
    return DecodeBatch(
        slot=slot,
        grown_index=index,
        grown_block=block,
        max_drafts=max_drafts,
        mask_row=_mask_column(requests, mask_rows, rows),
    )


def pack_seals(seals: Sequence[Seal], *, rows: int) -> SealBatch:
    """Up to `rows` seals."""
    fields = np.zeros((3, rows), np.int32)
    for i, seal in enumerate(seals):
        fields[:, i] = seal.read_slot, seal.write_slot, seal.position
    return SealBatch(read_slot=fields[0], write_slot=fields[1], position=fields[2], count=np.int32(len(seals)))

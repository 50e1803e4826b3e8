"""Checkpoints, forks from them, seals, copies of blocks, and growth: in exact integers, and in float32.

The ledger's integers see every wrong slot, position, window, block and layout bit; its oracle knows of none of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import build_model
from gdnjax.batch import LogitRowBatch
from gdnjax.cache import LAYOUT_KV, LAYOUT_VK
from gdnjax.config import ATTENTION, MlpKind
from gdnjax.sampling_params import MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS
from gdnjax.state import NO_TOKEN
from gdnjax.step import fill_logit_row
from tests.driver import BLOCK, NUM_BLOCKS, Admission, Driver, Piece
from tests.float64 import reference
from tests.ledger import KEY_DIM, VALUE_DIM, LedgerModel, Oracle
from tests.micro import MICRO, A, D, made
from tests.pools import pool_of, with_pools

pytestmark = pytest.mark.usefixtures("quickly_compiled")

POSITIONS = (1, 16, 48, 63, 65, 100)
"""Within a window of the start, at the end of a block, and anywhere in a chunk."""

PROMPT_LENGTH = 130
BLOCKS = tuple(range(1, 11))
"""Of the request whose prompt is cached; forks share the full ones."""

ROW = ("ssm", "conv", "layout", "hidden")


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, 61, length).tolist()


@functools.cache
def oracle(mtp: bool = False) -> Oracle:
    return Oracle(LedgerModel(mtp=mtp))


def oracle_of(driver: Driver) -> Oracle:
    return oracle(driver.model.mtp)


@functools.cache
def ledger_driver(state_layout: str, num_drafts: int = 0) -> Driver:
    model = LedgerModel(mtp=num_drafts > 0)
    return Driver(model, model.params(), state_layout, num_drafts)


SMALL = dataclasses.replace(
    MICRO,
    layer_kinds=(D, A, D, A),
    mlp_kinds=(MlpKind.DENSE, MlpKind.MOE, MlpKind.DENSE, MlpKind.DENSE),
    mtp_layers=1,
)
"""Float32, two layers of each kind: the second delta layer sees what attention and the experts made of the tokens."""


@functools.cache
def float_driver(num_drafts: int = 0, kv_cache_dtype: str = "auto") -> Driver:
    mtp = num_drafts > 0
    params = made(SMALL, 3, mtp=mtp)
    return Driver(build_model(SMALL, "float32", mtp=mtp), params, "mixed", num_drafts, kv_cache_dtype)


LEDGERS = {
    "kv": functools.partial(ledger_driver, "kv"),
    "vk, 2 drafts": functools.partial(ledger_driver, "vk", 2),
    "mixed": functools.partial(ledger_driver, "mixed"),
    "mixed, 3 drafts": functools.partial(ledger_driver, "mixed", 3),
}

SHORT = "mixed, 3 drafts"
"""Both layouts, pending rows, and a head: what the short run drives."""

DRIVERS = LEDGERS | {
    "float32, mixed": float_driver,
    "float32, mixed, 2 drafts": functools.partial(float_driver, 2),
    "float32, mixed, int8 keys": functools.partial(float_driver, 0, "int8"),
}


def with_short(names) -> list:
    return [name if name == SHORT else pytest.param(name, marks=pytest.mark.thorough) for name in names]


@pytest.fixture(params=with_short(DRIVERS))
def driver(request) -> Driver:
    """With poisoned pools."""
    driver = DRIVERS[request.param]()
    driver.poison()
    return driver


@pytest.fixture(params=with_short(LEDGERS))
def ledger(request) -> Driver:
    driver = LEDGERS[request.param]()
    driver.poison()
    return driver


@pytest.fixture(params=[pytest.param(0, marks=pytest.mark.thorough), 3])
def mixed(request) -> Driver:
    driver = ledger_driver("mixed", request.param)
    driver.poison()
    return driver


@pytest.fixture(params=with_short(["vk, 2 drafts", "mixed, 3 drafts"]))
def speculating(request) -> Driver:
    driver = LEDGERS[request.param]()
    driver.poison()
    return driver


def assert_rows_equal(one: dict, other: dict) -> None:
    for name in ROW:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def run_whole(driver: Driver, prompt, checkpoints, slot: int = 1) -> int:
    """Prefills a prompt into BLOCKS; the first token."""
    driver.admit(Admission(slot))
    emitted = driver.prefill(Piece(slot, BLOCKS, prompt, checkpoints=checkpoints))
    return int(emitted.tokens[0, 0])


def fork_blocks(position: int, own: range) -> tuple[list[int], tuple[int, int]]:
    """The blocks of a fork at `position` of BLOCKS: what is full is shared, and the copy of what is not."""
    shared = position // BLOCK
    copy = (BLOCKS[shared], own[0]) if position % BLOCK else (0, 0)
    return [*BLOCKS[:shared], *own][: len(BLOCKS)], copy


def fork(driver: Driver, slot: int, position: int, read_slot: int, suffix, own: range, cuts=()) -> int:
    """Goes on from a checkpoint at `position` of BLOCKS; the first token."""
    blocks, copy = fork_blocks(position, own)
    driver.admit(Admission(slot, length=position, copy=copy))
    checkpoints = dict.fromkeys(cuts, 0)
    emitted = driver.prefill(Piece(slot, blocks, suffix, position, read_slot, checkpoints=checkpoints))
    return int(emitted.tokens[0, 0])


def test_checkpoint_is_what_the_piece_that_ends_there_leaves(driver):
    """State, window, layout bit and last hidden state, bit for bit: also in float32, where both are cut alike."""
    prompt = prompt_of(0, PROMPT_LENGTH)
    checkpoints = {position: 2 + i for i, position in enumerate(POSITIONS)}
    run_whole(driver, prompt, checkpoints)
    kept = {position: driver.row(slot) for position, slot in checkpoints.items()}
    for position in POSITIONS:
        driver.admit(Admission(10))
        cuts = {cut: 0 for cut in POSITIONS if cut < position}
        driver.prefill(Piece(10, range(20, 30), prompt[:position], checkpoints=cuts))
        assert_rows_equal(kept[position], driver.row(10))


def test_fork_goes_on_as_the_whole_run(driver):
    """What it leaves in its slot is what the whole run left, bit for bit; the checkpoint stays as it was."""
    prompt = prompt_of(1, PROMPT_LENGTH)
    checkpoints = {position: 2 + i for i, position in enumerate(POSITIONS)}
    first = run_whole(driver, prompt, checkpoints)
    whole = driver.row(1)
    for position, slot in checkpoints.items():
        before = driver.row(slot)
        later = [cut for cut in POSITIONS if cut > position]
        assert fork(driver, 10, position, slot, prompt[position:], range(20, 30), later) == first
        assert_rows_equal(driver.row(10), whole)
        assert_rows_equal(driver.row(slot), before)


def test_forks_of_one_checkpoint_equal_solo_runs(ledger):
    """Side by side, with other continuations, and on through decoding; the tail block is each one's own."""
    prompt = prompt_of(2, PROMPT_LENGTH)
    first = run_whole(ledger, prompt, {100: 2})
    suffixes = [prompt_of(3, 30), prompt_of(4, 1)]
    owns = (range(11, 16), range(16, 21))
    pieces = []
    for slot, suffix, own in zip((3, 4), suffixes, owns, strict=True):
        blocks, copy = fork_blocks(100, own)
        ledger.admit(Admission(slot, length=100, copy=copy))
        pieces.append(Piece(slot, blocks, suffix, 100, read_slot=2))
    emitted = ledger.prefill(*pieces)
    produced = [[first], *[[int(token)] for token in emitted.tokens[:2, 0]]]
    for _ in range(5):
        for tokens, more in zip(produced, ledger.decode(1, 3, 4), strict=True):
            tokens += more
    prompts = [prompt, *[prompt[:100] + suffix for suffix in suffixes]]
    for whole, tokens in zip(prompts, produced, strict=True):
        assert tokens == oracle_of(ledger).solo_run(whole, len(tokens))


def test_fork_from_before_its_cached_blocks_leaves_those_as_they_are(driver):
    """The state stands at 48 and the blocks up to 112: the tokens between are folded again, and not stored again."""
    prompt = prompt_of(13, PROMPT_LENGTH)
    first = run_whole(driver, prompt, {48: 2, 65: 0})
    whole = driver.row(1)
    piece = Piece(3, [*BLOCKS[:7], 20, 21, 22], prompt[48:], 48, read_slot=2, checkpoints={65: 0}, kv_start=112)
    driver.admit(Admission(3, length=48))
    assert driver.prefill(piece).tokens[0, 0] == first
    assert_rows_equal(driver.row(3), whole)
    # Stored again, keys would be the same; so others stand there.
    ones = {name: jnp.ones_like(pool_of(driver.state, name)) for name in ("k", "v")}
    driver.state = with_pools(driver.state, **ones)
    before = leaves_of(driver)
    driver.admit(Admission(3, length=48))
    driver.prefill(piece)
    assert_unchanged_but(before, leaves_of(driver), slots=(3,), blocks=(20, 21))


@pytest.mark.parametrize("length", [63, 64, 65])
def test_sealed_decode_serves_forks(ledger, length):
    """A checkpoint of the end of a turn: in a mixed pool it is VK, and the fork's prefill reads it so."""
    prompt, more = prompt_of(5, length), prompt_of(6, 40)
    produced = [run_whole(ledger, prompt, {}), *ledger.produce(1, 7)]
    held = prompt + produced[:-1]
    ledger.seal((1, 5, len(held)))
    assert_row_is(ledger, 5, held)
    suffix = [produced[-1], *more]
    token = fork(ledger, 3, len(held), 5, suffix, range(11, 16))
    found = [token, *ledger.produce(3, 5)]
    assert found == oracle_of(ledger).solo_run(held + suffix, len(found))
    # The slot that was read goes on as if nothing had been.
    produced += ledger.produce(1, 4)
    assert produced == oracle_of(ledger).solo_run(prompt, len(produced))


def test_checkpoint_with_a_stale_layout_bit_is_seen(mixed):
    prompt = prompt_of(5, 64)
    produced = [run_whole(mixed, prompt, {}), *mixed.produce(1, 1)]
    held = prompt + produced[:-1]
    mixed.seal((1, 5, len(held)))
    assert mixed.row(5)["layout"] == LAYOUT_VK
    assert_row_is(mixed, 5, held)
    # Long enough that all tokens can hardly be those of the guess that a model with a head goes by.
    suffix = [produced[-1], *prompt_of(6, 1)]
    expected = oracle_of(mixed).solo_run(held + suffix, 12)
    mixed.state = with_pools(mixed.state, layout=pool_of(mixed.state, "layout").at[5].set(LAYOUT_KV))
    found = [fork(mixed, 3, len(held), 5, suffix, range(11, 16)), *mixed.produce(3, 11)]
    assert found[:12] != expected


def assert_row_is(driver: Driver, slot: int, tokens) -> None:
    """A slot of the ledger model is a checkpoint behind these tokens, to the bit, whatever its layout."""
    row, expected = driver.row(slot), oracle_of(driver).row(tokens)
    if row["layout"] == LAYOUT_VK:
        shape = expected["ssm"].shape
        turned = expected["ssm"].reshape(*shape[:2], KEY_DIM, VALUE_DIM).swapaxes(2, 3)
        expected["ssm"] = turned.reshape(shape)
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)
    assert row["pending"] == 0


def run_until_pending(driver: Driver, prompt, count: int) -> list[int]:
    """Prompt and output of slot 1, decoded until its last step has left `count` rows pending."""
    tokens = [*prompt, run_whole(driver, prompt, {})]
    while True:
        more = driver.decode(1)[0]
        tokens += more
        if len(more) == count:
            return tokens


@pytest.mark.parametrize("count", [1, 2, 3])
def test_state_is_sealed_at_every_position_of_its_pending_rows(speculating, count):
    """Those that the state has passed, and those that it has not come to, are left alone."""
    tokens = run_until_pending(speculating, prompt_of(14, 45), count)
    length = len(tokens) - 1
    assert speculating.row(1)["pending"] == count
    for position in range(length - count, length + 1):
        before = leaves_of(speculating)
        speculating.seal((1, 5, position))
        assert_row_is(speculating, 5, tokens[:position])
        assert_unchanged_but(before, leaves_of(speculating), slots=(5,))
    for position in (length - count - 1, length + 1, 0):
        before = leaves_of(speculating)
        speculating.seal((1, 5, position))
        assert_unchanged_but(before, leaves_of(speculating))
    tokens += speculating.produce(1, 6)
    assert tokens[45:] == oracle_of(speculating).solo_run(tokens[:45], len(tokens) - 45)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_state_is_sealed_in_place(speculating, dropped):
    """At the end of a turn, also where a stop string has cut off tokens that had been accepted; once for all."""
    tokens = run_until_pending(speculating, prompt_of(15, 45), 3)
    position = len(tokens) - 1 - dropped
    speculating.seal((1, 1, position))
    assert_row_is(speculating, 1, tokens[:position])
    before = leaves_of(speculating)
    # The slot table has the length of whoever ran here, so a second time it is out of reach, or in place.
    speculating.seal((1, 1, position))
    assert_unchanged_but(before, leaves_of(speculating))
    suffix = prompt_of(16, 20)
    found = [fork_of(speculating, 3, 1, tokens[:position], suffix), *speculating.produce(3, 6)]
    assert found == oracle_of(speculating).solo_run(tokens[:position] + suffix, len(found))


def fork_of(driver: Driver, slot: int, read_slot: int, held, suffix) -> int:
    return fork(driver, slot, len(held), read_slot, suffix, range(11, 22))


def test_a_mark_is_written_once_though_it_is_given_in_every_step(speculating):
    """As the host does it: from before the state can have come so far, until it is seen to be there."""
    tokens = [*prompt_of(17, 40), run_whole(speculating, prompt_of(17, 40), {})]
    position, written = 47, []
    while len(tokens) < 60:
        before = speculating.row(5)
        speculating.seal((1, 5, position))
        after = speculating.row(5)
        written += [len(tokens) - 1] * any((leaf != after[name]).any() for name, leaf in before.items())
        tokens += speculating.decode(1)[0]
    assert_row_is(speculating, 5, tokens[:position])
    (length,) = written
    assert position <= length <= position + speculating.options.num_drafts


def test_steps_with_other_numbers_of_drafts_give_the_same_tokens(speculating):
    """Fewer drafts, none, and a bound of one row: the drafts that are made depend on the tokens alone."""
    prompt, most = prompt_of(18, 30), speculating.options.num_drafts
    tokens, drafts = [*prompt, run_whole(speculating, prompt, {})], most
    for step in range(24):
        allowed, bound = (most, 0, 1, most)[step % 4], (most, most, most, 1)[step % 4]
        ((more, drafted),) = speculating.verify(1, num_drafts=allowed, max_drafts={1: bound})
        # As many as the step before has made, at most.
        assert drafted == min(drafts, allowed, bound)
        assert len(more) == 1 + oracle_of(speculating).num_accepted(tokens, drafted)
        tokens, drafts = tokens + more, allowed
    assert tokens[30:] == oracle_of(speculating).solo_run(prompt, len(tokens) - 30)


def test_keys_of_the_head_are_those_of_the_oracle(speculating):
    """Of prompt, output and the token that is fed next, in every layer, whatever rejected drafts have left behind."""
    prompt = prompt_of(19, 50)
    tokens = [*prompt, run_whole(speculating, prompt, {50: 2, 33: 3}), *speculating.produce(1, 30)]
    assert_keys_are(speculating, BLOCKS, tokens[:-1])
    head = keys_of(speculating, BLOCKS, len(tokens))[:, -1]
    np.testing.assert_array_equal(head[:, 1:], oracle_of(speculating).entries(tokens, 0)[:, -1, 1:])
    # A fork goes on from the hidden state of its checkpoint.
    suffix = prompt_of(20, 9)
    found = [fork(speculating, 4, 33, 3, suffix, range(11, 22)), *speculating.produce(4, 20)]
    assert_keys_are(speculating, fork_blocks(33, range(11, 22))[0], [*prompt[:33], *suffix, *found[:-1]])


def keys_of(driver: Driver, blocks, count: int) -> np.ndarray:
    """[2, L, t, kh, hd] of the first `count` tokens in blocks."""
    pools = np.stack(
        [np.asarray(pool[:, np.array(blocks)]) for pool in (pool_of(driver.state, "k"), pool_of(driver.state, "v"))]
    )
    return pools.reshape(*pools.shape[:2], -1, *pools.shape[4:])[:, :, :count]


def assert_keys_are(driver: Driver, blocks, tokens) -> None:
    """But for index 0 of the head, where there is no hidden state before the token."""
    found, expected = keys_of(driver, blocks, len(tokens)), oracle_of(driver).entries(tokens, 0)
    found[:, -1, 0] = expected[:, -1, 0]
    np.testing.assert_array_equal(found, expected)


def leaves_of(driver: Driver) -> dict[str, np.ndarray]:
    """Copies of every leaf of the state, by path."""
    found = jax.tree_util.tree_flatten_with_path(jax.device_get(driver.state))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf) for path, leaf in found}


def assert_unchanged_but(before: dict, after: dict, slots=(), blocks=()) -> None:
    """All leaves are the same, but for the rows of slots and blocks named here and the null ones."""
    for name, leaf in before.items():
        axis = 1 if name.startswith("cache.") and not name.endswith(".layout") else 0
        changed = [0, *(blocks if name.startswith("cache.pages.") else slots)]
        if name.startswith(("logit_rows.", "token_counts", "masks")):
            changed = []
        np.testing.assert_array_equal(
            np.delete(leaf, changed, axis), np.delete(after[name], changed, axis), err_msg=name
        )


def test_prefill_changes_its_slots_checkpoints_and_blocks_alone(driver):
    before = leaves_of(driver)
    driver.admit(Admission(1))
    driver.prefill(Piece(1, BLOCKS[:3], prompt_of(7, 40), checkpoints={30: 6}))
    after = leaves_of(driver)
    assert_unchanged_but(before, after, slots=(1, 6), blocks=BLOCKS[:3])
    # Of a checkpoint's slot nothing but the row changes: it is nobody's request.
    for name, leaf in before.items():
        if name.startswith("slots.") and name != "slots.hidden":
            np.testing.assert_array_equal(leaf[6], after[name][6], err_msg=name)


def test_row_without_tokens_keeps_its_hidden_state(ledger):
    run_whole(ledger, prompt_of(8, 20), {})
    before = ledger.row(1)
    ledger.prefill(Piece(1, BLOCKS, []))
    np.testing.assert_array_equal(ledger.row(1)["hidden"], before["hidden"])


def test_done_rows_write_no_hidden_state(ledger):
    run_whole(ledger, prompt_of(8, 20), {})
    ledger.decode(1)
    slots = ledger.state.slots
    ledger.state = dataclasses.replace(ledger.state, slots=dataclasses.replace(slots, done=slots.done.at[1].set(True)))
    before = leaves_of(ledger)
    assert ledger.decode(1) == [[]]
    assert_unchanged_but(before, leaves_of(ledger))


def test_admission_forgets_the_hidden_state_and_takes_the_length(ledger):
    ledger.admit(Admission(2, length=33), Admission(3))
    slots = jax.device_get(ledger.state.slots)
    assert not slots.hidden[[2, 3]].any()
    assert (slots.length[2], slots.length[3]) == (33, 0)


def test_admission_copies_its_blocks_and_nothing_else(driver):
    """All copies see the blocks as they stood before."""
    numbers = np.random.default_rng(1)
    entries = driver.state.cache.pages[ATTENTION]
    filled = {name: numbers.integers(0, 1 << 20, pool.shape).astype(pool.dtype) for name, pool in entries.items()}
    driver.state = with_pools(driver.state, **filled)
    before = leaves_of(driver)
    driver.admit(Admission(2, length=5, copy=(7, 8)), Admission(3, length=5, copy=(8, NUM_BLOCKS)))
    after = leaves_of(driver)
    assert_unchanged_but(before, after, slots=(2, 3), blocks=(8, NUM_BLOCKS))
    for name in (f"cache.pages.{ATTENTION}.{pool}" for pool in entries):
        np.testing.assert_array_equal(after[name][:, 8], before[name][:, 7])
        np.testing.assert_array_equal(after[name][:, NUM_BLOCKS], before[name][:, 8])


def test_sealed_rows_are_whole_and_nothing_else_changes(driver):
    """Without pending rows: of slots that hold a state of that length, and what stands past the count is not seen."""
    slots = driver.state.slots
    length = slots.length.at[np.array([1, 3, 5])].set(np.array([7, 8, 7]))
    driver.state = dataclasses.replace(driver.state, slots=dataclasses.replace(slots, length=length))
    if driver.state.slots.pending is not None:
        slots = dataclasses.replace(driver.state.slots, pending=jnp.zeros_like(driver.state.slots.pending))
        driver.state = dataclasses.replace(driver.state, slots=slots)
    before = {slot: driver.row(slot) for slot in (1, 3, 4, 8)}
    leaves = leaves_of(driver)
    driver.seal((1, 5, 7), (3, 6, 8), (1, 4, 8), (3, 8, 8), count=3)
    for slot, source in ((1, 1), (5, 1), (6, 3), (3, 3), (4, 4), (8, 8)):
        assert_same_checkpoint(driver.row(slot), before[source])
    assert_unchanged_but(leaves, leaves_of(driver), slots=(5, 6))


def assert_same_checkpoint(one: dict, other: dict) -> None:
    """Bit for bit, but for the layout: a seal may turn a row."""
    for name in ("conv", "hidden"):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    if one["layout"] == other["layout"]:
        np.testing.assert_array_equal(one["ssm"], other["ssm"])


def test_no_seals_change_nothing(mixed):
    before = leaves_of(mixed)
    mixed.seal((1, 5, int(mixed.state.slots.length[1])), count=0)
    assert_unchanged_but(before, leaves_of(mixed), slots=())


def test_request_that_grows_equals_its_solo_run(ledger):
    """Its blocks come with the steps that write into them. Its neighbour has all it can use, and keeps them."""
    prompts = [prompt_of(9, 30), prompt_of(10, 20)]
    whole = list(range(20, 20 + ledger.table_width))
    ledger.admit(Admission(1), Admission(2))
    emitted = ledger.prefill(Piece(1, [1, 2], prompts[0]), Piece(2, whole, prompts[1]))
    produced = [[int(token)] for token in emitted.tokens[:2, 0]]
    # The head has a key for the token that is fed next, and drafts may be fed behind it.
    reach, places = 1 + 2 * ledger.options.num_drafts, 2 * BLOCK
    while len(produced[0]) < 36:
        grown = None
        if 30 + len(produced[0]) + reach > places:
            grown, places = {1: (places // BLOCK, 10 + places // BLOCK)}, places + BLOCK
        most = {1: 35 - len(produced[0])}
        for tokens, more in zip(produced, ledger.decode(1, 2, grown=grown, max_drafts=most), strict=True):
            tokens += more
    for prompt, tokens in zip(prompts, produced, strict=True):
        assert tokens == oracle_of(ledger).solo_run(prompt, len(tokens))
    table = np.asarray(ledger.state.slots.block_table)
    count = places // BLOCK
    assert count >= 5
    assert table[1].tolist() == [1, 2, *range(12, 10 + count), *[0] * (ledger.table_width - count)]
    assert table[2].tolist() == whole
    assert not table[0].any()


def test_refilled_logit_row_remembers_what_was_produced():
    """A request that comes back after preemption has its last tokens as they were."""
    state = ledger_driver("mixed").state
    vocab = state.logit_rows.bias.shape[1]
    recent = np.arange(MAX_BAD_WORD_TOKENS - 1, dtype=np.int32)
    batch = LogitRowBatch(
        row=np.int32(1),
        recent=recent,
        bias=np.zeros(vocab, np.float32),
        bad_words=np.full((MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32),
    )
    rows = fill_logit_row(state, batch).logit_rows
    np.testing.assert_array_equal(rows.recent[1], recent)
    assert (np.asarray(rows.recent[0]) == NO_TOKEN).all()


BOUND = 1e-5
"""Of max|x - float64| / max|x|, as in tests/serving/test_exactness.py; a state of another position is off by 0.1."""


def assert_near_float64(row: dict, params, tokens) -> None:
    """Of a row that a prefill step wrote: states in KV order."""
    expected = reference(SMALL, params, tokens)
    ssm = row["ssm"].reshape(row["ssm"].shape[0], *expected.states[0].shape)
    pairs = [*zip(ssm, expected.states, strict=True), *zip(row["conv"], expected.windows, strict=True)]
    for found, exact in [*pairs, (row["hidden"], expected.hidden[-1])]:
        assert np.abs(found - exact).max() <= BOUND * np.abs(exact).max()


@pytest.mark.thorough
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_float32_checkpoints_and_forks_are_within_the_float64_bound(num_drafts):
    """However their runs are cut, and after a fork of what decode wrote."""
    driver = float_driver(num_drafts)
    driver.poison()
    prompt = prompt_of(11, PROMPT_LENGTH)
    run_whole(driver, prompt, {position: 2 + i for i, position in enumerate(POSITIONS)})
    for i, position in enumerate(POSITIONS):
        assert_near_float64(driver.row(2 + i), driver.params, prompt[:position])
    for position, slot in ((48, 4), (65, 6)):
        fork(driver, 10, position, slot, prompt[position:], range(20, 30))
        assert_near_float64(driver.row(10), driver.params, prompt)
    last = int(driver.state.slots.last_token[1])
    driver.decode(1)
    driver.seal((1, 2, PROMPT_LENGTH + 1))
    assert driver.row(2)["layout"] == LAYOUT_VK
    suffix = prompt_of(12, 21)
    fork(driver, 10, PROMPT_LENGTH + 1, 2, suffix, range(20, 30))
    assert_near_float64(driver.row(10), driver.params, [*prompt, last, *suffix])

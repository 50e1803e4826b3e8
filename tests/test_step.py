"""The compiled steps: in place, without a way back to the host, compiled once; and the engine reads in one place."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from gdnjax import LLM, EngineConfig, SamplingParams, abstract_params, build_model
from gdnjax.batch import Emitted
from gdnjax.cache import LAYOUT
from gdnjax.config import ATTENTION, DELTA
from gdnjax.memory import MemoryPlan
from gdnjax.models import engine_geometry
from gdnjax.serving import packing
from gdnjax.serving.plan import max_growth
from gdnjax.serving.planning import step_workspace
from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.sharding import make_mesh
from gdnjax.state import check_state, empty_state
from gdnjax.step import StepOptions, build_steps, build_word_steps
from tests.ledger import LedgerModel
from tests.make_tokenizer import write_tokenizer
from tests.micro import MICRO
from tests.pools import pool_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PLAIN = StepOptions(state_layout="mixed")
FULL = StepOptions(full=True, max_logprobs=5, state_layout="mixed")
DRAFTS = 3
PLAIN_DRAFTS, FULL_DRAFTS = (dataclasses.replace(options, num_drafts=DRAFTS) for options in (PLAIN, FULL))
REJECTION = dataclasses.replace(FULL_DRAFTS, acceptance="rejection")
STEPS = {
    "admit": ("admit", PLAIN),
    "fill a logit row": ("fill_logit_row", PLAIN),
    "fill counts": ("fill_counts", PLAIN),
    "fill masks": ("fill_masks", PLAIN),
    "seal": ("seal", PLAIN),
    "decode, plain": ("decode", PLAIN),
    "decode, full": ("decode", FULL),
    "prefill, full": ("prefill", FULL),
    "prefill, prompt_logprobs": ("prefill", dataclasses.replace(FULL, prompt_logprobs=True)),
    "prefill, no checkpoints": ("prefill", PLAIN),
    "admit, drafts": ("admit", PLAIN_DRAFTS),
    "seal, drafts": ("seal", PLAIN_DRAFTS),
    "decode, plain, drafts": ("decode", PLAIN_DRAFTS),
    "decode, full, drafts": ("decode", FULL_DRAFTS),
    "decode, rejection": ("decode", REJECTION),
    "prefill, prompt_logprobs, drafts": ("prefill", dataclasses.replace(FULL_DRAFTS, prompt_logprobs=True)),
}
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, block_size=16)


def config_of(options: StepOptions) -> EngineConfig:
    return dataclasses.replace(
        CONFIG,
        num_speculative_tokens=options.num_drafts,
        draft_acceptance=options.acceptance,
        state_layout=options.state_layout,
        max_logprobs=options.max_logprobs,
    )


def model_of(options: StepOptions, dtype: str = "float32"):
    return build_model(MICRO, dtype, mtp=options.num_drafts > 0)


def params_of(options: StepOptions, dtype: str = "float32"):
    """Shapes only."""
    return abstract_params(MICRO, 1, dtype, mtp=options.num_drafts > 0)


MAX_MODEL_LEN = 256

HOST_CALLS = re.compile(r"callback|infeed|outfeed|xla_ffi_python|xla_python|SendToHost|RecvFromHost|send\(|recv\(")


@functools.cache
def abstract_state(
    options: StepOptions, num_slots: int, num_blocks: int, dtype: str = "float32", kv_cache_dtype: str = "auto"
):
    """Shapes only: pools of any size cost nothing. The states are of the model's dtype, too."""
    config = dataclasses.replace(config_of(options), ssm_dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    geometry = engine_geometry(model_of(options, dtype), config)
    plan = MemoryPlan.of_counts(
        geometry, num_slots=num_slots, num_blocks=num_blocks, num_logit_rows=4, num_count_rows=4
    )
    return jax.eval_shape(lambda: empty_state(geometry, plan, config, MAX_MODEL_LEN))


def batch_of(name: str, state, rows: int = 4):
    """What the engine packs, growth, seals, forks and checkpoints included."""
    kind, options = STEPS[name]
    sizes = {"rows": rows, "table_width": state.slots.block_table.shape[1]}
    match kind:
        case "admit":
            return packing.pack_admissions([], **sizes)
        case "fill_logit_row":
            return packing.pack_logit_row(None, MICRO.vocab_size, state.logit_rows.bias.shape[1])
        case "fill_counts":
            return packing.count_batch([], [], rows=CONFIG.prefill_rows)
        case "fill_masks":
            return packing.pack_masks(np.zeros((0, 0), np.uint32), rows=rows, vocab_size=MICRO.vocab_size, ranks=1)
        case "seal":
            return packing.pack_seals([], rows=rows)
        case "decode":
            drafts = options.num_drafts
            grown = {"grown_width": max_growth(drafts, CONFIG.block_size), "drafts": drafts > 0}
            masks = {"mask_rows": {}} if options.full else {}
            return packing.pack_decode([], {}, [], **sizes, **grown, **masks)
        case "prefill":
            checkpoints = name != "prefill, no checkpoints"
            return packing.pack_prefill([], tokens=128, **sizes, checkpoints=checkpoints, mask_rows={})


def jitted(name: str, state, dtype: str = "float32", rows: int = 4):
    """A step as engines have it, and its arguments."""
    kind, options = STEPS[name]
    params, batch = params_of(options, dtype), batch_of(name, state, rows)
    steps = build_word_steps(model_of(options, dtype), make_mesh(1), options, params, state)
    if kind in ("prefill", "decode"):
        return getattr(steps, kind)(options), (params, state, batch)
    return getattr(steps, kind), (params, state, batch) if kind == "seal" else (state, batch)


@functools.cache
def traced(name: str, dtype: str = "float32", rows: int = 4, kv_cache_dtype: str = "auto"):
    """With LARGE pools, whose size shows in shapes."""
    function, given = jitted(name, abstract_state(STEPS[name][1], *LARGE, dtype, kv_cache_dtype), dtype, rows)
    return function.trace(*given)


@functools.cache
def compiled(name: str, dtype: str = "float32", rows: int = 4, kv_cache_dtype: str = "auto"):
    # What is read of it is decided before LLVM has it.
    return traced(name, dtype, rows, kv_cache_dtype).lower().compile({"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("name", "decodes"),
    [
        ("admit", False),
        ("fill a logit row", False),
        ("seal, drafts", False),
        ("prefill, full", False),
        ("decode, plain", True),
        ("decode, plain, drafts", False),
    ],
)
def test_every_step_is_compiled_as_its_device_wants(name, decodes, monkeypatch):
    """XLA refuses an option that it does not know: so what it is told has reached it."""
    _, options = STEPS[name]
    asked = []

    def options_of_compiler(devices, backend, *, decodes):
        asked.append((devices, backend, decodes))
        return {"no_such_option": 1}

    monkeypatch.setattr("gdnjax.step.options_of_compiler", options_of_compiler)
    function, given = jitted(name, abstract_state(options, 4, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        function.trace(*given).lower().compile()
    assert (jax.devices()[:1], model_of(options).backend, decodes) in asked
    assert decodes or not any(found for *_, found in asked)


def num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


LARGE = (30_000, 100_000)
"""Slots and blocks, beside the null ones. The pools are 115 MB (windows), 184 MB (states) and twice 205 MB (keys,
values) in float32.
"""

INSTRUCTION = re.compile(r"^ *(?:ROOT )?%[\w.-]+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", re.MULTILINE)

IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "fusion", "scatter", "dynamic-update-slice"}
"""What may have a pool's shape. A fusion is judged by what is in it."""


def pool_sized(text: str) -> set[str]:
    """Operations of a compiled step whose result has as many entries as a pool, and that are not IN_PLACE.

    A number a slot is no pool: XLA copies the layout bits.
    """
    found = set()
    for shape, operation in INSTRUCTION.findall(text):
        size = math.prod(int(n) for n in shape.split(",") if n)
        if size > LARGE[0] + 1 and any(size % (number + 1) == 0 for number in LARGE) and operation not in IN_PLACE:
            found.add(f"{operation} [{shape}]")
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("options", [FULL, FULL_DRAFTS], ids=["no drafts", "drafts"])
def test_planned_workspace_holds_every_step(options):
    """It is estimated with other pools, which may move it by the few percent that they may move any step."""
    workspace = step_workspace(model_of(options), config_of(options), make_mesh(1), MAX_MODEL_LEN, params_of(options))
    names = [
        name
        for name, (_, others) in STEPS.items()
        if (others.num_drafts, others.acceptance) == (options.num_drafts, options.acceptance)
    ]
    needed = [compiled(name).memory_analysis().temp_size_in_bytes for name in names]
    assert 0.95 * max(needed) <= workspace <= 1.05 * max(needed)


BFLOAT16 = (
    "admit",
    "decode, full",
    "prefill, full",
    "prefill, no checkpoints",
    "seal, drafts",
    "decode, plain, drafts",
    "decode, full, drafts",
    "prefill, prompt_logprobs, drafts",
)
"""Steps that read and write every pool of the model's dtype in every way. What the others fill is no pool of it, and
what they sample with touches none.
"""

EIGHT_BITS = (
    ("admit", "bfloat16", 1, "fp8"),
    ("decode, plain, drafts", "bfloat16", 1, "fp8"),
    ("prefill, no checkpoints", "bfloat16", 1, "fp8"),
    ("decode, plain", "float32", 4, "int8"),
)
"""Steps that copy, read and write keys, which int8 and float8 need scales for."""


@pytest.mark.short_cases(
    "admit-float32-4-auto",
    "seal, drafts-bfloat16-1-auto",
    "decode, plain, drafts-bfloat16-1-auto",
    "decode, plain-float32-4-int8",
)
@pytest.mark.parametrize(
    ("name", "dtype", "rows", "kv_cache_dtype"),
    [
        *((name, "float32", 4, "auto") for name in STEPS),
        *((name, "bfloat16", 1, "auto") for name in BFLOAT16),
        *EIGHT_BITS,
    ],
)
def test_step_updates_its_pools_in_place(name, dtype, rows, kv_cache_dtype):
    """Every byte of the state is an alias of the argument's, and nothing that is computed has a pool's size: no copy,
    no conversion to another dtype, no selection.

    XLA widens bfloat16 and float8 on a CPU, and makes slices and updates of one row's gathers and scatters.
    """
    step = compiled(name, dtype, rows, kv_cache_dtype)
    state = abstract_state(STEPS[name][1], *LARGE, dtype, kv_cache_dtype)
    memory = step.memory_analysis()
    smallest_pool = min(
        num_bytes(pool)
        for pool in (
            pool_of(state, "ssm"),
            pool_of(state, "conv"),
            pool_of(state, "k"),
        )
    )
    assert smallest_pool > 50_000_000
    assert memory.alias_size_in_bytes >= num_bytes(state)
    assert memory.temp_size_in_bytes < 0.2 * smallest_pool
    assert pool_sized(step.as_text()) == set()


def test_operation_on_a_whole_pool_is_seen():
    """What the test above relies on: XLA widens pools of bfloat16 and float8, and moves those of integers in place."""
    pool, slot = jax.ShapeDtypeStruct((3, LARGE[0] + 1, 8), "bfloat16"), jax.ShapeDtypeStruct((1,), "int32")

    def update(pool, slot):
        return pool.at[1, slot].set(2 * pool[1, slot])

    def found(dtype):
        given = jax.ShapeDtypeStruct(pool.shape, dtype)
        return pool_sized(jax.jit(update, donate_argnums=0).lower(given, slot).compile().as_text())

    for dtype, bits in (("bfloat16", "uint16"), ("float8_e4m3fn", "uint8")):
        assert any("convert" in operation for operation in found(dtype))
        assert found(bits) == set()


@pytest.mark.short_cases("admit", "decode, plain")
@pytest.mark.parametrize("name", STEPS)
def test_compiled_step_has_no_way_to_the_host(name):
    text = compiled(name).as_text()
    assert "ENTRY" in text
    assert not HOST_CALLS.findall(text)
    # What is left is numerics: the triangular solve of the chunked form, and the largest logits.
    targets = set(re.findall(r'custom_call_target="([^"]*)"', text))
    assert all(re.match(r"lapack_\w+|TopK|__onednn\$\w+|__cpu\$\w+", target) for target in targets), targets


@pytest.mark.short_cases("seal-cuda", "prefill, full-cuda", "decode, full, drafts-rocm")
@pytest.mark.parametrize("platform", ["rocm", "cuda"])
@pytest.mark.parametrize("name", STEPS)
def test_step_lowers_for_gpus_without_callbacks(name, platform):
    """Cross-lowering needs no GPU and no plugin: an op without a rule for the platform is an error here."""
    text = traced(name).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo" in text
    assert not re.findall(r"callback|infeed|outfeed|xla_ffi_python|xla_python", text)


@pytest.mark.short_cases("decode, full, drafts")
@pytest.mark.parametrize("name", ["decode, plain", "prefill, prompt_logprobs", "decode, full, drafts", "seal, drafts"])
def test_step_leaks_no_tracer(name):
    with jax.checking_leaks():
        function, given = jitted(name, abstract_state(STEPS[name][1], *LARGE))
        function.trace(*given)


@pytest.mark.parametrize("options", [PLAIN, PLAIN_DRAFTS, REJECTION], ids=["no drafts", "drafts", "rejection"])
def test_state_takes_the_bytes_of_the_memory_plan(options):
    """Of all that grows with slots, blocks and vocabulary; the scalars of a slot are not in the plan."""
    config = config_of(options)
    geometry = engine_geometry(model_of(options), config)
    plan = MemoryPlan.of_counts(geometry, num_slots=7, num_blocks=13, num_logit_rows=4, num_count_rows=5)
    state = jax.eval_shape(lambda: empty_state(geometry, plan, config, MAX_MODEL_LEN))
    check_state(state)
    rows, slots = state.logit_rows, state.slots
    assert num_bytes(state.cache.slots[DELTA]) - state.cache.slots[DELTA][LAYOUT].size == plan.state_bytes
    assert num_bytes((slots.hidden, slots.pending_hidden, slots.draft_hidden)) == plan.hidden_bytes
    assert num_bytes(state.cache.pages[ATTENTION]) == plan.kv_bytes
    assert num_bytes(rows.bias) == plan.logit_row_bytes
    assert num_bytes(state.token_counts) == plan.count_row_bytes
    assert num_bytes(state.masks) == plan.mask_row_bytes
    others = num_bytes(state) - plan.total_bytes
    assert others < 4096 * (plan.num_slots + 1 + plan.num_logit_rows + 1)


# The engine around the steps. The ledger model compiles fast, and its tokens do not matter here.


@pytest.fixture(scope="module", params=[0, pytest.param(2, marks=pytest.mark.thorough)], ids=["no drafts", "2 drafts"])
def warm(request, tmp_path_factory) -> LLM:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, vocab_size=400)
    model = LedgerModel(vocab_size=400, mtp=request.param > 0)
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=128,
        state_layout="mixed",
        max_logprobs=5,
        num_speculative_tokens=request.param,
    )
    tokenizer = Tokenizer.from_directory(directory)
    return LLM.from_model(
        model, model.params(), config, max_model_len=MAX_MODEL_LEN, tokenizer=tokenizer, eos_token_ids=(2,)
    )


KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.0, "prompt_logprobs": 3},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1},
    {"temperature": 0.0, "bad_words": ["the", "state is"], "logit_bias": {5: -2.0}},
    {"temperature": 0.7, "allowed_token_ids": tuple(range(10, 60)), "min_tokens": 4},
    {"temperature": 1.0, "n": 2, "logprobs": 0, "speculate": False},
    {"temperature": 0.0, "stop": ["e"], "stop_token_ids": (7, 9)},
)


def mixed_requests(count: int) -> tuple[list, list]:
    numbers = np.random.default_rng(1)
    lengths = numbers.choice([1, 5, 63, 64, 65, 130, 200], count)
    prompts = [numbers.integers(3, 400, length).tolist() for length in lengths]
    tokens = numbers.integers(4, 12, count)
    params = [SamplingParams(max_tokens=int(tokens[i]), seed=i, **KINDS[i % len(KINDS)]) for i in range(count)]
    return prompts, params


@pytest.fixture
def backend_compilations():
    """Durations of every compilation of the process, those of steps and of anything else."""
    found = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    # The event has this name in the jax that runs: a compilation is heard.
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert found
    found.clear()
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_mixed_run_compiles_nothing_after_warm_up(warm, backend_compilations):
    steps = warm.engine.num_compilations
    prompts, params = mixed_requests(50)
    results = warm.generate(prompts, params, use_tqdm=False)
    assert all(result.finished for result in results)
    assert sum(result.prompt_logprobs is not None for result in results) == 5
    assert warm.engine.num_compilations == steps
    assert backend_compilations == []


def test_penalties_are_those_of_a_run_without_drafts(warm):
    """Of all that run at once, and of every kind: what a draft may become counts as if it had been produced."""
    prompts, _ = mixed_requests(6)
    penalties = [{"presence_penalty": 1.5}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.7}] * 2
    runs = [
        warm.generate(
            prompts,
            [
                SamplingParams(max_tokens=24, temperature=i // 3, seed=i, speculate=speculate, ignore_eos=True, **each)
                for i, each in enumerate(penalties)
            ],
            use_tqdm=False,
        )
        for speculate in (True, False)
    ]
    tokens = [[list(output.outputs[0].token_ids) for output in run] for run in runs]
    assert tokens[0] == tokens[1]
    plain = [SamplingParams(max_tokens=24, temperature=i // 3, seed=i, ignore_eos=True) for i in range(6)]
    free = [list(output.outputs[0].token_ids) for output in warm.generate(prompts, plain, use_tqdm=False)]
    assert any(one != other for one, other in zip(free, tokens[0], strict=True)), "penalties change something"


class Sealed:
    """A device array that gives its shape and starts its copy, and whose values nobody can have.

    Patching the conversions of jax.Array would miss some: on CPU numpy reads it through the buffer protocol.
    """

    def __init__(self, array: jax.Array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def copy_to_host_async(self) -> None:
        self.array.copy_to_host_async()

    def _refuse(self, *_, **__):
        raise AssertionError("a value was read from the device outside Runner.read")

    __array__ = __bool__ = __int__ = __float__ = __index__ = __iter__ = __len__ = __getitem__ = _refuse
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __sub__ = __mul__ = __invert__ = __and__ = __or__ = _refuse
    __hash__ = None
    block_until_ready = is_ready = delete = item = tolist = _refuse


def seal(tree):
    return jax.tree.map(Sealed, tree)


def unseal(tree):
    return jax.tree.map(lambda leaf: leaf.array if isinstance(leaf, Sealed) else leaf, tree)


@pytest.fixture
def sealed(warm, monkeypatch) -> LLM:
    """The engine with every array that a step returns sealed, and `Runner.read` the only place that can open one."""
    engine, steps, read = warm.engine, warm.engine.runner.steps, warm.engine.runner.read
    while engine.has_work:
        engine.step()

    def through(function):
        return lambda *given: seal(function(*unseal(given)))

    monkeypatch.setattr(engine.runner, "state", seal(engine.runner.state))
    monkeypatch.setattr(engine.runner, "read", lambda turn: read(dataclasses.replace(turn, **_opened(turn))))
    replaced = dataclasses.replace(
        steps,
        admit=through(steps.admit),
        fill_logit_row=through(steps.fill_logit_row),
        fill_counts=through(steps.fill_counts),
        fill_masks=through(steps.fill_masks),
        seal=through(steps.seal),
        prefill=lambda options: through(steps.prefill(options)),
        decode=lambda options: through(steps.decode(options)),
    )
    monkeypatch.setattr(engine.runner, "steps", replaced)
    yield warm
    state = unseal(engine.runner.state)
    monkeypatch.undo()
    engine.runner.state = state


def _opened(turn) -> dict[str, Emitted | None]:
    return {"prefill": unseal(turn.prefill), "decode": unseal(turn.decode)}


def test_engine_reads_the_device_in_one_place_once_a_turn(sealed):
    prompts, params = mixed_requests(20)
    counters = sealed.engine.counters
    turns, reads = counters.num_turns, counters.num_device_reads
    results = sealed.generate(prompts, params, use_tqdm=False)
    while sealed.engine.has_work:
        sealed.engine.step()
    assert all(result.finished for result in results)
    assert counters.num_turns - turns == counters.num_device_reads - reads > 20


def test_log_probabilities_come_to_the_host_only_where_somebody_asked(warm, monkeypatch):
    """The full sampler makes them for everybody."""
    read, turns = warm.engine.runner.read, []
    monkeypatch.setattr(warm.engine.runner, "read", lambda turn: turns.append(turn) or read(turn))
    for asked, arrays in ((None, 1), (2, 5)):
        turns.clear()
        params = SamplingParams(max_tokens=3, temperature=0.8, top_k=5, logprobs=asked)
        warm.generate([[1, 2, 3]], params, use_tqdm=False)
        while warm.engine.has_work:
            warm.engine.step()
        emitted = [each for turn in turns for each in (turn.prefill, turn.decode) if each is not None]
        assert len(emitted) >= 3
        assert {len(jax.tree.leaves(each)) for each in emitted} == {arrays}


def test_read_outside_its_place_is_seen(sealed):
    """The seal holds: what the test above relies on."""
    with pytest.raises(AssertionError, match=r"outside Runner\.read"):
        np.asarray(sealed.engine.runner.state.slots.length)
    with pytest.raises((AssertionError, TypeError)):
        jax.device_get(sealed.engine.runner.state.slots.done)


@pytest.mark.parametrize("name", ["decode, full", "prefill, prompt_logprobs"])
def test_log_probabilities_without_alternatives_have_shapes(name):
    """max_logprobs=0 is allowed: the chosen token's alone."""
    kind, options = STEPS[name]
    state, params = abstract_state(options, 4, 16), params_of(options)
    options = dataclasses.replace(options, max_logprobs=0)
    steps = build_steps(model_of(options), make_mesh(1), options, params, state)
    _, emitted = jax.eval_shape(getattr(steps, kind)(options), params, state, batch_of(name, state))
    assert emitted.logprobs.top.shape[-1] == 0
    if options.prompt_logprobs:
        assert emitted.prompt_logprobs.chosen.shape == (128,)
        assert emitted.prompt_logprobs.top.shape == (128, 0)

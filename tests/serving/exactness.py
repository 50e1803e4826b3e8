"""Runs of a float32 engine, and float64 to hold them to: what the tests of rungs 2, 3 and 6 share.

What is compared is every log-probability that a request reports, those of the whole vocabulary unless it says
otherwise, beside the tokens, the recurrent states, the keys and values, and the cache's checkpoints.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax import LLM, EngineConfig, SamplingParams, build_model
from gdnjax.config import ATTENTION, DELTA, ModelConfig
from gdnjax.sampling import gumbel
from tests.float64 import Reference, reference
from tests.micro import MICRO, SHALLOW, micro_model, micro_params, shallow_params

MAX_MODEL_LEN = 256
ALL = MICRO.vocab_size

LOGPROB_BOUND = 2e-5
"""Of |log-probability - float64|. Over the runs of test_exactness.py float32 differs from float64 by 1.1e-6 to 6.4e-6,
whatever the buckets, pieces, layouts, ranks, hits and drafts. The smallest fault of tests/faults.py moves a
log-probability by 0.23, 10,000 times the bound."""

STATE_BOUND = 1e-5
"""Of max|x - float64| / max|x|, x a layer's state, window, keys or values, or a hidden state: float32 differs by up to
1.9e-6 in the same runs."""

CACHED = {
    "enable_prefix_caching": True,
    "num_kv_blocks": 28,
    "num_checkpoint_slots": 6,
    "state_checkpoint_interval": 32,
}
"""Scarce: blocks for two or three requests of the runs below, so that some are preempted."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, logprobs=ALL)


def build(**config) -> LLM:
    """An engine of MICRO, of one prefill and one decode bucket, without the prefix cache, unless told otherwise.
    Compiles at first use.
    """
    config = config_of(config)
    kind = config.tensor_parallel_size, config.num_speculative_tokens > 0, config.enable_expert_parallel
    return LLM.from_model(micro_model(*kind), micro_params(*kind), config, max_model_len=MAX_MODEL_LEN)


def build_shallow(**config) -> LLM:
    """The same of SHALLOW."""
    config = config_of(config)
    mtp = config.num_speculative_tokens > 0
    model = build_model(SHALLOW, "float32", mtp=mtp)
    return LLM.from_model(model, shallow_params(mtp), config, max_model_len=MAX_MODEL_LEN)


def config_of(config: dict) -> EngineConfig:
    """The engines' common options, with these in their place."""
    config = {
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "prefill_buckets": (128,),
        "decode_buckets": (4,),
    } | config
    return EngineConfig(max_logprobs=ALL, warmup=False, block_size=16, **config)


def leave_idle(llm: LLM) -> None:
    """Whatever happened to the test."""
    engine = llm.engine
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.abort(request)
    while engine.has_work:
        engine.step()


@functools.cache
def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, MICRO.vocab_size, length).tolist()


@dataclasses.dataclass(frozen=True)
class Run:
    """What a request left behind. Axes: logprobs [tokens, n] of the tokens in reported [tokens, n], prompt_logprobs
    [prompt - 1, V] or None.

    states [L, hv, K, V] and windows [L, w, x] stand behind `position` tokens. keys and values [layers, tokens, kh, hd]
    are those of every token that was fed, and of the one behind them if the last block has a place for it: the MTP
    head's are to be there, as the last of the layers. Channels and heads are as one rank holds them. `noise`
    [tokens, V] is what the request draws with.
    """

    prompt: list[int]
    tokens: list[int]
    reported: np.ndarray
    logprobs: np.ndarray
    prompt_logprobs: np.ndarray | None
    noise: np.ndarray | float
    position: int
    states: np.ndarray
    windows: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    @property
    def sequence(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)

    @property
    def num_fed(self) -> int:
        return len(self.prompt) + len(self.tokens) - 1


def queue(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY, priority: int = 0):
    (request,) = llm.submit(list(prompt), params, priority=priority).requests
    return request


class Watch:
    """Takes what each request left in its slot and blocks as soon as it has ended. `look` is for after every turn:
    what is in flight then was dispatched before anybody else could be given its slot or blocks.
    """

    def __init__(self, llm: LLM, requests: Collection = ()):
        self.llm, self.requests = llm, list(requests)
        self.found: dict = {}
        self._held: dict = {}
        self.look()

    def look(self) -> None:
        for request in self.requests:
            if request.finished and request not in self.found:
                self.found[request] = observe(self.llm, request, *self._held[request])
            elif request.slot:
                self._held[request] = request.slot, list(request.blocks)


def finish(llm: LLM, *requests) -> list[Run]:
    """Runs the engine until it is idle, and takes what each request left."""
    watch = Watch(llm, requests)
    for _ in range(500):
        llm.engine.step()
        watch.look()
        if not llm.engine.has_work:
            return [watch.found[request] for request in requests]
    raise AssertionError("work is left after 500 turns")


def solo(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> Run:
    return finish(llm, queue(llm, prompt, params))[0]


def observe(llm: LLM, request, slot: int, blocks: list[int]) -> Run:
    state = llm.engine.runner.state
    entries, fed = jax.device_get(state.cache.pages[ATTENTION]), request.num_tokens - 1
    places = min(fed + 1, len(blocks) * entries["k"].shape[2])
    keys, values = (_keys_of(llm, _numbers(entries, name, blocks), fed)[:, :places] for name in ("k", "v"))
    pending, states, windows, _ = row_of(llm, slot)
    ids = reported(request.output_logprobs)
    return Run(
        prompt=request.prompt_token_ids,
        tokens=list(request.output_token_ids),
        reported=ids,
        logprobs=values_of(request.output_logprobs, ids),
        prompt_logprobs=table(request.prompt_logprobs) if request.prompt_logprobs else None,
        noise=noise_of(llm, request),
        position=fed - pending,
        states=states,
        windows=windows,
        keys=keys,
        values=values,
    )


def row_of(llm: LLM, slot: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Of a slot: how many tokens are pending, states and windows as in Run, and the last hidden state."""
    state, delta = llm.engine.runner.state, llm.model.config.delta
    # Whole pools: rows taken on the device are four programs for each geometry.
    gdn, slots = jax.device_get((state.cache.slots[DELTA], state.slots))
    pending = 0 if slots.pending is None else slots.pending[slot]
    flat, conv, layout, hidden = gdn["ssm"][:, slot], gdn["conv"][:, slot], gdn["layout"][slot], slots.hidden[slot]
    heads = flat.shape[:2]
    if layout:
        flat = flat.reshape(*heads, delta.value_head_dim, delta.key_head_dim).swapaxes(2, 3)
    window = _in_channel_order(llm, conv[:, : delta.conv_kernel - 1])
    return int(pending), flat.reshape(*heads, delta.key_head_dim, delta.value_head_dim), window, hidden


def _in_channel_order(llm: LLM, windows: np.ndarray) -> np.ndarray:
    """Channels as one rank holds them: [q | k | v], not rank by rank."""
    delta, tp = llm.model.config.delta, llm.config.tensor_parallel_size
    sizes = np.array([delta.key_dim, delta.key_dim, delta.value_dim]) // tp
    ranks = [np.split(part, np.cumsum(sizes)[:-1], axis=-1) for part in np.split(windows, tp, axis=-1)]
    return np.concatenate([rank[i] for i in range(3) for rank in ranks], axis=-1)


def _numbers(entries: dict[str, np.ndarray], name: str, blocks: list[int]) -> np.ndarray:
    """[layers, blocks, p, kh, hd]: 8-bit ones times their scales; uint8 is the bits of float8."""
    found = entries[name][:, blocks]
    if f"{name}_scale" not in entries:
        return found
    codes = found.view(jnp.float8_e4m3fn) if found.dtype == np.uint8 else found
    return codes.astype(np.float32) * entries[f"{name}_scale"][:, blocks][..., None]


def _keys_of(llm: LLM, blocks: np.ndarray, fed: int) -> np.ndarray:
    """[layers, tokens, kh, hd] of a request's blocks, without the heads that more than one rank holds, and zero in the
    places that nobody looks at: the target's behind the last token fed, and the first of the head's.
    """
    config, tp = llm.model.config, llm.config.tensor_parallel_size
    heads = blocks[..., :: max(1, tp // config.attention.num_kv_heads), :]
    keys = heads.reshape(len(heads), -1, *heads.shape[3:])
    keys[: config.num_attention_layers, fed:] = 0
    keys[config.num_attention_layers :, 0] = 0
    return keys


def table(entries: list[dict]) -> np.ndarray:
    """Reported log-probabilities of every token of the vocabulary, [tokens, V]."""
    assert all(sorted(entry) == list(range(ALL)) for entry in entries)
    return values_of(entries, reported(entries))


def reported(entries: list[dict]) -> np.ndarray:
    """[tokens, n]: the tokens whose log-probabilities are reported, in order; short rows are filled up with one."""
    width = max(map(len, entries))
    return np.array([sorted([*entry, *[next(iter(entry))] * (width - len(entry))]) for entry in entries])


def values_of(entries: list[dict], ids: np.ndarray) -> np.ndarray:
    rows = zip(entries, ids.tolist(), strict=True)
    return np.array([[entry[token].logprob for token in row] for entry, row in rows], np.float32)


NOISY = 64
"""Tokens whose noise is made at once, so that it is compiled once."""


def noise_of(llm: LLM, request) -> np.ndarray | float:
    """[output tokens, V]: what is added to the scores of each, a function of seed and position; 0 if it is greedy."""
    if request.params.temperature == 0:
        return 0.0
    assert request.params.temperature == 1, "scores are log-probabilities here"
    seed = jnp.array([[request.seed & 0xFFFFFFFF, request.seed >> 32]], jnp.uint32)
    position = request.prompt_length + jnp.arange(NOISY, dtype=jnp.int32)
    tokens = jnp.arange(llm.model.config.vocab_size, dtype=jnp.uint32)
    made = _gumbel(jnp.repeat(seed, NOISY, axis=0), position, tokens)
    return np.asarray(made)[: len(request.output_token_ids)]


_gumbel = jax.jit(gumbel)


# Float64.


class Exact:
    """The float64 model that runs are held to."""

    def __init__(self, config: ModelConfig, params):
        self.config = config
        self.params = wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.of = functools.lru_cache(maxsize=32)(functools.partial(self._of, wide))

    def _of(self, params, tokens: tuple[int, ...], positions: tuple[int, ...]) -> Reference:
        return reference(self.config, params, tokens, positions)

    def forced(self, run: Run, positions: tuple[int, ...] = ()) -> Reference:
        """Teacher-forced on what a run emitted, with the states where the run's stand and at `positions`."""
        return self.of(run.sequence, (*sorted({*positions, run.position}),))


@functools.cache
def exact_micro() -> Exact:
    """With and without its head the model is the same one."""
    return Exact(MICRO, micro_params(mtp=True))


@functools.cache
def exact_shallow() -> Exact:
    """The same of SHALLOW."""
    return Exact(SHALLOW, shallow_params(mtp=True))


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a run is from float64. `token` is how far a token's score is below the best one's: its log-probability
    and its noise, if it was drawn with any.
    """

    logprob: float = 0.0
    state: float = 0.0
    window: float = 0.0
    kv: float = 0.0
    token: float = 0.0

    def __or__(self, other: "Error") -> "Error":
        """The larger of each."""
        return Error(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


def error_of(run: Run, forced: Reference | None = None) -> Error:
    """`forced`: the run in float64, which is the small model's unless it is given."""
    forced = forced or exact_micro().forced(run)
    states, windows = forced.behind[run.position]
    logprobs = forced.logprobs[len(run.prompt) - 1 : -1]
    pairs = (run.keys, forced.keys), (run.values, forced.values)
    return Error(
        logprob=distance(run.logprobs, np.take_along_axis(logprobs, run.reported, axis=1)),
        state=max(map(relative, run.states, states)),
        window=max(map(relative, run.windows, windows)),
        kv=max(_error_of_keys(run, found, exact, forced.head) for found, exact in pairs),
        token=float(max(_behind_the_best(logprobs + run.noise, run.tokens))),
    )


def _error_of_keys(run: Run, found: np.ndarray, exact: list[np.ndarray], head: bool) -> float:
    """Of those that every later token looks at: up to the last one fed, and the head's from index 1 to the token
    behind that.
    """
    layers = len(found)
    target = layers - 1 if head and layers == len(exact) else layers
    errors = [relative(a[: run.num_fed], b[: run.num_fed]) for a, b in zip(found[:target], exact, strict=False)]
    errors += [relative(a[1:], b[1 : len(a)]) for a, b in zip(found[target:], exact[target:layers], strict=True)]
    return max(errors)


def _behind_the_best(scores: np.ndarray, tokens: list[int]) -> np.ndarray:
    return scores.max(-1) - np.take_along_axis(scores, np.array(tokens)[:, None], axis=1)[:, 0]


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference; infinite where there is a NaN, which no comparison would notice."""
    difference = float(np.abs(found - exact).max())
    return difference if np.isfinite(difference) else np.inf


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return distance(found, exact) / float(np.abs(exact).max())


def within_bounds(error: Error) -> bool:
    return (
        error.logprob <= LOGPROB_BOUND
        and max(error.state, error.window, error.kv) <= STATE_BOUND
        and error.token <= 2 * LOGPROB_BOUND
    )


def num_same(one: Run, other: Run) -> int:
    """Tokens of two runs of the same length before the first that differs."""
    differs = [i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b]
    return differs[0] if differs else len(one.tokens)


def gaps(run: Run, forced: Reference | None = None) -> np.ndarray:
    """How far the two best scores of each emitted token are apart. Where that is less than rounding, another bucket
    may draw the other.
    """
    scores = (forced or exact_micro().forced(run)).logprobs[len(run.prompt) - 1 : -1] + run.noise
    second, best = np.partition(scores, -2, axis=-1)[:, -2:].T
    return best - second


# Checkpoints of the prefix cache.


def checkpoints_of(llm: LLM) -> dict[tuple[int, ...], int]:
    """The slots of an idle engine's checkpoints, by the tokens before them."""
    engine = llm.engine
    # The next plan would take these along.
    engine.runner._seal(engine.scheduler._seals)
    engine.scheduler._seals.clear()
    return {_path(node): node.slot for node in engine.scheduler.cache._nodes if node.slot}


def _path(node) -> tuple[int, ...]:
    return (*_path(node.parent), *(token for key in node.keys for token in key)) if node.parent else ()


def error_of_checkpoint(llm: LLM, slot: int, position: int, forced: Reference) -> float:
    """Of its states, windows and hidden state, the largest."""
    _, states, windows, hidden = row_of(llm, slot)
    exact_states, exact_windows = forced.behind[position]
    pairs = [*zip(states, exact_states, strict=True), *zip(windows, exact_windows, strict=True)]
    return max(relative(a, b) for a, b in [*pairs, (hidden, forced.hidden[position - 1])])


# Interleavings.


@dataclasses.dataclass
class Tally:
    """What happened in some interleavings, and how far from float64 they came."""

    error: Error = Error()
    checkpoint: float = 0.0
    hits: int = 0
    preempted: int = 0
    tokens: int = 0
    near_ties: int = 0
    checkpoints: int = 0
    drafts: int = 0
    accepted: int = 0
    drawn: int = 0
    beside: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / max(1, self.drafts)

    def add(self, llm: LLM, exact: Exact, found: dict) -> None:
        """The runs of an interleaving, whose engine is idle again."""
        checkpoints = checkpoints_of(llm)
        unknown = set(checkpoints.items()) - self._known
        opted = [request for request in found if not request.params.speculate]
        assert not sum(request.num_draft_tokens for request in opted)
        for request, run in found.items():
            own = {(path, slot) for path, slot in unknown if path == run.sequence[: len(path)]}
            positions = tuple(len(path) for path, _ in own)
            forced = exact.forced(run, positions)
            self.error |= error_of(run, forced)
            for path, slot in own:
                error = error_of_checkpoint(llm, slot, len(path), forced)
                self.checkpoint = max(self.checkpoint, error)
                self.checkpoints += 1
            unknown -= own
            self.hits += request.num_cached_tokens > 0
            self.preempted += request.num_preemptions
            self.tokens += len(run.tokens)
            self.near_ties += int(np.sum(gaps(run, forced) < 2 * LOGPROB_BOUND))
            self.drafts += request.num_draft_tokens
            self.accepted += request.num_accepted_tokens
            self.drawn += request.params.temperature > 0
        self.beside += len(opted) if len(opted) < len(found) else 0
        assert not unknown, "a checkpoint of no request's tokens"
        self._known = set(checkpoints.items())

    def __post_init__(self):
        self._known: set[tuple[tuple[int, ...], int]] = set()

    def within_bounds(self) -> bool:
        near_ties = self.near_ties <= 0.02 * self.tokens
        return within_bounds(self.error) and self.checkpoint <= STATE_BOUND and near_ties


Arrival = tuple[int, list[int], SamplingParams, int]
"""(turn, prompt, parameters, priority)."""


def micro_arrivals(rng: np.random.Generator, speculating: bool) -> list[Arrival]:
    """A few requests that begin alike; where drafts are made, some are drawn and some opt out."""
    arrivals = []
    for _ in range(rng.integers(2, 5)):
        shared, own = rng.choice([0, 16, 40, 64, 100]), rng.integers(1, 60)
        prompt = prompt_of(int(rng.integers(2)), 100)[:shared] + prompt_of(50 + int(rng.integers(99)), int(own))
        params = dataclasses.replace(GREEDY, max_tokens=int(rng.choice([1, 6, 20, 40])))
        when, priority = int(rng.integers(0, 12)), int(rng.choice([0, 0, -1, 1]))
        if speculating:
            params = some_drawn(params, rng)
        arrivals.append((when, prompt, params, priority))
    return arrivals


def some_drawn(params: SamplingParams, rng: np.random.Generator) -> SamplingParams:
    """Every other request at temperature 1, every fifth without drafts."""
    temperature, speculate = float(rng.integers(2)), bool(rng.random() > 0.2)
    return dataclasses.replace(params, temperature=temperature, seed=int(rng.integers(1 << 40)), speculate=speculate)


def interleave(llm: LLM, seed: int, arrivals: Callable[[np.random.Generator], list[Arrival]]) -> dict:
    """Requests at their times, some of them sent back once. Each with what it left."""
    rng = np.random.default_rng([99, seed])
    requests = arrivals(rng)
    watch = Watch(llm)
    for turn in range(600):
        watch.requests += [queue(llm, *what) for when, *what in requests if when == turn]
        if rng.random() < 0.03 and llm.engine.scheduler.running:
            llm.engine.preempt(llm.engine.scheduler.running[-1])
            watch.look()
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
        watch.look()
        if turn > 12 and not llm.engine.has_work:
            assert len(watch.found) == len(requests)
            return watch.found
    raise AssertionError("work is left after 600 turns")

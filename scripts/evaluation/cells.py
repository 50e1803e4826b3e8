"""Cells of the matrix: ways to compute the same completions, each a setting of the engine or the loop on the device."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gdnjax import LLM

CHUNK = 64
SMALLEST_LENGTH = 512
PREFILL_TOKENS = 1024
SCARCE_BLOCK = 4
SCARCE_SHARE = 40
"""Per cent of the blocks that the longest prompts would fill in all rows."""
TURNS_BETWEEN_DRILLS = 7
LOOK_EVERY_S = 0.5
"""Seconds between two looks for answers that have come."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting.

    driver        "engine", which dispatches every step from the host, or "device loop", which is `batch_generate`
                  under one jit, in batches of one shape.
    dtype         as EngineConfig's; "auto" is the checkpoint's.
    quantization  as EngineConfig's: how the parameters are loaded.
    max_num_seqs  requests that run at once, or rows of a batch; None leaves it to the user.
    options       further fields of EngineConfig.
    repeat        run the prompts twice and take the second completions: those that the prefix cache has a part in.
    scarce        few and small KV blocks, and every few turns the request that came last is made to give up its own.
    """

    name: str
    driver: str = "engine"
    dtype: str = "auto"
    quantization: str = "auto"
    max_num_seqs: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeat: bool = False
    scarce: bool = False

    def __post_init__(self):
        if self.driver not in DRIVERS:
            raise ValueError(f"driver must be one of {', '.join(DRIVERS)}, got {self.driver!r}")
        if self.driver == "device loop" and (self.options or self.repeat or self.scarce):
            raise ValueError(f"the device loop takes no engine options, got {', '.join(self.options) or self.name!r}")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every cell computes: greedy completions of the same prompts.

    max_length is the longest prompt with its output, in tokens; max_num_seqs the user's.
    """

    prompts: Sequence[list[int]]
    max_tokens: int
    stop: tuple[str, ...] = ()
    max_num_seqs: int = 32
    progress: bool = False

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts))

    @property
    def max_length(self) -> int:
        return self.longest + self.max_tokens


@dataclasses.dataclass(frozen=True)
class Completion:
    """One output: its text, every kept token with an ending EOS, and whether it ended by "stop" or by "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class CellRun:
    """What a cell gave. `seconds` hold no loading and no compilation.

    hit_rate     share of the prompts' tokens that the prefix cache saved.
    preemptions  how often a request had to make room for another.
    drafted      tokens that the MTP head proposed, in repeated runs too, and `accepted` of them that were kept.
    """

    cell: Cell
    dtype: str
    completions: list[Completion]
    seconds: float
    hit_rate: float = 0.0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def output_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


def load(
    directory: Any,
    dtype: str,
    progress: bool = False,
    *,
    mtp: bool = False,
    quantization: str = "auto",
    devices: Mapping[str, Any] = MappingProxyType({}),
) -> "LLM":
    """The parameters in one dtype, or as `quantization` has them, with those of the MTP head if `mtp`, in an engine of
    the smallest pools, from which the cells' engines are made. `devices`: see `gdnjax.cli.command.devices`.
    """
    from gdnjax import LLM

    return LLM(
        directory,
        dtype=dtype,
        quantization=quantization,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK,
        max_model_len=CHUNK,
        num_speculative_tokens=int(mtp),
        warmup=False,
        use_tqdm=progress,
        **devices,
    )


class Watcher(Protocol):
    """Whoever wants to know how far a cell is."""

    def phase(self, what: str) -> None: ...

    def done(self, problem: int, completion: Completion) -> None: ...


class Nobody:
    """Does not want to know."""

    def phase(self, what: str) -> None:
        pass

    def done(self, problem: int, completion: Completion) -> None:
        pass


NOBODY = Nobody()


def run_cell(cell: Cell, dtype: str, loaded: "LLM", work: Workload, watcher: Watcher = NOBODY) -> CellRun:
    """Computes all completions of the workload in the cell's way. `dtype` is what the cell's own stands for."""
    return DRIVERS[cell.driver](cell, dtype, loaded, work, watcher)


def _run_engine(cell: Cell, dtype: str, loaded: "LLM", work: Workload, watcher: Watcher) -> CellRun:
    from gdnjax import LLM

    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
    params = _greedy(work)
    config = _engine_config(cell, loaded, work)
    llm = LLM.from_model(
        loaded.model,
        loaded.params,
        config,
        max_model_len=config.max_model_len or work.max_length,
        tokenizer=loaded.tokenizer,
        eos_token_ids=loaded.eos_token_ids,
    )
    with llm:
        # Each step has one bucket, so that this is all that the prompts need.
        llm.engine.prepare([config.max_num_seqs], [params])
        if cell.repeat:
            watcher.phase("filling the cache")
            llm.generate(prompts, params, use_tqdm=False)
        watcher.phase("answering")
        began, compiling = time.perf_counter(), llm.engine.compile_seconds
        outputs = _generate(llm, prompts, params, watcher, drills=cell.scarce)
        seconds = time.perf_counter() - began - (llm.engine.compile_seconds - compiling)
        stats = llm.stats()
    return CellRun(
        cell,
        dtype,
        [_completion(output) for output in outputs],
        seconds,
        hit_rate=sum(output.num_cached_tokens for output in outputs) / max(1, sum(map(len, work.prompts))),
        preemptions=stats["num_preemptions"],
        drafted=stats["speculation"]["num_draft_tokens"],
        accepted=stats["speculation"]["num_accepted_draft_tokens"],
    )


def _completion(output: Any) -> Completion:
    first = output.outputs[0]
    return Completion(first.text, first.token_ids, first.finish_reason)


def _generate(llm: "LLM", prompts: Sequence[Any], params: Any, watcher: Watcher, *, drills: bool) -> list[Any]:
    """`llm.generate` under a watcher's eyes. With drills the request that came last is preempted every few turns."""
    submissions = [llm.submit(prompt, params) for prompt in prompts]
    running = dict(enumerate(submissions))
    engine = llm.engine
    turns, looked, more = 0, time.monotonic(), True
    while more:
        more = llm.step()
        turns += 1
        if not more or time.monotonic() - looked >= LOOK_EVERY_S:
            for problem in [problem for problem, submission in running.items() if submission.finished]:
                watcher.done(problem, _completion(running.pop(problem).output()))
            looked = time.monotonic()
        if drills and more and turns % TURNS_BETWEEN_DRILLS == 0 and len(engine.scheduler.running) > 1:
            engine.preempt(engine.scheduler.running[-1])
    return [submission.output() for submission in submissions]


def _engine_config(cell: Cell, loaded: "LLM", work: Workload):
    """The engine of a cell: what fits the workload, the cell's options in its place."""
    from gdnjax import EngineConfig

    rows = cell.max_num_seqs or work.max_num_seqs
    fields: dict[str, Any] = {
        "max_num_seqs": rows,
        "max_num_batched_tokens": min(doubled(CHUNK, rows * work.longest), PREFILL_TOKENS),
        "max_model_len": doubled(SMALLEST_LENGTH, work.max_length),
        "dtype": loaded.config.dtype,
        "tensor_parallel_size": loaded.config.tensor_parallel_size,
        "enable_expert_parallel": loaded.config.enable_expert_parallel,
        **cell.options,
    }
    if cell.scarce:
        # Enough for the longest request alone, and far from enough for all rows at once.
        fields["block_size"] = SCARCE_BLOCK
        longest, prompt = (-(-tokens // SCARCE_BLOCK) for tokens in (work.max_length, work.longest))
        fields["num_kv_blocks"] = max(longest, SCARCE_SHARE * rows * prompt // 100)
    fields.setdefault("prefill_buckets", (fields["max_num_batched_tokens"],))
    fields.setdefault("decode_buckets", (fields["max_num_seqs"],))
    return EngineConfig(**fields, warmup=False)


def _run_device_loop(cell: Cell, dtype: str, loaded: "LLM", work: Workload, watcher: Watcher) -> CellRun:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gdnjax import batch_generate

    rows, width = cell.max_num_seqs or work.max_num_seqs, doubled(CHUNK, work.longest)
    eos = loaded.eos_token_ids

    def generate(params, tokens, lengths):
        return batch_generate(
            loaded.model,
            params,
            tokens,
            lengths,
            jax.random.key(0),
            max_new_tokens=work.max_tokens,
            stop_token_ids=eos,
        )

    tokens, lengths = jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    compiled = jax.jit(generate).lower(loaded.params, tokens, lengths).compile()
    completions: list[Completion] = []
    watcher.phase("answering")
    began = time.perf_counter()
    for prompts in _batches(work.prompts, rows):
        # Missing rows repeat the first one, whose work is thrown away.
        padded = [*prompts, *[prompts[0]] * (rows - len(prompts))]
        table = np.zeros((rows, width), np.int32)
        for row, prompt in enumerate(padded):
            table[row, : len(prompt)] = prompt
        output = compiled(loaded.params, table, np.array([len(prompt) for prompt in padded], np.int32))
        tokens, counts = np.asarray(output.tokens), np.asarray(output.lengths)
        for row in range(len(prompts)):
            completion = close(tokens[row, : counts[row]].tolist(), loaded.tokenizer, work, eos)
            watcher.done(len(completions), completion)
            completions.append(completion)
    return CellRun(cell, dtype, completions, time.perf_counter() - began)


DRIVERS: dict[str, Callable[[Cell, str, "LLM", Workload, Watcher], CellRun]] = {
    "engine": _run_engine,
    "device loop": _run_device_loop,
}


def close(token_ids: list[int], tokenizer: Any, work: Workload, eos: Sequence[int]) -> Completion:
    """Tokens that the device produced as the engine would have kept and shown them, up to a stop string or EOS."""
    from gdnjax.serving.detokenizer import Detokenizer

    detokenizer = Detokenizer(tokenizer, _greedy(work))
    ended = token_ids[-1] in eos
    detokenizer.append(token_ids[:-1] if ended else token_ids)
    detokenizer.finish()
    stopped = detokenizer.stop_reason is not None
    kept = token_ids[: detokenizer.num_tokens_kept] if stopped else token_ids
    return Completion(detokenizer.text, tuple(kept), "stop" if stopped or ended else "length")


def _greedy(work: Workload):
    from gdnjax import SamplingParams

    # Special tokens stay in the text, since stop strings such as <|im_end|> are looked for there.
    return SamplingParams(
        temperature=0.0, max_tokens=work.max_tokens, stop=work.stop or None, skip_special_tokens=False
    )


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def doubled(start: int, needed: int) -> int:
    """The first of start, 2 start, 4 start, ... that holds `needed`: few sizes, so few compilations."""
    while start < needed:
        start *= 2
    return start


DEFAULT = Cell(name="batched")

PLAIN = {"enable_prefix_caching": False}

LAYOUTS = ("kv", "vk", "mixed")
PIECES = {"whole": {}, "pieces": {"max_num_batched_tokens": CHUNK}}
CACHES = {"fresh": PLAIN, "cached": {}}
MEMORIES = ("ample", "scarce")
DRAFTS = (1, 2, 3)


def _crossed(layout: str, pieces: str, cache: str, memory: str, drafts: int = 0) -> Cell:
    """A float32 cell of the cross of settings under which a request may not change its answer."""
    speculation = {"num_speculative_tokens": drafts} if drafts else {}
    return Cell(
        name=f"f32-{layout}-{pieces}-{cache}-{memory}" + (f"-k{drafts}" if drafts else ""),
        dtype="float32",
        options={"state_layout": layout, **PIECES[pieces], **CACHES[cache], **speculation},
        repeat=cache == "cached",
        scarce=memory == "scarce",
    )


CROSS = tuple(itertools.starmap(_crossed, itertools.product(LAYOUTS, PIECES, CACHES, MEMORIES)))

SPECULATING = (
    *(
        _crossed(layout, "whole", cache, "ample", drafts)
        for drafts, layout, cache in itertools.product(DRAFTS, ("kv", "mixed"), CACHES)
    ),
    *(_crossed("mixed", "pieces", "cached", "scarce", drafts) for drafts in DRAFTS),
)
"""So many drafts crossed with the cache and with the mixed layout, and with everything at once."""

COVERING = tuple(
    itertools.starmap(
        _crossed,
        (
            ("kv", "whole", "fresh", "ample", 2),
            ("kv", "pieces", "cached", "scarce", 3),
            ("vk", "whole", "cached", "scarce", 1),
            ("vk", "pieces", "fresh", "ample", 0),
            ("mixed", "whole", "fresh", "scarce", 3),
            ("mixed", "whole", "fresh", "ample", 1),
            ("mixed", "pieces", "cached", "ample", 2),
        ),
    )
)
"""Cells in which every two settings of the cross meet, and so many drafts meet the cache, its absence and the mixed
layout.
"""

_WAYS = (
    Cell(name="f32-one-by-one", dtype="float32", max_num_seqs=1, options=PLAIN),
    Cell(name="f32-batched", dtype="float32"),
    Cell(name="f32-device-loop", dtype="float32", driver="device loop"),
    Cell(name="f32-invariant", dtype="float32", options={"batch_invariant": True}, repeat=True),
)
_ROUNDED = (
    Cell(name="bf16-one-by-one", dtype="bfloat16", max_num_seqs=1, options=PLAIN),
    Cell(name="bf16-batched", dtype="bfloat16"),
    Cell(name="bf16-device-loop", dtype="bfloat16", driver="device loop"),
    Cell(name="bf16-k3", dtype="bfloat16", options={"num_speculative_tokens": 3}),
)

_EIGHT_BITS = (
    Cell(name="f32-kv-fp8", dtype="float32", options={"kv_cache_dtype": "fp8"}, repeat=True),
    Cell(name="f32-kv-int8", dtype="float32", options={"kv_cache_dtype": "int8"}, repeat=True),
    Cell(name="bf16-kv-fp8", dtype="bfloat16", options={"kv_cache_dtype": "fp8", "num_speculative_tokens": 3}),
)
"""Keys and values of 8 bits: read again out of the prefix cache, and by drafts."""

_FP8_WEIGHTS = (
    Cell(name="f32-weights-fp8", dtype="float32", quantization="fp8_per_channel"),
    Cell(
        name="f32-weights-kv-fp8-k3",
        dtype="float32",
        quantization="fp8_per_channel",
        options={"kv_cache_dtype": "fp8", "num_speculative_tokens": 3},
    ),
)
"""Weights of projections in float8_e4m3fn with a scale for each row; activations as the dtype says."""

MATRIX = (*_WAYS, *CROSS, *SPECULATING, *_ROUNDED, *_EIGHT_BITS, *_FP8_WEIGHTS)
"""What --matrix runs. The first float32 cell is what the others are compared with."""

PAIRWISE = (*_WAYS, *COVERING, _ROUNDED[1])
"""What --pairwise runs."""

BY_NAME = {cell.name: cell for cell in (DEFAULT, *MATRIX, *COVERING)}


def rounds_keys(cell: Cell) -> bool:
    """Whether a cell stores keys and values otherwise than its dtype has them, so that its answers may differ."""
    return cell.options.get("kv_cache_dtype", "auto") != "auto"


def rounds_weights(cell: Cell) -> bool:
    """Whether a cell's parameters are made otherwise than its dtype has them, with the same consequence."""
    return cell.quantization != "auto"


def speculates(cell: Cell) -> bool:
    """Whether a cell needs the model's MTP head."""
    return bool(cell.options.get("num_speculative_tokens"))

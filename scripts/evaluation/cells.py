"""Cells of the matrix: ways to compute the same completions, each a setting of the engine or the loop on the device."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdnjax import LLM

CHUNK = 64
SMALLEST_LENGTH = 512
PREFILL_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting.

    driver        "engine", which dispatches every step from the host, or "device loop", which is `batch_generate`
                  under one jit, in batches of one shape.
    dtype         as EngineConfig's; "auto" is the checkpoint's.
    max_num_seqs  requests that run at once, or rows of a batch; None leaves it to the user.
    options       further fields of EngineConfig.
    """

    name: str
    driver: str = "engine"
    dtype: str = "auto"
    max_num_seqs: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.driver not in DRIVERS:
            raise ValueError(f"driver must be one of {', '.join(DRIVERS)}, got {self.driver!r}")
        if self.driver == "device loop" and self.options:
            raise ValueError(f"the device loop takes no engine options, got {', '.join(self.options)}")


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
    """What a cell gave. `seconds` hold no loading and no compilation."""

    cell: Cell
    dtype: str
    completions: list[Completion]
    seconds: float

    @property
    def output_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


def load(directory: Any, dtype: str, progress: bool = False) -> "LLM":
    """The parameters in one dtype, in an engine of the smallest pools, from which the cells' engines are made."""
    from gdnjax import LLM

    return LLM(
        directory,
        dtype=dtype,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK,
        max_model_len=CHUNK,
        warmup=False,
        use_tqdm=progress,
    )


def run_cell(cell: Cell, dtype: str, loaded: "LLM", work: Workload) -> CellRun:
    """Computes all completions of the workload in the cell's way. `dtype` is what the cell's own stands for."""
    completions, seconds = DRIVERS[cell.driver](cell, loaded, work)
    return CellRun(cell, dtype, completions, seconds)


def _run_engine(cell: Cell, loaded: "LLM", work: Workload) -> tuple[list[Completion], float]:
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
        # Each step has one bucket, so that a short request compiles all that the others need.
        rehearsal = dataclasses.replace(params, max_tokens=min(2, work.max_tokens), ignore_eos=True, stop=None)
        llm.generate(prompts[:1], rehearsal, use_tqdm=False)
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=work.progress)
        seconds = time.perf_counter() - began
    firsts = [output.outputs[0] for output in outputs]
    return [Completion(first.text, first.token_ids, first.finish_reason) for first in firsts], seconds


def _engine_config(cell: Cell, loaded: "LLM", work: Workload):
    """The engine of a cell: what fits the workload, the cell's options in its place."""
    from gdnjax import EngineConfig

    rows = cell.max_num_seqs or work.max_num_seqs
    fields: dict[str, Any] = {
        "max_num_seqs": rows,
        "max_num_batched_tokens": min(doubled(CHUNK, rows * work.longest), PREFILL_TOKENS),
        "max_model_len": doubled(SMALLEST_LENGTH, work.max_length),
        "dtype": loaded.config.dtype,
        **cell.options,
    }
    fields.setdefault("prefill_buckets", (fields["max_num_batched_tokens"],))
    fields.setdefault("decode_buckets", (fields["max_num_seqs"],))
    return EngineConfig(**fields, warmup=False)


def _run_device_loop(cell: Cell, loaded: "LLM", work: Workload) -> tuple[list[Completion], float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

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
    began = time.perf_counter()
    with tqdm(total=len(work.prompts), desc="generating", unit="seq", disable=not work.progress) as bar:
        for prompts in _batches(work.prompts, rows):
            # Missing rows repeat the first one, whose work is thrown away.
            padded = [*prompts, *[prompts[0]] * (rows - len(prompts))]
            table = np.zeros((rows, width), np.int32)
            for row, prompt in enumerate(padded):
                table[row, : len(prompt)] = prompt
            output = compiled(loaded.params, table, np.array([len(prompt) for prompt in padded], np.int32))
            tokens, counts = np.asarray(output.tokens), np.asarray(output.lengths)
            completions += [
                close(tokens[row, : counts[row]].tolist(), loaded.tokenizer, work, eos) for row in range(len(prompts))
            ]
            bar.update(len(prompts))
    return completions, time.perf_counter() - began


DRIVERS: dict[str, Callable[[Cell, "LLM", Workload], tuple[list[Completion], float]]] = {
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

MATRIX = (
    Cell(name="f32-one-by-one", dtype="float32", max_num_seqs=1),
    Cell(name="f32-batched", dtype="float32"),
    Cell(name="f32-device-loop", dtype="float32", driver="device loop"),
    Cell(name="f32-pieces", dtype="float32", options={"max_num_batched_tokens": CHUNK}),
    Cell(name="f32-mixed-layout", dtype="float32", options={"state_layout": "mixed"}),
    Cell(name="bf16-one-by-one", dtype="bfloat16", max_num_seqs=1),
    Cell(name="bf16-batched", dtype="bfloat16"),
    Cell(name="bf16-device-loop", dtype="bfloat16", driver="device loop"),
)
"""What --matrix runs. The first float32 cell is what the others are compared with."""

BY_NAME = {cell.name: cell for cell in (DEFAULT, *MATRIX)}

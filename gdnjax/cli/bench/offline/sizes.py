"""How many requests of how many tokens every section has, and what the engines need for them. Imports no jax."""

import dataclasses
from collections.abc import Collection

from gdnjax.cli.bench.serving import engines
from gdnjax.cli.bench.serving.engines import GRID, Arm, Pools
from gdnjax.config import CHUNK, EngineConfig
from gdnjax.memory import StateGeometry

BLOCK_SIZE = 16

SHORT = 512
"""Prompt tokens of the smaller prefill step."""

WINDOWS = 3
"""A decode figure is the median of so many windows of steps."""

LEAD = 4
"""Decode steps of a full batch before the clock starts."""

FLAGS = {"requests": "num-requests", "batched_tokens": "max-num-batched-tokens"}
"""What flags of sizes are called, where not as the sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Requests and tokens.

    batches             of decode and speculation, requests that decode together; the largest is the engines' rows.
    padded              further batches, which have no bucket of their own: they decode in the next larger one.
    input_len           prompt tokens of decode, speculation, throughput and accounting.
    output_len          output tokens of throughput and accounting.
    decode_len          tokens that a sequence gains over all windows of decode and of speculation.
    requests            of throughput and accounting.
    batched_tokens      prompt tokens of a step.
    prefill_len         prompt tokens of a request of prefill, of which there are prefill_requests.
    prefix_len          tokens that the prefix_requests of prefix share, before prefix_own_len of their own and
                        prefix_output_len of output.
    repeat              runs of prefill, of which the median is shown.
    checkpoints         slots for the prefix cache.
    """

    batches: tuple[int, ...] = (128, 64, 16, 1)
    padded: tuple[int, ...] = ()
    input_len: int = 1024
    output_len: int = 1024
    decode_len: int = 192
    requests: int = 128
    batched_tokens: int = 8192
    prefill_len: int = 8192
    prefill_requests: int = 8
    prefix_requests: int = 64
    prefix_len: int = 4096
    prefix_own_len: int = 64
    prefix_output_len: int = 32
    repeat: int = 3
    checkpoints: int = 24

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "checkpoints" else 1
            for number in value if isinstance(value, tuple) else (value,):
                if number < least:
                    flag = FLAGS.get(field.name, field.name.replace("_", "-"))
                    raise ValueError(f"--{flag} must be at least {least}, got {number}")
        for batch in self.padded:
            if batch in self.batches or batch > self.rows:
                raise ValueError(
                    f"--padded {batch} is a batch with a bucket of its own, or larger than all; allowed: others below "
                    f"{self.rows}"
                )
        if self.batched_tokens % CHUNK:
            raise ValueError(f"--max-num-batched-tokens must be a multiple of {CHUNK}, got {self.batched_tokens}")

    def scaled(self, factor: float) -> "Sizes":
        """Everything but `repeat` and `padded` times `factor`, at least 1 each; a prefix is shared by 2 at least."""
        if not 0 < factor <= 1:
            raise ValueError(f"--scale must be in (0, 1], got {factor:g}")

        def times(size: int) -> int:
            return max(1, round(size * factor))

        kept = ("batches", "padded", "batched_tokens", "repeat")
        lengths = {f.name: times(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in kept}
        lengths["prefix_requests"] = max(2, lengths["prefix_requests"])
        batches = tuple(dict.fromkeys(times(batch) for batch in self.batches))
        tokens = -(-times(self.batched_tokens) // CHUNK) * CHUNK
        return dataclasses.replace(self, batches=batches, batched_tokens=tokens, **lengths)

    @property
    def rows(self) -> int:
        """Requests that run at once in an engine."""
        return max(self.batches)

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.batches)))

    @property
    def named_batches(self) -> dict[str, int]:
        """Requests that decode together, by what their figures are called."""
        padded = {f"{batch} of {min(size for size in self.buckets if size > batch)}": batch for batch in self.padded}
        return {str(batch): batch for batch in self.batches} | padded

    def window_steps(self, tokens_per_step: float) -> int:
        """Steps of a window of decode."""
        return max(1, round(self.decode_len / WINDOWS / tokens_per_step))

    def decode_output(self, batch: int, drafts: int, tokens_per_step: float) -> int:
        """Tokens that a request of a batch emits at most while the others are prefilled and the windows last."""
        # The first decode while the last are prefilled. A prefill step ends for want of tokens or of rows, 8 at most.
        filling = -(-batch * self.input_len // self.batched_tokens) + -(-batch // min(8, self.rows)) + 2
        return (1 + drafts) * (filling + LEAD + WINDOWS * self.window_steps(tokens_per_step) + 2)

    def longest_decode(self, drafts: int, tokens_per_step: float) -> int:
        """Tokens of the longest sequence of decode or speculation."""
        return self.input_len + self.decode_output(self.rows, drafts, tokens_per_step)

    def prompt_tokens(self, sections: Collection[str]) -> int:
        """Most prompt tokens that one of the sections has at once, prefixes aside."""
        tokens = {
            "decode": self.rows * self.input_len,
            "throughput": self.requests * self.input_len,
            "prefill": self.prefill_requests * self.prefill_len,
        }
        return max(tokens[name] for name in sections if name in tokens)

    def engine(self, drafts: int, forced_length: float | None, sections: Collection[str]) -> EngineConfig:
        """An engine for those of the sections that are measured with so many drafts. Raises ValueError where there is
        none.
        """
        decoding = (self.rows, self.longest_decode(drafts, forced_length or 1.0))
        # Requests at once, and their tokens.
        of_section = {
            "decode": decoding,
            "throughput": (min(self.rows, self.requests), self.input_len + self.output_len),
            "prefill": (min(self.rows, self.prefill_requests), self.prefill_len + 1),
            "prefix": (
                min(self.rows, self.prefix_requests),
                self.prefix_len + self.prefix_own_len + self.prefix_output_len,
            ),
        }
        if drafts:
            # What it is compared with.
            sections = {"decode"} | ({"throughput"} & set(sections))
        needs = [need for name, need in of_section.items() if name in sections]
        longest = max(length for _, length in needs)
        return EngineConfig(
            max_num_seqs=self.rows,
            max_model_len=-(-longest // GRID) * GRID,
            decode_buckets=self.buckets,
            max_num_batched_tokens=self.batched_tokens,
            # What is left of prompts behind a cached prefix is short.
            prefill_buckets=tuple(sorted({min(SHORT, self.batched_tokens), self.batched_tokens})),
            block_size=BLOCK_SIZE,
            # One more for each: nobody is kept out for the sake of those who grow.
            num_kv_blocks=max(count * (-(-length // BLOCK_SIZE) + 1) for count, length in needs),
            num_checkpoint_slots=self.checkpoints,
            # No request needs one.
            max_logit_rows=1,
            num_speculative_tokens=drafts,
            spec_acceptance_length=forced_length,
            # Of all steps few are used, and those are prepared.
            warmup=False,
        )

    def pools(self, geometry: StateGeometry) -> tuple[Pools, Pools]:
        """A packed pool that holds half of the requests, and the decoupled one of the same bytes with the engine's
        slots. Raises ValueError where they do not hold one request.
        """
        sizes = engines.Sizes(
            rows=self.rows,
            longest=self.input_len + self.output_len,
            block_size=BLOCK_SIZE,
            pool_requests=max(1, min(self.rows, self.requests) // 2),
            checkpoints=self.checkpoints,
        )
        arms = (Arm("packed", "packed"), Arm("decoupled", prefix_cache=True))
        packed, decoupled = (engines.pools(arm, geometry, sizes) for arm in arms)
        return packed, decoupled

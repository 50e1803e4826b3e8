"""How the engine is set up: frozen, validated at construction, read by everything else. No jax."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from gdnjax.cache_kinds import CacheSpec
from gdnjax.config.checks import check_choice, check_int

CHUNK = 64
"""Tokens in a chunk of the chunked delta rule, and the grid on which prefill pieces are cut."""

LONG_ROWS = 8
"""Prompts of which each may end within a chunk in a prefill step that is full of whole ones."""

DEFAULT_MAX_MODEL_LEN = 8192
"""The most tokens of a request where nobody says: memory is not promised to lengths that nobody uses."""

DTYPES = ("auto", "float32", "bfloat16")
KV_CACHE_DTYPES = (*DTYPES, "fp8", "int8")
KERNELS = ("auto", "pallas", "interpret", "reference")
STATE_LAYOUTS = ("kv", "vk", "mixed")
DRAFT_HEADS = ("target", "fp8")
QUANTIZATIONS = ("auto", "fp8_per_channel", "dequantized")
SSM_DTYPES = ("float32", "bfloat16")
SSM_ROUNDINGS = ("nearest", "stochastic")
DRAFT_ACCEPTANCES = ("shared_noise", "rejection")

MAX_SPECULATIVE_TOKENS = 7
"""Draft tokens of a step: with the token before them a verification has at most 8 rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs. Every field has a default that works; a bad value is an error at construction.

    Capacity
      max_num_seqs            requests that run at once: live slots of the state pool.
      num_checkpoint_slots    slots of the state pool for the prefix cache, beside the live ones; None: what a quarter
                              of the memory that is left holds, at most twice max_num_seqs (0 without the cache).
      max_num_batched_tokens  prompt tokens that one step may prefill; longer prompts are cut into pieces.
      max_model_len           prompt + output tokens of one request; None: min(the model's context, 8192).
      block_size              tokens in a KV block.
      num_kv_blocks           KV blocks besides the null one; None: what memory allows, at most what as many requests
                              of max_model_len as there are slots can use, and for 8-bit KV what kernels can number
                              (`gdnjax.memory.UNNUMBERED`).
      gpu_memory_utilization  share of the device's memory that is left for weights, pools and workspace.
      max_logit_rows          running requests that may use logit_bias, bad_words or allowed_token_ids at once (each
                              holds a row of the vocabulary's size); further ones wait. None: min(max_num_seqs, 16).
                              Penalties need none: there is a row of token counts for every running request.
      max_num_prefill_seqs    prompts that may share a prefill step of the largest bucket. None: 8, and one for each 64
                              tokens of the bucket, as in the others; never more than max_num_seqs. A step draws behind
                              as many prompts as it has rows for, and beyond the default each costs a chunk, too,
                              whether there are so many or not.
    Numerics
      dtype                   "auto" (the checkpoint's), "float32" or "bfloat16": weights and activations.
      quantization            weights: "auto", as the checkpoint has them (codes stay codes on the devices);
                              "fp8_per_channel": projections become float8_e4m3fn with a scale for each output as they
                              are loaded; "dequantized": codes become numbers of dtype as they are loaded.
      kv_cache_dtype          keys and values: "auto" (as weights and activations), "float32", "bfloat16", or of 8 bits
                              with a float32 scale for each token and head: "fp8" (float8_e4m3fn) or "int8". Latents
                              (MLA) are not stored in 8 bits.
      quantize_activations    round what goes into projections to float8_e4m3fn, a scale for each token, in steps of
                              more than 32 rows (prompts, large batches and verify steps) where weights are
                              float8_e4m3fn with a scale for each output (W8A8): faster, and another model, a little.
      ssm_dtype               the recurrent state: "float32" (default) or "bfloat16".
      ssm_rounding            how states are rounded to bfloat16, whenever a step stores them: to the "nearest", or
                              "stochastic", by noise of (seed, position, layer, element), so that what is too small for
                              bfloat16 is not lost on average. Needs ssm_dtype="bfloat16".
      state_layout            how a slot's recurrent state is stored: "vk" (the fastest on an H100), "kv", or "mixed"
                              (prefill writes KV, decode writes VK, a bit per slot says which).
      seed                    seeds requests that bring no seed of their own, and the noise of ssm_rounding.
    Execution
      tensor_parallel_size    devices that share one model.
      enable_expert_parallel  share out routed experts whole over these devices, in place of a slice of every expert on
                              each; what else there is stays as it was. tensor_parallel_size must divide their number,
                              not their width; on one device it changes nothing. For models with experts.
      kernels                 "auto", "pallas", "interpret" or "reference"; see gdnjax.backend.
      prefill_buckets         packed prompt tokens a step is compiled for; empty: 64, 256 and max_num_batched_tokens.
      decode_buckets          rows a decode step is compiled for; empty: 1, 8, 32, twice that and so on, below
                              max_num_seqs, and that.
      max_logprobs            the most alternatives a request may ask log-probabilities of.
      warmup                  compile every step at start; False compiles each at its first use.
      compilation_cache_dir   JAX's persistent compilation cache; None: the one JAX is configured with, or
                              ~/.cache/gdnjax; "" switches it off.
    Prefix cache
      enable_prefix_caching   keep KV blocks and states of what has been computed, for requests that begin alike.
      state_checkpoint_interval  tokens between checkpoints of the recurrent state within a long sequence, a multiple of
                              block_size; None: the larger of 1024 and block_size. Checkpoints at the end of a prompt,
                              before a chat's generation prompt, at a branch and at the end of a turn come on top.
      host_cache_gib          GiB of the host's memory, those of all ranks together, for blocks and states that the
                              device has no more room for: they come back when a prompt begins like them. 0: none. On
                              GPUs the memory is pinned.
      batch_invariant         the same tokens whatever the load, the cache and the neighbours: one prefill bucket, one
                              decode bucket, one sampler, states checkpointed on the grid of chunks only, and all blocks
                              reserved at admission, so that nothing is preempted. Costs throughput: see
                              docs/benchmarks.md.
    Speculation, by the model's MTP head
      num_speculative_tokens  tokens drafted and verified in each decode step, 0 to 7; 0: no speculation.
      draft_acceptance        "shared_noise": drafts and target draw with the same noise, and a draft is kept if it is
                              the target's own token, so that a seed gives the same tokens with and without speculation;
                              "rejection": classic rejection sampling, which keeps more drafts at a temperature, and
                              gives the same distribution, not the same tokens.
      draft_head              what drafts are drawn by: "target", its own head, or "fp8", a copy of that in
                              float8_e4m3fn with a scale for each token of the vocabulary. The copy takes half as long
                              to read as bfloat16, and a byte for each of its numbers. What is emitted is as exact; a
                              few drafts fewer may be kept.
      adaptive_speculation    draft in those steps only where that pays, by what the engine measures as it runs.
      spec_acceptance_length  force this many tokens a step on average, 1 to 1 + num_speculative_tokens, for benchmarks
                              with random weights. The outputs are marked: they are not the model's.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_logit_rows: int | None = None
    max_num_prefill_seqs: int | None = None
    dtype: str = "auto"
    quantization: str = "auto"
    quantize_activations: bool = False
    kv_cache_dtype: str = "auto"
    ssm_dtype: str = "float32"
    ssm_rounding: str = "nearest"
    state_layout: str = "vk"
    seed: int = 0
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    kernels: str = "auto"
    prefill_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()
    max_logprobs: int = 20
    warmup: bool = True
    compilation_cache_dir: str | pathlib.Path | None = None
    enable_prefix_caching: bool = True
    num_checkpoint_slots: int | None = None
    state_checkpoint_interval: int | None = None
    host_cache_gib: int | float = 0
    batch_invariant: bool = False
    num_speculative_tokens: int = 0
    draft_acceptance: str = "shared_noise"
    draft_head: str = "target"
    adaptive_speculation: bool = False
    spec_acceptance_length: float | None = None

    @property
    def pending_rows(self) -> int:
        """Tokens that a step may accept, and leave to the next one to fold into a state."""
        return 1 + self.num_speculative_tokens if self.num_speculative_tokens else 0

    @property
    def keeps_draft_hidden(self) -> bool:
        """Whether what drafts were drawn from is needed when they are put to the test."""
        return self.num_speculative_tokens > 0 and self.draft_acceptance == "rejection"

    @property
    def drafts_apart(self) -> bool:
        """Whether drafts are drawn by a head of their own."""
        return self.draft_head != "target"

    def keeps_states(self, spec: CacheSpec) -> bool:
        """Whether the prefix cache keeps states beside blocks: a model without any goes on from every block."""
        return self.enable_prefix_caching and spec.needs_state

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "tensor_parallel_size"):
            check_int(name, getattr(self, name), 1)
        for name in ("max_model_len", "num_kv_blocks", "max_logit_rows", "max_num_prefill_seqs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_int("max_logprobs", self.max_logprobs, 0)
        check_int("seed", self.seed, 0)
        if self.num_checkpoint_slots is not None:
            check_int("num_checkpoint_slots", self.num_checkpoint_slots, 0)
        for name in (
            "enable_prefix_caching",
            "batch_invariant",
            "warmup",
            "adaptive_speculation",
            "quantize_activations",
            "enable_expert_parallel",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}")
        if self.max_num_batched_tokens % CHUNK:
            raise ValueError(
                f"max_num_batched_tokens must be a multiple of {CHUNK} (prompts are cut there), "
                f"got {self.max_num_batched_tokens}"
            )
        directory = self.compilation_cache_dir
        if directory is not None and not isinstance(directory, str | pathlib.Path):
            raise ValueError(f'compilation_cache_dir must be a path, None or "", got {directory!r}')
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {share!r}")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_choice("ssm_dtype", self.ssm_dtype, SSM_DTYPES)
        check_choice("ssm_rounding", self.ssm_rounding, SSM_ROUNDINGS)
        if self.ssm_rounding != "nearest" and self.ssm_dtype != "bfloat16":
            raise ValueError(
                f"ssm_rounding={self.ssm_rounding!r} needs ssm_dtype='bfloat16', got ssm_dtype={self.ssm_dtype!r}"
            )
        check_choice("state_layout", self.state_layout, STATE_LAYOUTS)
        check_choice("kernels", self.kernels, KERNELS)
        if self.num_checkpoint_slots and not self.enable_prefix_caching:
            raise ValueError(
                f"num_checkpoint_slots={self.num_checkpoint_slots} are of no use with enable_prefix_caching=False; "
                "allowed: None or 0"
            )
        if self.state_checkpoint_interval is not None:
            check_int("state_checkpoint_interval", self.state_checkpoint_interval, 1)
            if self.state_checkpoint_interval % self.block_size:
                raise ValueError(
                    f"state_checkpoint_interval must be a multiple of block_size={self.block_size}, "
                    f"got {self.state_checkpoint_interval}"
                )
        self._check_host_cache()
        self._check_speculation()
        _set_buckets(self, "prefill_buckets", self.max_num_batched_tokens, () if self.batch_invariant else (64, 256))
        # Up to 32 rows the weights are what a step costs, so few sizes will do; from there on it is the rows.
        doubled = tuple(32 << i for i in range(self.max_num_seqs.bit_length()))
        _set_buckets(self, "decode_buckets", self.max_num_seqs, () if self.batch_invariant else (1, 8, *doubled))
        if self.batch_invariant and (len(self.prefill_buckets) > 1 or len(self.decode_buckets) > 1):
            raise ValueError(
                f"batch_invariant=True needs one prefill bucket and one decode bucket, got {self.prefill_buckets} and "
                f"{self.decode_buckets}"
            )

    def _check_host_cache(self) -> None:
        size = self.host_cache_gib
        if not isinstance(size, int | float) or isinstance(size, bool) or not 0 <= size < math.inf:
            raise ValueError(f"host_cache_gib must be a number of GiB, 0 or more, got {size!r}")
        if size and not self.enable_prefix_caching:
            raise ValueError(f"host_cache_gib={size:g} is of no use with enable_prefix_caching=False; allowed: 0")

    def _check_speculation(self) -> None:
        drafts = self.num_speculative_tokens
        check_int("num_speculative_tokens", drafts, 0)
        if drafts > MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, got {drafts}")
        check_choice("draft_acceptance", self.draft_acceptance, DRAFT_ACCEPTANCES)
        check_choice("draft_head", self.draft_head, DRAFT_HEADS)
        if self.drafts_apart and not drafts:
            raise ValueError(f"draft_head={self.draft_head!r} needs num_speculative_tokens above 0")
        if self.adaptive_speculation and (not drafts or self.batch_invariant):
            raise ValueError(
                "adaptive_speculation=True needs num_speculative_tokens above 0 and batch_invariant=False, "
                f"got {drafts} and {self.batch_invariant}"
            )
        length = self.spec_acceptance_length
        if length is not None and (not isinstance(length, int | float) or not drafts or not 1 <= length <= 1 + drafts):
            raise ValueError(
                f"spec_acceptance_length must be between 1 and 1 + num_speculative_tokens={1 + drafts}, and needs "
                f"speculation, got {length!r}"
            )
        if self.checkpoint_interval < 1 + drafts:
            raise ValueError(
                f"state_checkpoint_interval must be at least the {1 + drafts} tokens that a step may produce, "
                f"got {self.checkpoint_interval}"
            )

    @property
    def host_cache_bytes(self) -> int:
        """`host_cache_gib` in bytes, of one rank."""
        return int(self.host_cache_gib * (1 << 30)) // self.tensor_parallel_size

    @property
    def num_logit_rows(self) -> int:
        """`max_logit_rows`, or its default."""
        return min(self.max_num_seqs, 16) if self.max_logit_rows is None else self.max_logit_rows

    def length_within(self, context: int) -> int:
        """`max_model_len`, or its default, for a model of so many tokens of context. Raises ValueError beyond that."""
        if self.max_model_len is None:
            return min(context, DEFAULT_MAX_MODEL_LEN)
        if self.max_model_len > context:
            raise ValueError(f"max_model_len={self.max_model_len} exceeds the model's context of {context} tokens")
        return self.max_model_len

    @property
    def checkpoint_interval(self) -> int:
        """`state_checkpoint_interval`, or its default."""
        return self.state_checkpoint_interval or max(1024, self.block_size)

    @property
    def checkpoint_grid(self) -> int:
        """Checkpoints within a prompt stand at multiples of this many tokens. On multiples of CHUNK, too, a sequence
        that goes on from a checkpoint is cut into the chunks of one that was never cut.
        """
        return max(CHUNK, self.block_size) if self.batch_invariant else self.block_size

    @property
    def prefill_rows(self) -> int:
        """Requests whose prompt tokens may share one prefill step, of the largest bucket."""
        return min(self.max_num_seqs, self.max_num_prefill_seqs or _prompts_within(self.max_num_batched_tokens))

    def prefill_rows_of(self, bucket: int) -> int:
        """Requests whose prompt tokens may share a prefill step of so many tokens: one of `prefill_buckets`."""
        most = self.prefill_rows
        return most if bucket == self.max_num_batched_tokens else min(most, _prompts_within(bucket))


def _prompts_within(tokens: int) -> int:
    """Prompts that a step of so many tokens has rows for, unless it is said otherwise."""
    return LONG_ROWS + tokens // CHUNK


def _set_buckets(config: EngineConfig, name: str, largest: int, defaults: tuple[int, ...]) -> None:
    """Fills in the default buckets and checks given ones: ascending, the largest covering what one step may need."""
    given = getattr(config, name)
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ValueError(f"{name} must be a list of sizes, got {given!r}")
    buckets = tuple(given) or (*(size for size in defaults if size < largest), largest)
    object.__setattr__(config, name, buckets)
    for size in buckets:
        check_int(name, size, 1)
    if list(buckets) != sorted(set(buckets)) or buckets[-1] != largest:
        raise ValueError(f"{name} must ascend and end with {largest}, got {buckets}")

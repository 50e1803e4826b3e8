"""Completes prompts from the command line, streaming to the terminal."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from command import add_speculation_flags, exit_status, prepare_environment, speculation
from compile_stages import CompileStages

if TYPE_CHECKING:
    from gdnjax import LLM, EngineConfig, RequestOutput, SamplingParams
    from gdnjax.serving.tokenizer import Tokenizer

DESCRIPTION = """\
Completes one prompt, or several together, with a Qwen3.5 or Qwen3-Next checkpoint.

The prompt is continued as it stands. With --chat it is a user's message, put through the model's chat template:
that is what instruction-tuned models expect. The completion goes to stdout, everything else to stderr.
"""

EXAMPLES = """\
examples:
  python scripts/generate.py                                                    a story by the embedded model
  python scripts/generate.py -p "Ann has 3 pens and buys 4 more. How many pens does Ann have?" --temp 0
  python scripts/generate.py --model Qwen3.5-4B -p "The capital of France is" --max-tokens 20
  python scripts/generate.py --model Qwen3.5-4B --chat -p "Why is the sky blue?" --temp 0.7 --top-p 0.9
  python scripts/generate.py --model Qwen3.5-4B --system-prompt "Answer in French." -p "Good morning"
  git diff | python scripts/generate.py --model Qwen3.5-4B --chat -p -          the prompt is what stdin says
  python scripts/generate.py --model Qwen3.5-4B --prompts-file prompts.jsonl    one batch
  python scripts/generate.py --model Qwen3.5-4B -p "a" -p "b" --temp 0          greedy, two prompts in one batch
  python scripts/generate.py --num-speculative-tokens 3                         the same story in fewer steps

Without --model a small trained model answers that is a part of gdnjax: it solves simple word problems and tells short
stories, and continues "Once upon a time" where there is no prompt either.

Sampling values that are not given are those of the checkpoint's generation_config.json, or else: temperature 1, no
top-p, top-k or min-p. The same --seed, prompt and values give the same text on the same machine.

On a GPU, JAX takes a fixed share of the memory when it starts: --memory-fraction, by default 0.9, is handed to it as
XLA_PYTHON_CLIENT_MEM_FRACTION unless that variable is set. Compiled steps are kept in ~/.cache/gdnjax (or where
JAX_COMPILATION_CACHE_DIR points): the first run with a model compiles, later ones start faster.

Exit status: 0 done, 2 a bad argument, prompt or checkpoint (the reason is on stderr), 130 interrupted.
"""

DEMO_PROMPT = "Once upon a time"
"""What the embedded model continues where no prompt is given."""

SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")

# The grids are coarse, so that most runs with a model find their steps in the compilation cache.
ROW_GRID = (1, 8)
PREFILL_GRID = (64, 256, 1024)
SMALLEST_LENGTH = 512

REHEARSED_STEPS = 12
"""Decode steps after which adaptive speculation has tried both of its choices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as it was given, and what the model is fed for it."""

    text: str
    token_ids: list[int]


class Start:
    """Where the time before the first prompt goes: whoever has finished a part says so.

    import         jax and gdnjax.
    devices        the platform's own start.
    tokenizer      configuration and tokenizer, with the import of transformers.
    weights        from the checkpoint to the devices.
    pools          the rest of building the engine: the plan of its memory, its pools.
    trace, lowering, xla   whatever was compiled since the import, in JAX's stages; not counted in other parts.
    rehearsal      the rest of the request that compiles: its steps, and what is no stage of JAX's.
    """

    def __init__(self):
        self.began = self._last = time.monotonic()
        self.compiling = CompileStages()
        self.seconds: dict[str, float] = {}

    def finished(self, part: str) -> float:
        """A part has ended, and the next begins. Returns the time."""
        now = time.monotonic()
        stages = self.compiling.seconds(self._last, now)
        self._add(part, now - self._last - sum(stages.values()))
        for stage, seconds in stages.items():
            self._add(stage, seconds)
        self._last = now
        return now

    def move(self, part: str, other: str, seconds: float) -> None:
        """So much of one part is better called another."""
        self._add(part, -seconds)
        self._add(other, seconds)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What the closing line says. Times in seconds.

    prompt_rate, generation_rate   tokens per second; of one prompt: up to its first token, and after it. Of several:
                                   all tokens over the time of the whole batch.
    time_to_first_token            mean over the prompts, from queueing; nothing is compiled in it.
    draft_acceptance_rate          share of the drafts that were kept; None where nothing was drafted.
    mean_acceptance_length         tokens of a decode step on average; None where nothing was drafted.
    import_time, load_time, compile_time   the parts of the start-up.
    stages                         the same time, cut finer; they add up to it. See `Start`.
    weights_bytes, weights_rate    bytes of parameters, and GiB of them loaded per second.
    peak_bytes, peak_of            the most memory held, and of what.
    """

    prompt_tokens: int
    prompt_rate: float
    generation_tokens: int
    generation_rate: float
    time_to_first_token: float
    import_time: float
    load_time: float
    compile_time: float
    peak_bytes: int
    peak_of: str
    weights_bytes: int = 0
    weights_rate: float = 0.0
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    draft_acceptance_rate: float | None = None
    mean_acceptance_length: float | None = None

    def __str__(self) -> str:
        start_up = self.import_time + self.load_time + self.compile_time
        drafts = ""
        if self.draft_acceptance_rate is not None:
            share, length = self.draft_acceptance_rate, self.mean_acceptance_length
            drafts = f"drafts accepted {share:.0%}, {length:.1f} tokens a step | "
        return (
            f"prompt {self.prompt_tokens} tokens, {self.prompt_rate:.1f} tok/s | "
            f"generation {self.generation_tokens} tokens, {self.generation_rate:.1f} tok/s | {drafts}"
            f"first token after {self.time_to_first_token:.3f} s | "
            f"start-up {start_up:.1f} s (import {self.import_time:.1f}, load {self.load_time:.1f}, "
            f"compile {self.compile_time:.1f}; weights at {self.weights_rate:.2f} GiB/s) | "
            f"peak memory {self.peak_bytes / (1 << 30):.2f} GiB ({self.peak_of})"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax: --help and mistakes answer at once."""
    from gdnjax.assets import EMBEDDED_MODEL
    from gdnjax.config import DTYPES, KERNELS

    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="DIR",
        default=EMBEDDED_MODEL,
        help="checkpoint directory: Hugging Face's, or one of scripts/convert.py (default: the embedded model)",
    )
    add("--tokenizer", metavar="DIR", help="directory of the tokenizer (default: the model's)")
    add("--dtype", choices=DTYPES, default="auto", help="of weights and activations; auto: the checkpoint's")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices that share the model (default: 1)")
    add("--kernels", choices=KERNELS, default="auto", help="which implementation of the ops runs (default: auto)")
    add("--max-model-len", type=int, metavar="N", help="longest prompt with its output (default: what is needed)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add = parser.add_argument_group("prompts").add_argument
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable; - reads stdin")
    add("--prompts-file", metavar="FILE", help='one prompt a line, or a .jsonl file of {"prompt": "..."}')
    add("--chat", action="store_true", help="put each prompt through the chat template, as a user's message")
    add("--system-prompt", metavar="TEXT", help="the system message before each prompt; implies --chat")
    add("--ignore-chat-template", action="store_true", help="continue prompts as they stand (this is the default)")
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (default: 256)")
    add("--temperature", "--temp", type=float, metavar="T", help="0 is greedy")
    add("--top-p", type=float, metavar="P", help="keep the most probable tokens up to this mass, in (0, 1]")
    add("--top-k", type=int, metavar="K", help="keep the K most probable tokens; 0 keeps all")
    add("--min-p", type=float, metavar="P", help="drop tokens less probable than this share of the best, in [0, 1]")
    add("--seed", type=int, metavar="N", help="of the noise (default: the same in every run)")
    add("--stop", action="append", metavar="TEXT", help="end the output before this text; repeatable")
    add_speculation_flags(parser.add_argument_group("speculation").add_argument)
    add = parser.add_argument_group("output").add_argument
    add("--stats-json", metavar="FILE", help="also write the numbers of the closing line there")
    add("--verbose", action="store_true", help="log what the engine does, and show where an error came from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("generate.py", lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the closing line."""
    from gdnjax.assets import EMBEDDED_MODEL, model_directory

    directory = model_directory(arguments.model)
    if arguments.model == EMBEDDED_MODEL and not arguments.prompt and not arguments.prompts_file:
        print(f"no prompt: continuing {DEMO_PROMPT!r}", file=sys.stderr)
        arguments.prompt = [DEMO_PROMPT]
    texts = read_prompts(arguments)
    given = given_sampling(arguments)
    speculation(arguments)
    clock = Start()
    prepare_environment(arguments.memory_fraction, verbose=arguments.verbose)
    llm, prompts = start(arguments, directory, texts, clock)
    with llm:
        params = llm.default_sampling_params(**given)
        started = clock.finished("pools")
        report = llm.load_report
        if report is not None:
            clock.move("pools", "weights", report.seconds)
        rehearse(llm, prompts[0], params)
        compiled = clock.finished("rehearsal")
        outputs = stream(llm, prompts[0], params) if len(prompts) == 1 else batch(llm, prompts, params)
        peak_bytes, peak_of = peak_memory()
    stats = Stats(
        **measure(outputs),
        import_time=clock.seconds["import"],
        load_time=started - clock.began - clock.seconds["import"],
        compile_time=compiled - started,
        peak_bytes=peak_bytes,
        peak_of=peak_of,
        weights_bytes=report.parameter_bytes if report else 0,
        weights_rate=report.gib_per_second if report else 0.0,
        stages=clock.seconds,
    )
    print(stats, file=sys.stderr)
    if arguments.stats_json:
        pathlib.Path(arguments.stats_json).write_text(json.dumps(dataclasses.asdict(stats), indent=2) + "\n")
    return 0


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The texts of all prompts, in order. Raises ValueError where there are none or one is empty."""
    if arguments.prompt.count("-") > 1:
        raise ValueError("-p - was given twice, and stdin can be read once")
    if arguments.ignore_chat_template and (arguments.chat or arguments.system_prompt is not None):
        raise ValueError("--ignore-chat-template contradicts --chat and --system-prompt; leave one of them out")
    prompts = [read_stdin() if prompt == "-" else prompt for prompt in arguments.prompt]
    if arguments.prompts_file:
        prompts += read_prompts_file(pathlib.Path(arguments.prompts_file))
    if not prompts:
        raise ValueError("no prompt: give -p TEXT, -p - for stdin, or --prompts-file FILE")
    for index, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
    return prompts


def read_stdin() -> str:
    """All of stdin, without the newline that ends its last line."""
    return sys.stdin.read().removesuffix("\n")


def read_prompts_file(file: pathlib.Path) -> list[str]:
    """One prompt a line; blank lines are skipped. Lines of a .jsonl file are objects with a "prompt"."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    return [_prompt_of_json(file, line) for line in lines] if file.suffix == ".jsonl" else lines


def _prompt_of_json(file: pathlib.Path, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: expected {{"prompt": "..."}} in every line, got {line[:80]!r}') from error
    if not isinstance(prompt, str):
        raise ValueError(f"{file}: a prompt must be a text, got {prompt!r}")
    return prompt


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the user gave, checked before anything slow begins."""
    from gdnjax import SamplingParams

    given = {name: getattr(arguments, name) for name in SAMPLING_FLAGS if getattr(arguments, name) is not None}
    given["max_tokens"] = arguments.max_tokens
    SamplingParams(**given)
    return given


def start(
    arguments: argparse.Namespace, directory: pathlib.Path, texts: Sequence[str], clock: Start
) -> tuple["LLM", list[Prompt]]:
    """A loaded model fitted to the prompts, and the prompts in tokens. `clock` is told the parts of it but the last."""
    import jax

    from gdnjax import LLM
    from gdnjax.config import ModelConfig
    from gdnjax.serving.tokenizer import Tokenizer

    clock.compiling.listen()
    clock.finished("import")
    model = ModelConfig.from_hf(directory)
    tokenizer = Tokenizer.from_directory(arguments.tokenizer or directory)
    prompts = [Prompt(text=text, token_ids=encode(tokenizer, text, arguments)) for text in texts]
    config = fit_engine(arguments, [len(prompt.token_ids) for prompt in prompts], model.max_position_embeddings)
    clock.finished("tokenizer")
    jax.devices()
    clock.finished("devices")
    return LLM(directory, config, tokenizer=tokenizer, use_tqdm=sys.stderr.isatty()), prompts


def encode(tokenizer: "Tokenizer", text: str, arguments: argparse.Namespace) -> list[int]:
    """The tokens of a prompt: of the text itself, or of a conversation that it opens."""
    if not arguments.chat and arguments.system_prompt is None:
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if arguments.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    return tokenizer.apply_chat_template(messages)


def fit_engine(arguments: argparse.Namespace, lengths: Sequence[int], context: int) -> "EngineConfig":
    """The smallest engine on the grids that holds prompts of so many tokens: few shapes, compiled as they are met.

    Raises ValueError where a prompt is longer than the model's `context` or than the user allows.
    """
    from gdnjax import EngineConfig

    rows = round_up(len(lengths), ROW_GRID)
    max_model_len = arguments.max_model_len
    if max_model_len is None:
        max_model_len = SMALLEST_LENGTH
        while max_model_len < max(lengths) + arguments.max_tokens:
            max_model_len *= 2
        max_model_len = min(max_model_len, context)
    if max(lengths) >= max_model_len:
        raise ValueError(
            f"a prompt has {max(lengths)} tokens, and a length of {max_model_len} leaves no room for an output token; "
            f"the model's context is {context} tokens"
        )
    tokens = round_up(sum(lengths), PREFILL_GRID)
    blocks = None
    if len(lengths) == 1:
        # What one prompt can fill: nothing is left to be divided, so the largest step needs no compiling for its size.
        blocks = -(-max_model_len // EngineConfig.block_size)
    return EngineConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_model_len=max_model_len,
        prefill_buckets=(tokens,),
        decode_buckets=(rows,),
        num_kv_blocks=blocks,
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        kernels=arguments.kernels,
        warmup=False,
        **speculation(arguments),
    )


def round_up(size: int, grid: Sequence[int]) -> int:
    """The smallest of `grid` that holds `size`, or its largest: what exceeds that takes several steps."""
    return next((step for step in grid if size <= step), grid[-1])


def rehearse(llm: "LLM", prompt: Prompt, params: "SamplingParams") -> None:
    """Compiles what the prompts will need by a short request, so that what is measured after it is not compilation."""
    tokens = 2
    if llm.config.adaptive_speculation:
        # So many steps that some of them are taken with drafts and some without.
        tokens = REHEARSED_STEPS * (1 + llm.config.num_speculative_tokens)
    short = dataclasses.replace(params, max_tokens=min(params.max_tokens, tokens), stop=None, ignore_eos=True)
    # What is pending at the end of a request is folded in before the next turn, so that step needs another request.
    runs = 2 if llm.config.num_speculative_tokens else 1
    with notice("compiling (kept for later runs) ..."):
        for _ in range(runs):
            llm.generate({"prompt_token_ids": prompt.token_ids[:1]}, short, use_tqdm=False)


@contextlib.contextmanager
def notice(text: str):
    """Shows a line on a terminal while something takes its time."""
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if sys.stderr.isatty():
            print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)


def stream(llm: "LLM", prompt: Prompt, params: "SamplingParams") -> list["RequestOutput"]:
    """Prints a completion as its tokens come."""
    outputs = []
    for piece in llm.stream({"prompt_token_ids": prompt.token_ids}, params):
        print(piece.text, end="", flush=True)
        if piece.output is not None:
            outputs.append(piece.output)
    print(flush=True)
    return outputs


def batch(llm: "LLM", prompts: Sequence[Prompt], params: "SamplingParams") -> list["RequestOutput"]:
    """Prints the completions of several prompts, generated together, each under a header."""
    token_ids = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    outputs = llm.generate(token_ids, params, use_tqdm=sys.stderr.isatty())
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        print(f"==> {index}: {headline(prompt.text)} <==\n{output.outputs[0].text}\n", flush=True)
    return outputs


def headline(text: str, width: int = 60) -> str:
    """The beginning of a prompt, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def measure(outputs: Sequence["RequestOutput"]) -> dict[str, Any]:
    """The counts and times of Stats that requests know of."""
    from gdnjax.serving.outputs import acceptance_rate, mean_acceptance_length

    metrics = [output.metrics for output in outputs if output.metrics is not None]
    prompt_tokens = sum(metric.num_prompt_tokens for metric in metrics)
    tokens = sum(metric.num_output_tokens for metric in metrics)
    first_tokens = [metric.time_to_first_token or 0.0 for metric in metrics]
    first_token = sum(first_tokens) / len(metrics)
    drafted, accepted, steps = (
        sum(getattr(metric, name) for metric in metrics)
        for name in ("num_draft_tokens", "num_accepted_draft_tokens", "num_decode_steps")
    )
    if len(metrics) == 1:
        prompt_rate = rate(prompt_tokens, first_token)
        per_token = metrics[0].time_per_output_token
        generation_rate = 1 / per_token if per_token else 0.0
    else:
        whole = max(metric.latency or 0.0 for metric in metrics)
        prompt_rate, generation_rate = rate(prompt_tokens, whole), rate(tokens, whole)
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_rate": prompt_rate,
        "generation_tokens": tokens,
        "generation_rate": generation_rate,
        "time_to_first_token": first_token,
        "draft_acceptance_rate": acceptance_rate(accepted, drafted),
        "mean_acceptance_length": mean_acceptance_length(accepted, steps) if drafted else None,
    }


def rate(count: int, seconds: float) -> float:
    """Per second; 0 for an interval too short to be measured."""
    return count / seconds if seconds > 0 else 0.0


def peak_memory() -> tuple[int, str]:
    """The most bytes that were in use, and of what: the fullest device, or the process where devices do not say."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(peaks):
        return max(peaks), "of a device"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return resident if sys.platform == "darwin" else resident * 1024, "of the process"


if __name__ == "__main__":
    sys.exit(main())

"""Completes prompts from the command line, streaming to the terminal."""

import argparse
import collections
import dataclasses
import importlib.util
import json
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gdnjax.cli.batch_output import BatchOutput, opened, settings_of
from gdnjax.cli.command import (
    add_device_flags,
    add_host_cache_flag,
    add_number_flags,
    add_process_flags,
    add_speculation_flags,
    check_writable,
    command_parser,
    devices,
    exit_status,
    over_processes,
    prepare_environment,
    speculation,
    write_json,
)
from gdnjax.cli.compile_stages import CompileStages
from gdnjax.progress import Progress

if TYPE_CHECKING:
    from gdnjax.config import EngineConfig
    from gdnjax.sampling_params import SamplingParams, StructuredOutputsParams
    from gdnjax.serving.llm import LLM
    from gdnjax.serving.outputs import CompletionOutput, RequestOutput
    from gdnjax.serving.submission import Submission
    from gdnjax.serving.tokenizer import Tokenizer

DESCRIPTION = """\
Completes one prompt, or several together, with a Qwen3.5 or Qwen3-Next checkpoint.

The prompt is continued as it stands. With --chat it is a user's message, put through the model's chat template:
that is what instruction-tuned models expect. The completion goes to stdout, everything else to stderr.
"""

EXAMPLES = """\
examples:
  {command}                                                      a story by the embedded model
  {command} "Once upon a time, a fox"                            continues a text
  {command} "Ann has 3 pens and buys 4 more. How many pens does Ann have?" --temp 0
  {command} --model Qwen3.5-4B "The capital of France is" --max-tokens 20
  {command} --model Qwen3.5-4B --chat "Why is the sky blue?" --temp 0.7 --top-p 0.9
  {command} --model Qwen3.5-4B --no-thinking -p "Why is the sky blue?"
  {command} --model Qwen3.5-4B --system-prompt "Answer in French." -p "Good morning"
  git diff | {command} --model Qwen3.5-4B --chat -p -            the prompt is what stdin says
  {command} --model Qwen3.5-4B --prompts-file prompts.jsonl --jsonl    one batch in and out
  {command} --model Qwen3.5-4B --input-file in.jsonl --output-file out.jsonl   the same; run again, it goes on
  {command} --model Qwen3.5-4B -p "a" -p "b" --temp 0            greedy, two prompts in one batch
  {command} -n 3 "Once upon a time"                              three stories
  {command} "Is 7 more than 5?" --choice yes --choice no          one of these texts
  {command} --dtype float32 --num-speculative-tokens 3           the same story in fewer steps
  srun {command} --distributed --model Qwen3.5-397B-A17B-FP8 --tensor-parallel-size 8 "Once upon a time"

Without --model a small trained model answers that is a part of gdnjax: it solves simple word problems and tells short
stories, and continues "Once upon a time" where there is no prompt either.

Sampling values that are not given are those of the checkpoint's generation_config.json, or else: temperature 1, no
top-p, top-k or min-p. The same --seed, prompt and values give the same text on the same machine. Drafts change nothing
but rounding: in bfloat16 (the embedded model's own dtype) a near tie may fall the other way, and another text follows.

On a GPU, JAX takes a fixed share of the memory when it starts: --memory-fraction, by default 0.9, is handed to it as
XLA_PYTHON_CLIENT_MEM_FRACTION unless that variable is set. Compiled steps are kept in ~/.cache/gdnjax (or where
JAX_COMPILATION_CACHE_DIR points): the first run with a model compiles, later ones start faster.

{processes}
Exit status: 0 done, 2 a bad argument, prompt or checkpoint (the reason is on stderr), 3 another process is gone, 130
interrupted, 143 terminated.
"""

DEMO_PROMPT = "Once upon a time"
"""What the embedded model continues where no prompt is given."""

SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "n")
SAMPLING_FLAGS += ("presence_penalty", "frequency_penalty", "repetition_penalty")

MAX_TOKENS = 256
"""Most tokens to generate, where nothing else is said."""

# The grids are coarse, so that most runs with a model find their steps in the compilation cache.
ROW_GRID = (1, 8)
MANY_ROWS = 64
"""For so many completions or more."""
QUEUED = 4
"""Prompts of an --output-file that are with the engine, for each of its rows."""
PREFILL_GRID = (64, 256, 1024)
SMALLEST_LENGTH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as it was given, a text or token ids, and what the model is fed for it. `origin` is for messages."""

    text: str | None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    origin: str = "a prompt"


class Start:
    """Where the time before the first prompt goes: whoever has finished a part says so.

    import         jax and gdnjax.
    devices        the platform's own start.
    tokenizer      configuration and tokenizer, with the import of transformers.
    weights        from the checkpoint to the devices.
    pools          the rest of building the engine: the plan of its memory, its pools.
    trace, lowering, xla   whatever was compiled since the import, in JAX's stages; not counted in other parts.
    rehearsal      the rest of compiling: each step runs once, and what is no stage of JAX's.
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


def build_parser(command: str = "gdnjax generate") -> argparse.ArgumentParser:
    """The command line, for who calls it `command`. Imports no jax: --help and mistakes answer at once."""
    from gdnjax.assets import EMBEDDED_MODEL
    from gdnjax.config import KERNELS

    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="DIR",
        default=EMBEDDED_MODEL,
        help="checkpoint directory: Hugging Face's, or one of `gdnjax convert` (default: the embedded model)",
    )
    add_number_flags(add)
    add_device_flags(add)
    add("--kernels", choices=KERNELS, default="auto", help="which implementation of the ops runs (default: auto)")
    add("--max-model-len", type=int, metavar="N", help="longest prompt with its output (default: what is needed)")
    add("--max-num-seqs", type=int, metavar="N", help="completions at a time (default: 1, 8 or 64, by their number)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add_host_cache_flag(add)
    add_process_flags(parser.add_argument_group("processes").add_argument)
    add = parser.add_argument_group("prompts").add_argument
    add("text", nargs="*", metavar="PROMPT", help="a prompt, as with -p; several come before those of -p")
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable; - reads stdin")
    add(
        "--prompts-file",
        "--input-file",
        metavar="FILE",
        help='one prompt a line, or a .jsonl file of {"prompt": "..."} or {"prompt_token_ids": [...]}',
    )
    add("--chat", action="store_true", help="put each prompt through the chat template, as a user's message")
    add("--system-prompt", metavar="TEXT", help="the system message before each prompt; implies --chat")
    add(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="give the chat template enable_thinking; implies --chat (default: what the template does)",
    )
    add("--ignore-chat-template", action="store_true", help="continue prompts as they stand (this is the default)")
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", type=int, metavar="N", help=f"most tokens to generate (default: {MAX_TOKENS})")
    add("-n", "--samples", type=int, dest="n", metavar="N", help="completions of each prompt (default: 1)")
    add("--temperature", "--temp", type=float, metavar="T", help="0 is greedy")
    add("--top-p", type=float, metavar="P", help="keep the most probable tokens up to this mass, in (0, 1]")
    add("--top-k", type=int, metavar="K", help="keep the K most probable tokens; 0 keeps all")
    add("--min-p", type=float, metavar="P", help="drop tokens less probable than this share of the best, in [0, 1]")
    add("--seed", type=int, metavar="N", help="of the noise (default: the same in every run)")
    add("--presence-penalty", type=float, metavar="F", help="off the logit of tokens in the output, -2 to 2")
    add("--frequency-penalty", type=float, metavar="F", help="the same for each time that they occur, -2 to 2")
    add("--repetition-penalty", type=float, metavar="F", help="divides logits of earlier tokens; 1 is none")
    add("--stop", action="append", metavar="TEXT", help="end the output before this text; repeatable")
    add = parser.add_argument_group("structured output (pip install 'gdnjax[structured]')").add_argument
    add("--json-schema", metavar="FILE", help="the output is JSON that this schema allows")
    add("--regex", metavar="PATTERN", help="the output matches this as a whole")
    add("--choice", action="append", metavar="TEXT", help="the output is one of these; repeatable")
    add_speculation_flags(parser.add_argument_group("speculation").add_argument)
    add = parser.add_argument_group("output").add_argument
    add("--jsonl", action="store_true", help="a JSON object a line for each completion on stdout, in place of text")
    add(
        "--output-file",
        metavar="FILE",
        help="the same objects there, in the order of the prompts; prompts whose completions it has are skipped",
    )
    add("--stats-json", metavar="FILE", help="also write the numbers of the closing line there")
    add("--verbose", action="store_true", help="log what the engine does, and show where an error came from")
    return parser


def main(argv: list[str] | None = None, command: str = "gdnjax generate") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    parser = build_parser(command)
    # Intermixed: prompts may stand anywhere among the flags.
    arguments = parser.parse_intermixed_args(argv)
    return exit_status(command.rpartition("/")[2], lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    from gdnjax.assets import model_directory

    directory = model_directory(arguments.model)

    def follow() -> None:
        from gdnjax.serving import following

        # Which engine it is, process 0 has found out from its prompts.
        following.follow(directory)

    prepare_environment(arguments.memory_fraction, host_cache_gib=arguments.host_cache_gib, verbose=arguments.verbose)
    return over_processes(arguments, lambda: complete_all(arguments, directory), follow)


def complete_all(arguments: argparse.Namespace, directory: pathlib.Path) -> int:
    """From the prompts to the closing line."""
    from gdnjax.assets import EMBEDDED_MODEL

    given = given_sampling(arguments)
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    check_writable("--stats-json", arguments.stats_json)
    arguments.prompt = [*arguments.text, *arguments.prompt]
    if arguments.model == EMBEDDED_MODEL and not arguments.prompt and not arguments.prompts_file:
        print(f"no prompt: continuing {DEMO_PROMPT!r}", file=sys.stderr)
        arguments.prompt = [DEMO_PROMPT]
    prompts = read_prompts(arguments)
    speculation(arguments)
    clock = Start()
    if arguments.output_file is None:
        return complete_prompts(arguments, directory, prompts, given, clock)
    if arguments.jsonl:
        raise ValueError("--output-file contradicts --jsonl, which has the lines on stdout; leave one of them out")
    lines = [as_given(prompt) for prompt in prompts]
    with opened(arguments.output_file, lines, arguments.n or 1, settings(arguments, directory, given)) as output:
        if output.num_done == len(prompts):
            print(f"{arguments.output_file}: all of {len(prompts)} prompts are done", file=sys.stderr)
            return 0
        if output.num_done:
            print(f"{arguments.output_file}: goes on behind {output.num_done} prompts", file=sys.stderr)
        return complete_prompts(arguments, directory, prompts, given, clock, output)


def settings(arguments: argparse.Namespace, directory: pathlib.Path, given: dict[str, Any]) -> str:
    """What completions depend on beside their prompts, but for the roundings of another engine."""
    from gdnjax import checkpoint

    names = ("tokenizer", "chat", "system_prompt", "thinking", "dtype", "quantization", "kv_cache_dtype")
    names += ("max_model_len", "draft_acceptance")
    return settings_of(
        model=(directory / "config.json").read_text(encoding="utf-8"),
        weights=checkpoint.fingerprint(directory),
        sampling=given,
        flags={name: getattr(arguments, name) for name in names},
    )


def complete_prompts(
    arguments: argparse.Namespace,
    directory: pathlib.Path,
    prompts: list[Prompt],
    given: dict[str, Any],
    clock: Start,
    output: BatchOutput | None = None,
) -> int:
    """From checked prompts to the closing line: to stdout, or what `output` lacks of them there."""
    llm, prompts = start(arguments, directory, prompts, clock)
    with llm:
        params = llm.default_sampling_params(**given)
        started = clock.finished("pools")
        report = llm.load_report
        if report is not None:
            clock.move("pools", "weights", report.seconds)
        # So that what is measured after it is not compilation.
        llm.engine.prepare([min(len(prompts) * params.n, llm.config.max_num_seqs)], [params])
        compiled = clock.finished("rehearsal")
        if output is not None:
            outputs = write_rest(llm, prompts, params, output)
        elif arguments.jsonl:
            outputs = as_json_lines(llm, prompts, params)
        elif len(prompts) * params.n == 1:
            outputs = stream(llm, prompts[0], params)
        else:
            outputs = batch(llm, prompts, params)
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
        write_json(arguments.stats_json, dataclasses.asdict(stats))
    return 0


def chats(arguments: argparse.Namespace) -> bool:
    """Whether prompts go through the chat template."""
    return arguments.chat or arguments.system_prompt is not None or arguments.thinking is not None


def read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """All prompts, in order. Raises ValueError where there are none, or one is empty or no text."""
    if arguments.prompt.count("-") > 1:
        raise ValueError("-p - was given twice, and stdin can be read once")
    if arguments.ignore_chat_template and chats(arguments):
        raise ValueError(
            "--ignore-chat-template contradicts --chat, --system-prompt and --thinking; leave one of them out"
        )
    prompts = [
        Prompt(text=read_stdin() if text == "-" else text, origin=f"prompt {number}")
        for number, text in enumerate(arguments.prompt, start=1)
    ]
    if arguments.prompts_file:
        prompts += read_prompts_file(pathlib.Path(arguments.prompts_file))
    if not prompts:
        if arguments.prompts_file:
            raise ValueError(f"{arguments.prompts_file} holds no prompt")
        raise ValueError("no prompt: give PROMPT or -p TEXT, -p - for stdin, or --prompts-file FILE")
    for prompt in prompts:
        if not prompt.text and not prompt.token_ids:
            raise ValueError(f"{prompt.origin} is empty")
        check_text(prompt.origin, prompt.text)
        if prompt.text is None and chats(arguments):
            raise ValueError(f"{prompt.origin} is token ids, which no chat template takes; leave --chat out")
    check_text("--system-prompt", arguments.system_prompt)
    return prompts


def check_text(name: str, text: str | None) -> None:
    """Raises ValueError for bytes that are no UTF-8, which Python carries along as lone surrogates."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (at character {error.start + 1})") from error


def read_stdin() -> str:
    """All of stdin, without the newline that ends its last line. Raises ValueError where it is closed or no text."""
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("-p -: standard input is closed")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"-p -: standard input is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"-p -: standard input cannot be read: {error.strerror}") from error


def read_prompts_file(file: pathlib.Path) -> list[Prompt]:
    """One prompt a line; blank lines are skipped. Lines of a .jsonl file are objects with a "prompt", or with
    "prompt_token_ids".
    """
    prompts = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}: line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text: {error}") from error
        if text.strip():
            prompts.append(_prompt_of_json(where, text) if file.suffix == ".jsonl" else Prompt(text=text, origin=where))
    return prompts


def _prompt_of_json(where: str, line: str) -> Prompt:
    allowed = 'allowed: {"prompt": "..."} or {"prompt_token_ids": [...]}'
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}; {allowed}") from error
    keys = ("prompt", "prompt_token_ids")
    if not isinstance(content, dict) or sum(key in content for key in keys) != 1:
        raise ValueError(f"{where}: {allowed}, got {line[:80]!r}")
    if "prompt" in content:
        if not isinstance(content["prompt"], str):
            raise ValueError(f"{where}: a prompt must be a text, got {content['prompt']!r}")
        return Prompt(text=content["prompt"], origin=where)
    ids = content["prompt_token_ids"]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"{where}: prompt_token_ids must be a list of token ids, got {str(ids)[:80]!r}")
    return Prompt(text=None, token_ids=ids, origin=where)


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the user gave, checked before anything slow begins."""
    from gdnjax.sampling_params import SamplingParams

    given = {name: getattr(arguments, name) for name in SAMPLING_FLAGS if getattr(arguments, name) is not None}
    given["max_tokens"] = MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    structure = given_structure(arguments)
    if structure is not None:
        given["structured_outputs"] = structure
    SamplingParams(**given)
    return given


def given_structure(arguments: argparse.Namespace) -> "StructuredOutputsParams | None":
    """What the output has to be. Raises ValueError for more than one, and for what is no schema or no grammar, and
    ImportError where nothing compiles it.
    """
    from gdnjax.sampling_params import StructuredOutputsParams

    flags = {"--json-schema": arguments.json_schema, "--regex": arguments.regex, "--choice": arguments.choice}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} contradict one another; leave all but one of them out")
    # Before a model is loaded.
    if given and importlib.util.find_spec("llguidance") is None:
        raise ImportError(f"{given[0]} needs llguidance, which is not installed: pip install 'gdnjax[structured]'")
    for text in (arguments.regex, *(arguments.choice or ())):
        check_text(given[0] if given else "", text)
    if not given:
        return None
    from gdnjax.serving.structured import check_grammar

    where = ""
    try:
        if arguments.json_schema is not None:
            where = f"{arguments.json_schema}: "
            text = pathlib.Path(arguments.json_schema).read_text(encoding="utf-8")
            structure = StructuredOutputsParams(json=text)
        elif arguments.regex is not None:
            structure = StructuredOutputsParams(regex=arguments.regex)
        else:
            structure = StructuredOutputsParams(choice=arguments.choice)
        check_grammar(structure)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    return structure


def start(
    arguments: argparse.Namespace, directory: pathlib.Path, prompts: Sequence[Prompt], clock: Start
) -> tuple["LLM", list[Prompt]]:
    """A loaded model fitted to the prompts, and the prompts in tokens. `clock` is told the parts of it but the last."""
    import jax

    from gdnjax.config import ModelConfig
    from gdnjax.serving.llm import LLM
    from gdnjax.serving.tokenizer import Tokenizer

    clock.compiling.listen()
    clock.finished("import")
    model = ModelConfig.from_hf(directory)
    tokenizer = Tokenizer.named(arguments.tokenizer or directory)
    prompts = [dataclasses.replace(prompt, token_ids=encode(tokenizer, prompt, arguments)) for prompt in prompts]
    for prompt in prompts:
        outside = [token for token in prompt.token_ids if not 0 <= token < model.vocab_size]
        if outside:
            raise ValueError(
                f"{prompt.origin} has token id {outside[0]}, outside the vocabulary; allowed: 0 to "
                f"{model.vocab_size - 1}"
            )
    lengths = [len(prompt.token_ids) for prompt in prompts]
    config = fit_engine(arguments, lengths, model.max_position_embeddings)
    room = (config.max_model_len or 0) - max(lengths)
    if arguments.max_tokens is not None and arguments.max_tokens > room:
        which = "--max-model-len" if arguments.max_model_len else "the model's context"
        print(f"--max-tokens {arguments.max_tokens}: {which} leaves room for {room} of them", file=sys.stderr)
    clock.finished("tokenizer")
    jax.devices()
    clock.finished("devices")
    return LLM(directory, config, tokenizer=tokenizer), prompts


def encode(tokenizer: "Tokenizer", prompt: Prompt, arguments: argparse.Namespace) -> list[int]:
    """The tokens of a prompt: its own, those of its text, or of a conversation that the text opens."""
    if prompt.text is None:
        return prompt.token_ids
    if not chats(arguments):
        return tokenizer.encode(prompt.text)
    messages = [{"role": "user", "content": prompt.text}]
    if arguments.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    options = {} if arguments.thinking is None else {"enable_thinking": arguments.thinking}
    return tokenizer.apply_chat_template(messages, **options)


def fit_engine(arguments: argparse.Namespace, lengths: Sequence[int], context: int) -> "EngineConfig":
    """The smallest engine on the grids that holds prompts of so many tokens: few shapes, compiled before they are met.

    Raises ValueError where a prompt is longer than the model's `context` or than the user allows.
    """
    from gdnjax.config import EngineConfig

    requests = len(lengths) * (arguments.n or 1)
    rows = arguments.max_num_seqs
    if rows is None:
        rows = MANY_ROWS if requests >= MANY_ROWS else round_up(requests, ROW_GRID)
    max_model_len = arguments.max_model_len
    if max_model_len is None:
        max_model_len = SMALLEST_LENGTH
        while max_model_len < min(context, max(lengths) + (arguments.max_tokens or MAX_TOKENS)):
            max_model_len *= 2
        max_model_len = min(max_model_len, context)
    if max(lengths) >= max_model_len:
        raise ValueError(
            f"a prompt has {max(lengths)} tokens, and a length of {max_model_len} leaves no room for an output token; "
            f"the model's context is {context} tokens"
        )
    tokens = round_up(sum(lengths), PREFILL_GRID)
    blocks = None
    if requests == 1:
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
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        **devices(arguments),
        kernels=arguments.kernels,
        warmup=False,
        host_cache_gib=arguments.host_cache_gib,
        **speculation(arguments),
    )


def round_up(size: int, grid: Sequence[int]) -> int:
    """The smallest of `grid` that holds `size`, or its largest: what exceeds that takes several steps."""
    return next((step for step in grid if size <= step), grid[-1])


def stream(llm: "LLM", prompt: Prompt, params: "SamplingParams") -> list["RequestOutput"]:
    """Prints a completion as its tokens come."""
    outputs = []
    for piece in llm.stream({"prompt_token_ids": prompt.token_ids}, params):
        print(piece.text, end="", flush=True)
        if piece.output is not None:
            outputs.append(piece.output)
    print(flush=True)
    return outputs


def complete(llm: "LLM", prompts: Sequence[Prompt], params: "SamplingParams") -> list["RequestOutput"]:
    """The completions of several prompts, generated together."""
    token_ids = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    return llm.generate(token_ids, params)


def batch(llm: "LLM", prompts: Sequence[Prompt], params: "SamplingParams") -> list["RequestOutput"]:
    """Prints the completions of several prompts, or several of one, each under a header."""
    outputs = complete(llm, prompts, params)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        for sample in output.outputs:
            number = f"{index}.{sample.index + 1}" if params.n > 1 else f"{index}"
            print(f"==> {number}: {headline(prompt)} <==\n{sample.text}\n", flush=True)
    return outputs


def write_rest(
    llm: "LLM", prompts: Sequence[Prompt], params: "SamplingParams", output: BatchOutput
) -> list["RequestOutput"]:
    """Completes the prompts that `output` lacks. Each is written as soon as those before it are."""
    first = output.num_done
    # Their noise is that of a run that was not cut off: it is made of the prompts' numbers.
    llm.frontend.go_on_from(first)
    rest, outputs = collections.deque(prompts[first:]), []
    submitted: collections.deque[Submission] = collections.deque()
    progress = Progress("generating", len(rest), "prompt")
    try:
        while rest or submitted:
            unfinished = sum(not each.finished for each in submitted)
            for _ in range(min(QUEUED * llm.config.max_num_seqs - unfinished, len(rest))):
                submitted.append(llm.submit({"prompt_token_ids": rest.popleft().token_ids}, params))
                for request in submitted[-1].requests:
                    request.detokenizer.defer()
            llm.step()
            while submitted and submitted[0].finished:
                outputs.append(submitted.popleft().output())
                output.add([as_line(outputs[-1], sample) for sample in outputs[-1].outputs])
                progress.update(1)
    finally:
        progress.close()
    return outputs


def as_given(prompt: Prompt) -> dict[str, Any]:
    """The prompt, as a line of JSON has it."""
    return {"prompt_token_ids": prompt.token_ids} if prompt.text is None else {"prompt": prompt.text}


def as_line(output: "RequestOutput", sample: "CompletionOutput") -> dict[str, Any]:
    """What came of one sample, as a line of JSON has it."""
    return {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": len(sample.token_ids),
    }


def as_json_lines(llm: "LLM", prompts: Sequence[Prompt], params: "SamplingParams") -> list["RequestOutput"]:
    """Prints a JSON object a line for each completion, in order."""
    outputs = complete(llm, prompts, params)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for sample in output.outputs:
            line = {"index": index, "sample": sample.index, **as_given(prompt), **as_line(output, sample)}
            print(json.dumps(line, ensure_ascii=False), flush=True)
    return outputs


def headline(prompt: Prompt, width: int = 60) -> str:
    """The beginning of a prompt, on one line."""
    line = f"{len(prompt.token_ids)} token ids" if prompt.text is None else " ".join(prompt.text.split())
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

"""Serves a model over HTTP, with OpenAI's endpoints."""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gdnjax.cli.command import (
    add_device_flags,
    add_host_cache_flag,
    add_number_flags,
    add_process_flags,
    add_speculation_flags,
    command_parser,
    devices,
    exit_status,
    over_processes,
    prepare_environment,
    speculation,
)
from gdnjax.cli.interrupt import STATUSES, WORDS

if TYPE_CHECKING:
    from gdnjax.config import EngineConfig
    from gdnjax.serving.server.settings import ServerConfig

DESCRIPTION = """\
Serves a model over HTTP, for OpenAI's clients and whoever speaks as they do: POST /v1/chat/completions and
/v1/completions, streamed or not, GET /v1/models, POST /tokenize and /detokenize, and more that /openapi.json lists.

It listens at once. /live answers 200 from then on, /health when the model is loaded and its steps are compiled.
"""

EXAMPLES = """\
examples:
  {command}                                          the embedded model, at http://127.0.0.1:8000
  {command} Qwen3.5-4B --max-num-seqs 128            a checkpoint
  {command} Qwen3.5-4B --host 0.0.0.0 --api-key KEY  for other machines, with a key
  {command} Qwen3.5-4B --served-model-name qwen      under another name
  {command} Qwen3.5-4B --num-speculative-tokens 2 --adaptive-speculation

  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Tell me a story."}], "stream": true}'

SIGTERM and Ctrl-C let answers finish, for --shutdown-timeout seconds; new requests get 503. A second one does not wait.
With --api-key all but probes and metrics (/health, /ping, /live, /version, /load, /metrics), the page and /openapi.json
wants one, as a bearer token or in x-api-key.

{processes}
Exit status: 0 ended by a signal with every answer finished, 2 a bad argument or checkpoint, or nothing can listen there
(the reason is on stderr), 3 another process is gone, 130 interrupted and 143 terminated before it was ready, or with
answers cut off.
"""

MAX_NUM_SEQS = 32
"""Requests that run at once where nobody says: a server has more than a program has prompts."""

MIB = 1 << 20

ENGINE_FLAGS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "num_kv_blocks",
    "max_logit_rows",
    "dtype",
    "quantization",
    "quantize_activations",
    "kv_cache_dtype",
    "ssm_dtype",
    "ssm_rounding",
    "state_layout",
    "seed",
    "kernels",
    "max_logprobs",
    "warmup",
    "enable_prefix_caching",
    "num_checkpoint_slots",
    "state_checkpoint_interval",
    "host_cache_gib",
    "batch_invariant",
)
"""Fields of EngineConfig that have flags of their own name."""


def build_parser(command: str = "gdnjax serve") -> argparse.ArgumentParser:
    """The command line, for who calls it `command`. Imports no jax: --help and mistakes answer at once."""
    from gdnjax.assets import EMBEDDED_MODEL
    from gdnjax.config import KERNELS, EngineConfig
    from gdnjax.config.engine import SSM_DTYPES, SSM_ROUNDINGS, STATE_LAYOUTS

    default = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    switch = argparse.BooleanOptionalAction
    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    add = parser.add_argument_group("model").add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        default=EMBEDDED_MODEL,
        help="checkpoint directory: Hugging Face's, or one of `gdnjax convert` (default: the embedded model)",
    )
    add_number_flags(add)
    add("--quantize-activations", action="store_true", help="round what goes into such projections, too, in prompts")
    add("--ssm-dtype", choices=SSM_DTYPES, default="float32", help="of the recurrent state (default: float32)")
    add("--ssm-rounding", choices=SSM_ROUNDINGS, default="nearest", help="of states in bfloat16 (default: nearest)")
    add("--state-layout", choices=STATE_LAYOUTS, default=default["state_layout"], help="of the recurrent state")
    add_device_flags(add)
    add("--kernels", choices=KERNELS, default="auto", help="which implementation of the ops runs (default: auto)")
    add("--seed", type=int, default=0, metavar="N", help="of requests that bring none (default: 0)")
    add_process_flags(parser.add_argument_group("processes").add_argument)
    add = parser.add_argument_group("capacity").add_argument
    add(
        "--max-num-seqs",
        type=int,
        default=MAX_NUM_SEQS,
        metavar="N",
        help=f"requests that run at once (default: {MAX_NUM_SEQS})",
    )
    add(
        "--max-num-batched-tokens",
        type=int,
        default=default["max_num_batched_tokens"],
        metavar="N",
        help="prompt tokens of a step (default: %(default)s)",
    )
    add("--max-model-len", type=int, metavar="N", help="prompt and output of a request (default: the model's, or 8192)")
    add("--block-size", type=int, default=default["block_size"], metavar="N", help="tokens of a KV block (default: 16)")
    add("--num-kv-blocks", type=int, metavar="N", help="KV blocks (default: what memory allows)")
    add("--max-logit-rows", type=int, metavar="N", help="running requests with logit_bias, bad_words and the like")
    add("--max-logprobs", type=int, default=default["max_logprobs"], metavar="N", help="alternatives (default: 20)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add("--warmup", action=switch, default=True, help="compile every step before it is ready (default: yes)")
    add = parser.add_argument_group("prefix cache").add_argument
    add("--enable-prefix-caching", action=switch, default=True, help="keep what prompts begin with (default: yes)")
    add("--num-checkpoint-slots", type=int, metavar="N", help="states that it keeps (default: by memory)")
    add("--state-checkpoint-interval", type=int, metavar="N", help="tokens between states (default: 1024)")
    add_host_cache_flag(add)
    add("--batch-invariant", action="store_true", help="the same tokens whatever the load, at some cost")
    add_speculation_flags(parser.add_argument_group("speculation").add_argument)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, which is this machine alone)")
    add("--port", type=int, default=8000, help="0 is any that is free; it is said on stderr (default: 8000)")
    add(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what clients call the model; repeatable, answers have the first (default: MODEL as it is given)",
    )
    add("--api-key", action="append", default=[], metavar="KEY", help="wanted of clients; repeatable (default: none)")
    add("--max-queue", type=int, default=1024, metavar="N", help="samples that may wait; then 429 (default: 1024)")
    add("--max-request-mib", type=float, default=32.0, metavar="MIB", help="of a request; then 413 (default: 32)")
    add("--request-timeout", type=float, metavar="S", help="seconds of an answer; then 504 (default: no limit)")
    add("--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds for answers to finish (default: 30)")
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="of pages that may call the server; repeatable, * is all (default: its own; others get 403)",
    )
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="requests may bring a chat_template, which is a program that runs here in a sandbox",
    )
    add("--verbose", action="store_true", help="log requests and what the engine does, and where an error came from")
    return parser


def main(argv: list[str] | None = None, command: str = "gdnjax serve") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    arguments = build_parser(command).parse_args(argv)
    # Answers that finish take longer than a moment; the server has a bound of its own.
    return exit_status(command.rpartition("/")[2], lambda: run(arguments), verbose=arguments.verbose, patience_s=None)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    from gdnjax.assets import model_directory

    directory = model_directory(arguments.model)

    def follow() -> None:
        from gdnjax.serving import following

        following.follow(directory)

    server, engine = server_config(arguments), engine_config(arguments)
    prepare_environment(arguments.memory_fraction, host_cache_gib=arguments.host_cache_gib, verbose=arguments.verbose)
    return over_processes(arguments, lambda: serve(arguments, directory, server, engine), follow)


@contextlib.contextmanager
def _from_the_extra() -> Iterator[None]:
    """Around imports of the server. Raises ImportError that says how what is missing is installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing, which `pip install gdnjax[serve]` brings") from error


def server_config(arguments: argparse.Namespace) -> "ServerConfig":
    """What the flags say of the server. Raises ValueError."""
    with _from_the_extra():
        from gdnjax.serving.server.settings import ServerConfig
    if not 0 < arguments.max_request_mib < math.inf:
        raise ValueError(f"--max-request-mib must be a number above 0, got {arguments.max_request_mib:g}")
    return ServerConfig(
        served_model_names=tuple(arguments.served_model_name) or (arguments.model,),
        api_keys=tuple(arguments.api_key),
        max_queue=arguments.max_queue,
        max_body_bytes=int(arguments.max_request_mib * MIB),
        request_timeout=arguments.request_timeout,
        shutdown_timeout=arguments.shutdown_timeout,
        cors_origins=tuple(arguments.cors_origin),
        trust_request_chat_template=arguments.trust_request_chat_template,
        host=arguments.host,
        port=arguments.port,
    )


def engine_config(arguments: argparse.Namespace) -> "EngineConfig":
    """What the flags say of the engine. Raises ValueError."""
    from gdnjax.config import EngineConfig

    given: dict[str, Any] = {name: getattr(arguments, name) for name in ENGINE_FLAGS}
    return EngineConfig(**given, **devices(arguments), **speculation(arguments))


def serve(
    arguments: argparse.Namespace, directory: pathlib.Path, server: "ServerConfig", engine: "EngineConfig"
) -> int:
    """From the socket to the exit status."""
    import sys

    with _from_the_extra():
        from gdnjax.serving.server.hosting import host

    def make_llm() -> Any:
        from gdnjax.serving.async_llm import AsyncLLM

        return AsyncLLM(directory, engine, tokenizer=arguments.tokenizer)

    cut_off: signal.Signals | None = host(make_llm, server, access_log=arguments.verbose)
    if cut_off is None:
        return 0
    print(WORDS[cut_off].decode(), end="", file=sys.stderr)
    return STATUSES[cut_off]

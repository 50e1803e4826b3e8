"""Structures compiled in another process first: one that takes too long, too much memory, or the stack of its thread
ends that process, and not the one with the engine. No jax.

llguidance has bounds of its own, but not on everything: 10 kB of patternProperties take 10 s, three times as much
minutes, in a thread that nothing can stop; a grammar of some thousand rules, each in the one before, ends the process.
"""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from gdnjax.sampling_params import StructuredOutputsParams
from gdnjax.serving.structured import compile_structure, import_llguidance
from gdnjax.serving.tokenizer import Tokenizer

MAX_BYTES = 4 << 30
"""Of memory that compiling may reserve."""

STACK_BYTES = 2 << 20
"""Of stack that it may take: a quarter of what threads have here, so that it fits there, too."""

MAX_MESSAGE = 4000
"""Characters of what llguidance says of a grammar."""

CHILD = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from gdnjax.serving.rehearsal import answer_all
answer_all()
"""


class Rehearsals:
    """Compiles structures in processes beside this one, as many as threads ask at once. Threads may share it.

    seconds  of the processor that compiling one may take.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, seconds: float):
        self.seconds = seconds
        # Grammars may name tokens. What the others are does not matter to whether one compiles.
        added = [[number, text] for text, number in tokenizer.added_token_ids.items()]
        self._beginning = {
            "vocab_size": max(vocab_size, tokenizer.vocab_size),
            "added": added,
            "seconds": seconds,
            "max_bytes": MAX_BYTES,
        }
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        weakref.finalize(self, _end_all, self._idle)

    def __call__(self, structure: StructuredOutputsParams) -> None:
        """Raises ValueError for a structure that does not compile, or not within the bounds."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or self._begin()
        try:
            error = _ask(child, dataclasses.asdict(structure))
        except (OSError, EOFError):
            raise ValueError(self._why(structure, child.wait())) from None
        except BaseException:
            _end_all([child])
            raise
        with self._lock:
            self._idle.append(child)
        if error is not None:
            raise ValueError(error)

    def _begin(self) -> "subprocess.Popen[str]":
        """A process of its own group: an interrupt of this one is not for it. It ends when its input does."""
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _ask(child, self._beginning)
        except (OSError, EOFError) as error:
            raise RuntimeError(f"a process to compile grammars in ended with status {child.wait()}") from error
        return child

    def _why(self, structure: StructuredOutputsParams, status: int) -> str:
        if status == -signal.SIGPROF:
            return (
                f"structured_outputs.{structure.kind} takes longer than {self.seconds:g} s to compile; allowed is what "
                "takes less: fewer patterns, alternatives or intersections"
            )
        return (
            f"structured_outputs.{structure.kind} is too large, or nested too deep: compiling it takes more than "
            f"{MAX_BYTES >> 30} GiB or a stack of {STACK_BYTES >> 20} MiB"
        )


def _ask(child: "subprocess.Popen[str]", content: Any) -> str | None:
    """What the process answers. Raises OSError or EOFError where it has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(content) + "\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line.endswith("\n"):
        raise EOFError
    return json.loads(line)


def _end_all(children: "list[subprocess.Popen[str]]") -> None:
    for child in children:
        child.kill()
        # What was not written to it is of no use to anybody.
        with contextlib.suppress(OSError):
            child.communicate()


def answer_all() -> None:
    """The other process: a line with what it is to know, then one for each structure. It answers each with a line, null
    or what is wrong. A bound that is exceeded ends it.
    """
    import resource

    given = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (given["max_bytes"], given["max_bytes"]))
    threading.stack_size(STACK_BYTES)
    module = import_llguidance()
    tokenizer = _stand_in(module, given)
    _say(None)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, given["seconds"])
        found: list[str | None] = [None]
        worker = threading.Thread(target=_try, args=(module, tokenizer, json.loads(line), found))
        worker.start()
        worker.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(found[0])


def _try(module: Any, tokenizer: Any, fields: Mapping[str, Any], found: list[str | None]) -> None:
    """Does what is done with a grammar before its first token."""
    try:
        made = compile_structure(module, tokenizer, StructuredOutputsParams(**fields)).deep_copy()
        made.compute_bitmask()
    except ValueError as error:
        found[0] = str(error)[:MAX_MESSAGE]


def _say(content: Any) -> None:
    print(json.dumps(content), flush=True)


def _stand_in(module: Any, given: Mapping[str, Any]) -> Any:
    """A tokenizer with a token for each byte, the added tokens of the real one, and as many as it has."""
    tokens = [b""] * (given["vocab_size"] + 256)
    special = {number: text.encode(errors="surrogateescape") for number, text in given["added"]}
    for number, text in special.items():
        tokens[number] = text
    free = (number for number, token in enumerate(tokens) if not token)
    for byte, number in zip(range(256), free, strict=False):
        tokens[number] = bytes([byte])
    return module.LLTokenizer(module.TokenizerWrapper(_Bytes(tokens, list(special), max(special, default=0))))


@dataclasses.dataclass
class _Bytes:
    """As llguidance wants one."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text]

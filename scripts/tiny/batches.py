"""Documents packed into training batches of a fixed shape, made ahead by worker processes.

A batch is a function of (tokenizer, seed, number of the batch), so a resumed run sees what an uninterrupted one sees.
"""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Generator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import tokenizers

import tiny.data
import tiny.tokenizer

CHUNK = 64

PROMPT_WEIGHT = 0.1
"""Loss weight of a token that a user would have written."""

ATTENTION_DROPPED = 0.15
"""Share of the documents that full attention does not see, so that the recurrent state has to carry them."""

FILLER_SHARE = 0.6
"""Share of the documents in a batch of long ones that are short."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch.

    sequences   packed sequences side by side
    tokens      in a sequence
    documents   most documents in a sequence
    chunks      most chunks in a sequence; a document has one for every 64 tokens it begins
    longest     most tokens in a document
    mixture     how often a document of each kind is drawn
    """

    sequences: int
    tokens: int
    documents: int
    chunks: int
    longest: int
    mixture: dict[str, float] = dataclasses.field(hash=False)


def short_shape(batch_tokens: int) -> BatchShape:
    """Most documents: up to 512 tokens. Few chunks a sequence, since the recurrence walks them one by one."""
    limit, mixture = tiny.data.SHORT_LIMIT, tiny.data.SHORT_MIXTURE
    return BatchShape(batch_tokens // limit, tokens=limit, documents=8, chunks=11, longest=limit, mixture=mixture)


def long_shape(batch_tokens: int) -> BatchShape:
    """The long ones, up to 2048 tokens, with short ones to fill what they leave."""
    long, short = tiny.data.LONG_MIXTURE, tiny.data.SHORT_MIXTURE
    scale = FILLER_SHARE / (1 - FILLER_SHARE) * sum(long.values()) / sum(short.values())
    mixture = long | {kind: scale * weight for kind, weight in short.items()}
    limit = tiny.data.LONG_LIMIT
    return BatchShape(batch_tokens // limit, tokens=limit, documents=10, chunks=40, longest=limit, mixture=mixture)


@dataclasses.dataclass
class _Sequence:
    """One packed sequence that is being filled."""

    shape: BatchShape
    documents: list[tuple[str, list[int], list[bool]]] = dataclasses.field(default_factory=list)
    tokens: int = 0
    chunks: int = 0

    def takes(self, ids: list[int]) -> bool:
        shape = self.shape
        return (
            len(self.documents) < shape.documents
            and self.tokens + len(ids) <= shape.tokens
            and self.chunks + -(-len(ids) // CHUNK) <= shape.chunks
        )

    def add(self, kind: str, ids: list[int], learn: list[bool]) -> None:
        self.documents.append((kind, ids, learn))
        self.tokens += len(ids)
        self.chunks += -(-len(ids) // CHUNK)


OPEN_SEQUENCES = 8
"""Sequences of which the first that has room takes a document."""


def make_batch(tokenizer: tokenizers.Tokenizer, shape: BatchShape, seed: str) -> dict[str, np.ndarray]:
    """One batch; `pack` says what it holds."""
    rng = random.Random(seed)
    kinds, weights = list(shape.mixture), list(shape.mixture.values())
    done: list[_Sequence] = []
    filling: collections.deque[_Sequence] = collections.deque()
    while len(done) < shape.sequences:
        documents = [tiny.data.document(rng, kind) for kind in rng.choices(kinds, weights, k=64)]
        encoded = tiny.tokenizer.encode_all(tokenizer, documents)
        for document, (ids, learn) in zip(documents, encoded, strict=True):
            if len(ids) > shape.longest:
                continue
            sequence = next((s for s in filling if s.takes(ids)), None)
            if sequence is None:
                if len(filling) == OPEN_SEQUENCES:
                    done.append(filling.popleft())
                sequence = _Sequence(shape)
                filling.append(sequence)
            sequence.add(document.kind, ids, learn)
    return pack(done[: shape.sequences], shape, rng)


def pack(sequences: list[_Sequence], shape: BatchShape, rng: random.Random) -> dict[str, np.ndarray]:
    """The arrays of a batch, each [sequences, ...].

    tokens, token_row, token_valid, weight, kind [tokens]     weight is that of the token's successor as a target
    start, length, attends [documents];  block_table [documents, blocks of the longest]
    chunk_row, chunk_start, chunk_length [chunks]             chunk c of a sequence is its KV block 1 + c
    """
    batch = len(sequences)
    per_document = -(-shape.longest // CHUNK)

    def zeros(dtype: Any, *sizes: int) -> np.ndarray:
        return np.zeros((batch, *sizes), dtype)

    arrays = {
        "tokens": zeros(np.int32, shape.tokens),
        "token_row": zeros(np.int32, shape.tokens),
        "token_valid": zeros(bool, shape.tokens),
        "weight": zeros(np.float32, shape.tokens),
        "kind": zeros(np.int32, shape.tokens),
        "start": zeros(np.int32, shape.documents),
        "length": zeros(np.int32, shape.documents),
        "attends": zeros(bool, shape.documents),
        "block_table": zeros(np.int32, shape.documents, per_document),
        "chunk_row": zeros(np.int32, shape.chunks),
        "chunk_start": zeros(np.int32, shape.chunks),
        "chunk_length": zeros(np.int32, shape.chunks),
    }
    for i, sequence in enumerate(sequences):
        row = {name: array[i] for name, array in arrays.items()}
        place, chunk = 0, 0
        for d, (kind, ids, learn) in enumerate(sequence.documents):
            size, chunks = len(ids), -(-len(ids) // CHUNK)
            here = slice(place, place + size)
            row["tokens"][here], row["token_row"][here], row["token_valid"][here] = ids, d, True
            row["weight"][place : place + size - 1] = np.where(learn[1:], 1.0, PROMPT_WEIGHT)
            row["kind"][here] = tiny.data.KINDS.index(kind)
            row["start"][d], row["length"][d] = place, size
            row["attends"][d] = rng.random() >= ATTENTION_DROPPED
            starts = np.arange(chunks) * CHUNK
            row["block_table"][d, :chunks] = 1 + chunk + np.arange(chunks)
            row["chunk_row"][chunk : chunk + chunks] = d
            row["chunk_start"][chunk : chunk + chunks] = place + starts
            row["chunk_length"][chunk : chunk + chunks] = np.minimum(CHUNK, size - starts)
            place, chunk = place + size, chunk + chunks
    return arrays


_worker_tokenizer: tokenizers.Tokenizer | None = None


def _start_worker(tokenizer_json: str) -> None:
    global _worker_tokenizer
    # Ctrl-C reaches every process of the terminal; the parent's handling of it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers of a parent that was killed would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _work(shape: BatchShape, seed: str) -> dict[str, np.ndarray]:
    assert _worker_tokenizer is not None, "the pool starts its workers with one"
    return make_batch(_worker_tokenizer, shape, seed)


def stream(
    tokenizer: tokenizers.Tokenizer, shapes: list[BatchShape], seeds: list[str], workers: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """The batches of `shapes` and `seeds` in order, made by `workers` processes a few batches ahead.

    Closing the generator ends the processes. Raises ChildProcessError where one of them ends early.
    """
    # Spawned: a fork of a process that runs JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer.to_str(),)
    ) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for shape, seed in zip(shapes, seeds, strict=True):
                waiting.append(pool.submit(_work, shape, seed))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a process that makes data was killed; fewer --workers need less memory") from error
        finally:
            pool.shutdown(cancel_futures=True)

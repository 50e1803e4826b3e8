"""Requests, and what was asked for, as plain data that JSON holds, and back. No jax.

Times are noted as their distance from a moment, since the clock that they were read from ends with its process.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdnjax.sampling_params import SamplingParams, StructuredOutputsParams
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.outputs import Logprob
from gdnjax.serving.radix_tree import Node
from gdnjax.serving.request import Request, Status
from gdnjax.serving.structured import Matcher
from gdnjax.serving.submission import Submission
from gdnjax.serving.tokenizer import Tokenizer

TIMES = ("arrival_time", "deadline", "first_scheduled_time", "first_token_time", "finished_time")
LOGPROBS = ("output_logprobs", "prompt_logprobs")
PAIRS = ("unpublished", "marks")
TUPLES = ("stop_token_ids", "wanted", "order")
MADE_ANEW = ("params", "status", "node", "detokenizer", "matcher", "_block_keys")

_PLAIN = tuple(
    field.name
    for field in dataclasses.fields(Request)
    if field.name not in (*TIMES, *LOGPROBS, *PAIRS, *TUPLES, *MADE_ANEW)
)


def of_request(request: Request, nodes: Mapping[Node, int], now: float) -> dict[str, Any]:
    """`nodes` numbers those in which running requests hold their places."""
    record = {name: getattr(request, name) for name in (*_PLAIN, *PAIRS, *TUPLES)}
    for name in TIMES:
        time = getattr(request, name)
        record[name] = None if time is None else time - now
    for name in LOGPROBS:
        record[name] = [
            [(token, *dataclasses.astuple(entry)) for token, entry in entries.items()]
            for entries in getattr(request, name)
        ]
    record |= {"params": _of_params(request.params), "status": request.status.value}
    record["node"] = None if request.node is None else nodes[request.node]
    record["text"] = request.detokenizer.text if request.finished else None
    return record


def matchers_of(
    requests: Sequence[Mapping[str, Any]], make: Callable[[SamplingParams, list[int], list[int]], Matcher | None]
) -> list[Matcher | None]:
    """Where each request of these records stands in its grammar. `make` takes parameters, prompt and what ends it."""
    matchers = []
    for record in requests:
        matcher = make(_params_of(record["params"]), record["prompt_token_ids"], record["stop_token_ids"])
        if matcher is not None:
            matcher.follow(record["output_token_ids"])
        matchers.append(matcher)
    return matchers


def request_of(
    record: Mapping[str, Any],
    nodes: Sequence[Node],
    tokenizer: Tokenizer | None,
    now: float,
    matcher: Matcher | None = None,
) -> Request:
    """The request of a record. Its text is made anew from its tokens, that of one that has ended is what it was."""
    params = _params_of(record["params"])
    fields = {name: record[name] for name in _PLAIN}
    fields |= {name: tuple(record[name]) for name in TUPLES}
    fields |= {name: [tuple(pair) for pair in record[name]] for name in PAIRS}
    fields |= {name: None if record[name] is None else record[name] + now for name in TIMES}
    for name in LOGPROBS:
        fields[name] = [{token: Logprob(*entry) for token, *entry in entries} for entries in record[name]]
    detokenizer = Detokenizer(tokenizer, params)
    if record["text"] is not None:
        detokenizer = detokenizer.closed(record["text"])
    else:
        detokenizer.append(record["output_token_ids"])
    return Request(
        params=params,
        status=Status(record["status"]),
        node=None if record["node"] is None else nodes[record["node"]],
        detokenizer=detokenizer,
        matcher=matcher,
        **fields,
    )


def of_submission(submission: Submission, unfinished: Mapping[Request, int], now: float) -> dict[str, Any]:
    """`unfinished` numbers the requests that have records of their own; those that have ended get theirs here."""
    return {
        "request_id": submission.request_id,
        "prompt": submission.prompt,
        "token_ids": submission.token_ids,
        "forced_acceptance": submission.forced_acceptance,
        "requests": [
            unfinished[request] if request in unfinished else of_request(request, {}, now)
            for request in submission.requests
        ],
    }


def submission_of(
    record: Mapping[str, Any], unfinished: Sequence[Request], tokenizer: Tokenizer | None, now: float
) -> Submission:
    requests = [
        unfinished[entry] if isinstance(entry, int) else request_of(entry, (), tokenizer, now)
        for entry in record["requests"]
    ]
    return Submission(**{**record, "requests": requests})


def _of_params(params: SamplingParams) -> dict[str, Any]:
    record = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    # Keys of JSON are strings.
    record["logit_bias"] = None if params.logit_bias is None else list(params.logit_bias.items())
    structured = params.structured_outputs
    record["structured_outputs"] = None if structured is None else dataclasses.asdict(structured)
    return record


def _params_of(record: Mapping[str, Any]) -> SamplingParams:
    bias, structured = record["logit_bias"], record["structured_outputs"]
    made = {
        "logit_bias": None if bias is None else dict(bias),
        "structured_outputs": None if structured is None else StructuredOutputsParams(**structured),
    }
    return SamplingParams(**{**record, **made})

"""Random schedules on the paper device, with a host tier, and with kills where they are asked for."""

import collections
import json
import random

from gdnjax.serving.plan import num_blocks_for
from gdnjax.serving.request import Request
from tests.serving.paper import (
    LETTERS,
    AnyText,
    Loop,
    check_nothing_is_held,
    check_output,
    distinct,
    make_request,
    make_scheduler,
)


def schedule(seed: int, *, kills: bool = False) -> collections.Counter:
    """Arrivals that share beginnings, chats, aborts, preemptions, resets, turns that fail, over random pools; and
    processes that end and go on from what they have saved. Returns what happened.
    """
    draw, draw_structured = random.Random(seed), random.Random(-seed - 1)
    options = {
        "seqs": draw.choice((1, 2, 3)),
        "tokens": draw.choice((64, 128)),
        "blocks": draw.choice((20, 30, 60)),
        "checkpoints": draw.choice((0, 2, 4)),
        "needs_state": draw.random() < 0.75,
        "host": draw.choice((5, 20, 60, 1000)),
        "state_checkpoint_interval": 32,
        "num_speculative_tokens": draw.choice((0, 0, 2, 3)),
    }
    loop, asked, happened = Loop(make_scheduler(**options)), [], collections.Counter()
    for _ in range(60):
        scheduler = loop.scheduler
        if draw.random() < 0.5:
            request = make_request(
                _prompt(draw, asked),
                max_tokens=draw.choice((1, 3, 10, 40)),
                ignore_eos=draw.random() < 0.7,
                structured=draw_structured.random() < 0.3,
            )
            if num_blocks_for(request.max_length, 16) <= scheduler.allocator.blocks.size:
                asked.append(request)
                scheduler.add(request)
        if asked and draw.random() < 0.05:
            scheduler.finish(draw.choice(asked), "abort")
        if draw.random() < 0.03:
            scheduler.cache.reset()
        if draw.random() < 0.03:
            loop.fail()
        if scheduler.running and draw.random() < 0.05:
            loop.harvest_all()
            if scheduler.running:
                scheduler.preempt(draw.choice(scheduler.running))
        if kills and draw.random() < 0.1:
            happened += _counted(loop)
            asked = _killed(loop, options, asked)
            happened["killed while somebody ran"] += bool(loop.scheduler.running)
        for _ in range(draw.choice((1, 1, 4))):
            loop.turn()
            loop.check()
    loop.drain()
    for request in asked:
        check_output(request)
    happened += _counted(loop)
    check_nothing_is_held(loop.scheduler)
    return happened + loop.device.seen


def _prompt(draw: random.Random, asked: list[Request]) -> list[int]:
    ended = [request for request in asked if request.finished]
    if ended and draw.random() < 0.4:
        last = draw.choice(ended)
        return [*last.tokens(0, last.num_tokens), *distinct(draw.randrange(26), draw.choice((1, 5, 20)))]
    shared = distinct(draw.randrange(4), 200)[: draw.choice((0, 15, 16, 17, 33, 64, 100, 130))]
    return [*shared, *distinct(draw.randrange(26), draw.choice((1, 3, 20)))]


def _counted(loop: Loop) -> collections.Counter:
    return collections.Counter(vars(loop.scheduler.cache.host.counters))


def _killed(loop: Loop, options: dict, asked: list[Request]) -> list[Request]:
    """The loop goes on with another scheduler, made from a record, and the pools as they are; the host tier is empty.
    Returns what was asked for, with those that go on in the places of those that they were.
    """
    loop.harvest_all()
    moves = loop.scheduler.take_moves()
    if moves is not None:
        loop.device.move(moves)
    loop.device.host.clear()
    before = list(loop.scheduler.unfinished)
    record = json.loads(json.dumps(loop.scheduler.record(loop.now)))
    loop.scheduler = make_scheduler(**options)
    matchers = [AnyText() if request.matcher is not None else None for request in before]
    for matcher, request in zip(matchers, before, strict=True):
        if matcher is not None:
            matcher.follow(request.output_token_ids)
    after = loop.scheduler.restore(record, LETTERS, loop.now, matchers)
    loop.check()
    went_on = dict(zip(before, after, strict=True))
    return [went_on.get(request, request) for request in asked]

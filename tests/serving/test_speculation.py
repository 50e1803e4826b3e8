"""Whether drafting is chosen where it pays, on timings made up for the purpose."""

import collections
import random

import pytest

from gdnjax.serving.speculation import INTERVAL, PROBE, DraftController

K = 3


class Load:
    """A device and its requests, as the controller sees them: every step takes its time, and is reported `late` turns
    after it was chosen. `seconds` and `tokens`, a row, are by whether the step has drafts; the first step after one
    without has none to verify.
    """

    def __init__(self, *, rows=8, plain=1.0, drafting=1.5, tokens=2.0, late=1, noise=0.0, controller=None):
        self.controller = DraftController(K) if controller is None else controller
        self.rows, self.late, self.noise = rows, late, noise
        self.seconds, self.tokens = {False: plain, True: drafting}, tokens
        self.random = random.Random(0)
        self.pending = collections.deque()
        self.has_drafts = False
        self.elapsed = self.produced = 0.0

    def turns(self, count):
        """Whether each of so many steps was given drafts."""
        return [self.turn() for _ in range(count)]

    def turn(self):
        num_drafts = self.controller.choose(self.rows)
        assert num_drafts in (0, K)
        drafts = num_drafts > 0
        tokens = self.rows * self.tokens if drafts and self.has_drafts else self.rows
        self.has_drafts = drafts
        seconds = self.seconds[drafts] * self.random.uniform(1 - self.noise, 1 + self.noise)
        self.elapsed += seconds
        self.produced += tokens
        self.pending.append((num_drafts, seconds, round(tokens)))
        if len(self.pending) > self.late:
            num_drafts, seconds, tokens = self.pending.popleft()
            self.controller.observe(self.rows, num_drafts, seconds, self.rows, tokens)
        return drafts

    def restart_clock(self):
        self.elapsed = self.produced = 0.0

    @property
    def rate(self):
        return self.produced / self.elapsed

    @property
    def best_rate(self):
        """Of who knows."""
        return self.rows * max(1 / self.seconds[False], self.tokens / self.seconds[True])


def share(choices):
    return sum(choices) / len(choices)


BETTER = {"drafting": 1.5, "tokens": 2.0}
WORSE = {"drafting": 1.5, "tokens": 1.2}


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("cost", "pays"), [(BETTER, True), (WORSE, False)])
def test_it_settles_on_the_better_choice(cost, pays, noise, late):
    load = Load(**cost, noise=noise, late=late)
    first = load.turns(INTERVAL)
    assert first[0], "what was asked for is tried first"
    choices = load.turns(20 * INTERVAL)
    assert share([choice == pays for choice in choices]) >= 1 - PROBE / INTERVAL


@pytest.mark.parametrize("cost", [BETTER, WORSE, {"drafting": 1.0, "tokens": 3.5}, {"drafting": 4.0, "tokens": 1.0}])
def test_measuring_costs_at_most_its_share_of_the_turns(cost):
    load = Load(**cost)
    choices = load.turns(INTERVAL)
    # It decides at once: two probes' worth of turns, and what is under way when it has seen enough.
    assert share([choice == choices[-1 - PROBE] for choice in choices[2 * PROBE + 2 : -PROBE]]) == 1
    load.restart_clock()
    choices = load.turns(50 * INTERVAL)
    preferred = share(choices) > 0.5
    assert sum(choice != preferred for choice in choices) == 50 * PROBE
    # A step of the other choice may be a long one, and the first that drafts again has no drafts yet.
    longest = max(load.seconds.values()) / load.seconds[preferred]
    assert load.rate > load.best_rate * (1 - (PROBE * longest + 1) / INTERVAL)


def test_measuring_costs_6_percent_of_the_tokens_at_most_where_steps_take_alike():
    for cost in ({"drafting": 1.05, "tokens": 2.5}, {"drafting": 1.05, "tokens": 1.0}):
        load = Load(**cost)
        load.turns(INTERVAL)
        load.restart_clock()
        load.turns(100 * INTERVAL)
        assert load.rate > 0.94 * load.best_rate


@pytest.mark.parametrize(("before", "after", "pays"), [(WORSE, BETTER, True), (BETTER, WORSE, False)])
def test_it_follows_a_load_that_changes(before, after, pays):
    load = Load(**before, noise=0.05)
    load.turns(5 * INTERVAL)
    load.seconds[True], load.tokens = after["drafting"], after["tokens"]
    load.turns(4 * INTERVAL)
    assert share([choice == pays for choice in load.turns(10 * INTERVAL)]) >= 1 - PROBE / INTERVAL


def test_worse_acceptance_is_noticed_within_a_few_steps():
    load = Load(drafting=1.5, tokens=2.5)
    load.turns(INTERVAL // 2)
    load.tokens = 1.0
    choices = load.turns(12)
    assert not any(choices[-3:])


def test_choice_that_is_hardly_better_changes_nothing():
    """Within 5% of the present one, whichever that is: a load on the edge does not go to and fro."""
    for tokens in (1.5 * 0.97, 1.5 * 1.03):
        drafting, plain = Load(drafting=1.5, tokens=2.0, rows=1000), Load(drafting=1.5, tokens=1.1, rows=1000)
        for load, present in ((drafting, True), (plain, False)):
            load.turns(INTERVAL)
            load.tokens = tokens
            load.turns(4 * INTERVAL)
            choices = load.turns(10 * INTERVAL)
            assert share([choice == present for choice in choices]) == 1 - PROBE / INTERVAL


def test_buckets_are_independent():
    """Drafting pays for few rows and not for many; neither disturbs the other, even where loads take turns."""
    controller = DraftController(K)
    few = Load(rows=1, drafting=1.1, tokens=3.0, controller=controller)
    many = Load(rows=64, drafting=3.0, tokens=2.0, controller=controller)
    for _ in range(10):
        few.turns(INTERVAL // 2)
        many.turns(INTERVAL // 2)
    mixed = [(few.turns(16), many.turns(16)) for _ in range(40)]
    assert share([choice for pair in mixed for choice in pair[0]]) >= 1 - PROBE / INTERVAL
    assert share([choice for pair in mixed for choice in pair[1]]) <= PROBE / INTERVAL


def test_rows_belong_to_the_bucket_that_they_are_padded_to():
    controller = DraftController(K, (1, 8, 64))
    for rows in (2, 5, 8):
        load = Load(rows=rows, drafting=3.0, tokens=1.5, controller=controller, late=0)
        load.turns(16)
    # 3 rows were never seen, but the others of their bucket were; 64 were not.
    assert [controller.choose(3) for _ in range(8)] == [0] * 8
    assert [controller.choose(64) for _ in range(8)] == [K] * 8


@pytest.mark.parametrize(("cost", "pays"), [(BETTER, True), (WORSE, False)])
def test_pause_of_the_host_changes_nothing(cost, pays):
    load = Load(**cost)
    load.turns(2 * INTERVAL)
    for _ in range(20):
        usual = dict(load.seconds)
        load.seconds = {choice: 50 * seconds for choice, seconds in usual.items()}
        load.turn()
        load.seconds = {choice: seconds / 50 for choice, seconds in usual.items()}
        load.turn()
        load.seconds = usual
        assert share([choice == pays for choice in load.turns(37)]) >= 1 - (PROBE + 2) / 37


@pytest.mark.parametrize(("cost", "pays"), [(BETTER, True), (WORSE, False)])
def test_compilation_decides_nothing(cost, pays):
    """Without a warm-up the first step of either choice takes a thousand times as long as the next."""
    load = Load(**cost)
    usual = dict(load.seconds)
    for choice in (True, False):
        load.seconds = usual | {choice: 1000 * usual[choice]}
        while load.turn() != choice:
            pass
        load.seconds = usual
    load.turns(INTERVAL)
    assert share([choice == pays for choice in load.turns(10 * INTERVAL)]) >= 1 - PROBE / INTERVAL


def test_without_reports_it_drafts_and_asks_now_and_then():
    """Where every turn has a prefill nothing is reported, and nothing is known."""
    controller = DraftController(K)
    choices = [controller.choose(8) > 0 for _ in range(20 * INTERVAL)]
    assert share(choices) == 1 - PROBE / INTERVAL


def test_steps_that_nobody_had_a_part_in_are_no_measurement():
    controller = DraftController(K)
    for _ in range(10):
        controller.observe(8, K, 1.0, 0, 0)
        controller.observe(8, K, 0.0, 8, 8)
    assert all(controller.choose(8) for _ in range(INTERVAL - PROBE))


def test_first_step_after_a_change_counts_for_neither_choice():
    """It has no drafts to verify yet: taken at its word it would say that drafting brings nothing."""
    controller = DraftController(K)
    for num_drafts in (K, 0) * 50:
        controller.observe(8, num_drafts, 1.0, 8, 8)
    assert controller.choose(8) == K
    assert not controller._bucket_of(8).averages[False].steps

"""The queue keeps the order of places in both lanes, whatever is taken out of its middle."""

import itertools

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from gdnjax.serving.waiting import WaitingQueue
from tests.serving.paper import make_request

ROW = {"logit_bias": {0: 1.0}}


@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=100, stateful_step_count=40)
class QueueMachine(stateful.RuleBasedStateMachine):
    """Beside a list that is sorted anew for every question."""

    def __init__(self):
        super().__init__()
        self.queue, self.model, self.gone = WaitingQueue(), [], []
        self.numbers = itertools.count()

    @stateful.rule(place=st.integers(0, 9), row=st.booleans())
    def add(self, place, row):
        request = make_request(3, **(ROW if row else {}))
        request.order = (place, next(self.numbers))
        self.queue.add(request)
        self.model.append(request)

    @stateful.precondition(lambda self: self.model)
    @stateful.rule(which=st.integers(0, 99))
    def discard(self, which):
        request = self.model.pop(which % len(self.model))
        self.queue.discard(request)
        self.gone.append(request)

    @stateful.precondition(lambda self: self.gone)
    @stateful.rule(which=st.integers(0, 99), back=st.booleans())
    def discard_or_add_again(self, which, back):
        """Who is not there can be taken out, and who was there can come back."""
        request = self.gone[which % len(self.gone)]
        if back:
            self.gone.remove(request)
            self.queue.add(request)
            self.queue.add(request)
            self.model.append(request)
        else:
            self.queue.discard(request)

    @stateful.invariant()
    def is_in_order(self):
        ordered = sorted(self.model, key=lambda request: request.order)
        without_row = [request for request in ordered if not request.params.needs_logit_row]
        assert self.queue.first is (ordered[0] if ordered else None)
        assert self.queue.first_without_row is (without_row[0] if without_row else None)
        assert (list(self.queue), len(self.queue)) == (ordered, len(ordered))
        assert all(request in self.queue for request in ordered)
        assert not any(request in self.queue for request in self.gone)
        self.queue.check_integrity()
        # What is gone is not kept in memory for long.
        assert len(self.queue._with_row) + len(self.queue._without_row) <= 2 * len(ordered)


test_queue_is_a_sorted_list = QueueMachine.TestCase

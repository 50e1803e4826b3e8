"""The judge of near ties, with several ranks; what it is for is in test_eval.py."""

from types import SimpleNamespace

import pytest
from evaluation import agreement

from gdnjax.sharding import make_mesh
from tests.float64 import reference
from tests.micro import MICRO, micro_model, micro_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.thorough
def test_logits_of_near_ties_are_those_of_all_ranks():
    """Of a vocabulary that two ranks pad."""
    loaded = SimpleNamespace(model=micro_model(2), params=micro_params(2), mesh=make_mesh(2))
    gap = agreement.Teacher(loaded, [[5, 6, 7]], [[8, 9]])(0, 1, 100, 3)
    logits = reference(MICRO, micro_params(), [5, 6, 7, 8]).logits[-1]
    assert gap == pytest.approx(logits.max() - min(logits[100], logits[3]), abs=1e-4)

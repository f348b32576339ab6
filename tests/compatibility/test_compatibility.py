"""What people do to pipelines works with `attach`, before and after, or is refused by one sentence."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, ORDERS, SKIPS, STEPS, attached, judge
from table import PAGE, page

from variegate import ContextualRepulsion

WHOLE = [case for case in CASES if "compile(pipe.transformer" in case.what or "pipe.transformer.compile(" in case.what]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what.replace("`", ""))
def test_it_works_or_is_refused(case, order):
    judge(case, order)


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.what.replace("`", ""))
def test_edits_are_in_the_graph(case):
    """One graph a state: without edits, for two pipelines before and one after the attachment, and with them."""
    assert [bool(edits) for edits in attached(case, "attach second", case.intervention)[2]] == [False, True]


@pytest.mark.parametrize("case", [case for case in CASES if case.note == SKIPS], ids=lambda case: case.what)
def test_edits_of_skipped_blocks_have_no_effect(case):
    """The cache skips all blocks but the first in the last step, so a window of that step leaves it as it is."""
    alone = case.run(case.apply(case.build()))
    for order in ORDERS:
        during = attached(case, order, ContextualRepulsion(strength=2.0, start=STEPS - 1, stop=None, blocks="all"))[0]
        assert torch.equal(during, alone)


def test_the_page_says_what_the_cases_found():
    assert PAGE.read_text() == page(), "run tests/compatibility/table.py"

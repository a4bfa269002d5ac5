"""A few seeded faults in the Ascend kernels; tests/ascend/mutants.py runs all of them, by hand."""

import os

import pytest
from ascend import model, mutants

BY_NAME = {mutant.name: mutant for mutant in mutants.MUTANTS}


def test_every_mutant_still_changes_the_line_it_means():
    assert len(BY_NAME) == len(mutants.MUTANTS) >= 25
    for mutant in mutants.MUTANTS:
        unchanged = (mutants.ROOT / "ascend_ops" / mutant.file).read_text()
        assert mutants.mutated(mutant) != unchanged, mutant.name


@pytest.mark.skipif(model.unavailable_reason() is not None, reason="no C++ compiler")
@pytest.mark.skipif("SKIPVIT_ASCEND_SOURCES" in os.environ, reason="a mutant is being tested")
@pytest.mark.parametrize(
    "name",
    ["bits read before they are compared", "tie rule turned round", "shares overlap by one"],
)
def test_the_suite_catches(name):
    assert "::" in mutants.caught_by(BY_NAME[name])

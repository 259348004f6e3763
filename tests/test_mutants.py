"""The mutants of benchmarks/mutants are changes to the code as it stands; the command runs them."""

from collections import Counter

import pytest

from benchmarks.mutants.__main__ import PARTS, ROOT, mutants_of


@pytest.mark.parametrize("part", PARTS)
def test_every_mutant_fits_the_code_once(part):
    mutants = mutants_of(part)
    stands = Counter({mutant.name: (ROOT / mutant.path).read_text().count(mutant.old) for mutant in mutants})
    assert len(stands) == len(mutants), "two of one name"
    assert {name: count for name, count in stands.items() if count != 1} == {}
    assert all(mutant.old != mutant.new for mutant in mutants)

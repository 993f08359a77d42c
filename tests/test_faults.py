"""The planted faults (faults.py) can still be made, each in one place, and name test files that exist."""

from collections import Counter
from pathlib import Path

import pytest
from faults import DRAWN, FAULTS, PICKED
from faults_base import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_made(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1, (
        "look for where the code went, and name it here"
    )
    assert fault.old != fault.new
    assert fault.tests and all((Path(__file__).parent / name).is_file() for name in fault.tests)


def test_names_are_unique():
    assert not [name for name, times in Counter(f.name for f in FAULTS).items() if times > 1]


def test_half_of_the_faults_were_drawn():
    assert len(FAULTS) >= 40 and len(DRAWN) >= len(PICKED)

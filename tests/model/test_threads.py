"""A busy machine slows klein in proportion: waiting OpenMP threads sleep instead of spinning."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imports", "given", "expected"),
    [
        ("klein.inference", {}, "PASSIVE"),
        ("benchmarks", {}, "PASSIVE"),
        ("klein.inference", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ("torch, klein.inference", {}, "None"),
    ],
)
def test_the_policy_is_set_before_torch_is_loaded(
    imports: str, given: dict[str, str], expected: str
) -> None:
    """Unless somebody chose one; where torch is there already it would say what is not so."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    code = f"import {imports}, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected

"""The checks of `make check` pass. They stand here so that they run beside the other tests, on the same cores."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("target", ["lint", "contracts", "types"])
def test_the_source_passes(target):
    done = subprocess.run(["make", "--silent", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

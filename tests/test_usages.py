"""What the commands print about wrong usages: one cause, in words, and exit code 2 (`python -m tests.usages`)."""

import pytest

from tests.usages import USAGES, prepare, printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    prepare(made := tmp_path_factory.mktemp("usages"))
    return made


@pytest.mark.parametrize("what", USAGES)
def test_a_wrong_usage_is_told_in_words_and_ends_with_2(what, folder):
    line, words = USAGES[what]
    code, told = printed(line, folder)
    assert code == 2, told
    last = told.strip().splitlines()[-1]
    assert last.startswith((line.split()[0], "Not verified. ")) and words in last
    assert "Traceback" not in told and "[Errno" not in told

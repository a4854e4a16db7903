"""The files of a secure sum: what was kept reads back whole; what is damaged or of another roster is not taken up."""

import numpy as np
import pytest

from fedlora_server import sum_files
from tests.fedlora.secure_sums import RUN, Sum, roster


def kept(folder, count=6):
    """Keep a roster and all that is collected of a sum until it can be opened, and return the sum."""
    made = Sum(roster(count), round=2, attempt=1)
    sum_files.keep_roster(folder, made.roster)
    for step in (made.packages, made.requests, made.collect):
        step({"site-001"} if step == made.collect else set())
    made.close()
    made.reveal()
    sum_files.keep_total(folder, made.collector)
    sum_files.keep(folder, made.collector)
    return made


def test_what_was_kept_opens_the_same_sum(tmp_path):
    made = kept(tmp_path)
    left = sum_files.take_up(tmp_path, RUN)
    assert (left.roster, left.round, left.attempt) == (made.roster, 2, 1)
    held, before = left.held, made.collector.held
    assert (held.packages, held.sent, held.cohort, held.survivors, held.signatures, held.reveals) == (
        before.packages, before.sent, before.cohort, before.survivors, before.signatures, before.reveals)
    made.collector.held = held
    assert np.array_equal(made.collector.opened(), made.expected()) and "site-001" not in held.uploaded


def test_nothing_is_taken_up_where_nothing_was_kept_and_the_roster_stays(tmp_path):
    assert sum_files.take_up(tmp_path, RUN) is None
    made = kept(tmp_path)
    sum_files.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [sum_files.ROSTER]
    assert sum_files.take_up(tmp_path, RUN) == sum_files.Left(made.roster)
    sum_files.clear(tmp_path)  # there is nothing left to remove


def test_a_sum_of_an_earlier_roster_is_left(tmp_path):
    kept(tmp_path)
    sum_files.keep_roster(tmp_path, roster(5))
    assert sum_files.take_up(tmp_path, RUN) == sum_files.Left(roster(5))


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / sum_files.TOTAL).write_bytes(b"short"),
    lambda folder: (folder / sum_files.TOTAL).unlink(),
    lambda folder: (folder / sum_files.SUM).write_text("{}"),
    lambda folder: (folder / sum_files.SUM).write_bytes((folder / sum_files.SUM).read_bytes()[:-100]),
    lambda folder: (folder / sum_files.ROSTER).write_text('{"roster": "AAAA"}')],
    ids=["short total", "no total", "empty sum", "torn sum", "no roster"])
def test_a_damaged_file_is_named_with_what_to_do(damage, tmp_path):
    kept(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"--resume: .* is damaged") as error:
        sum_files.take_up(tmp_path, RUN)
    assert f"restore {sum_files.ROSTER}, {sum_files.SUM} and {sum_files.TOTAL} from a copy" in str(error.value)

"""A client tells the server names of classes as its labels, never texts."""

import pytest

from fedlora.plan import LONGEST_LABEL
from fedlora.tasks import read
from fedlora_client.labels import names_to_announce


def rows(tmp_path, labels):
    path = tmp_path / "notes.tsv"
    path.write_text("text\tlabel\n" + "".join(f"note {i}\t{label}\n" for i, label in enumerate(labels)))
    return read(path, "classification")


def test_names_of_classes_are_announced_sorted_and_normalised(tmp_path):
    assert names_to_announce(rows(tmp_path, ["1.0", "0", "1", "0"])) == ("0", "1")
    assert names_to_announce(rows(tmp_path, ["b", "c", "a"] * 5)) == ("a", "b", "c")


@pytest.mark.parametrize(("labels", "message"), [
    (["yes", "x" * (LONGEST_LABEL + 1)] * 5, f"notes.tsv:3: .*has {LONGEST_LABEL + 1} characters"),
    (["yes", "no\u0007"] * 5, "notes.tsv:3: .*no name of a class"),
    ([f"patient {i}" for i in range(40)], "40 different values in 40 rows")])
def test_texts_in_the_label_column_are_not_announced_and_not_shown(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        names_to_announce(rows(tmp_path, labels))
    assert "--column label=NAME" in str(error.value) and not any(label in str(error.value) for label in labels[1:])

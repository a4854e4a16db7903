"""Announced label names: no single client can decide the run's labels, nor end the run."""

from hypothesis import given
from hypothesis import strategies as st

from fedlora.plan import MOST_ANNOUNCED
from fedlora_server.label_sets import DISPROPORTION, FEW, agree

HONEST = ("no", "yes")
MANY = tuple(f"label {number}" for number in range(999))


def test_of_clients_that_announce_alike_the_first_ones_decide():
    agreed = agree({"a": ("no",), "b": ("yes", "no"), "c": ("perhaps",)}, 2)
    assert (agreed.labels, agreed.of, agreed.left_out) == (HONEST, ("a", "b"), {})


@given(st.integers(0, 2), st.integers(2, 3))
def test_one_client_that_announces_999_labels_is_left_out_wherever_it_comes(place, honest):
    announced = [(f"client {number}", HONEST) for number in range(honest)]
    announced.insert(place, ("mallory", MANY))
    agreed = agree(dict(announced), 2)
    assert agreed.labels == HONEST and "mallory" not in agreed.of
    assert place >= 2 or list(agreed.left_out) == ["mallory"]


def test_while_too_few_are_left_that_is_what_is_answered():
    agreed = agree({"mallory": MANY, "north": HONEST}, 2)
    assert agreed.of == ("north",) and "999" in agreed.left_out["mallory"]


def test_a_client_that_announces_nothing_is_no_measure_for_others():
    wide = tuple(map(str, range(DISPROPORTION * FEW)))
    agreed = agree({"mallory": (), "north": wide}, 1)
    assert agreed.labels == wide and agreed.of == ("north",)


def test_a_set_never_grows_beyond_what_a_client_can_announce():
    sets = {f"client {n}": tuple(f"{n}.{i}" for i in range(600)) for n in range(3)}
    agreed = agree(sets, 2)
    assert agreed.of == ("client 0",) and len(agreed.labels) == 600 <= MOST_ANNOUNCED
    assert list(agreed.left_out) == ["client 1", "client 2"]


def test_institutions_whose_label_counts_differ_tenfold_train_together():
    few, many = HONEST, tuple(f"code {number}" for number in range(DISPROPORTION * len(HONEST)))
    agreed = agree({"few": few, "many": many}, 2)
    assert set(agreed.labels) == {*few, *many} and not agreed.left_out

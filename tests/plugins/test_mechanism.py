"""A third privacy mechanism is one new file for plan and ledger. No option of a command names it."""

from tests.plugins.scratch import TOYS, Tree


def test_a_mechanism_of_one_file_keeps_what_every_mechanism_promises_and_changes_nothing_for_the_others(tmp_path):
    tree = Tree.with_file(tmp_path / "tree", TOYS / "unamplified.py", "fedlora/privacy/mechanisms/unamplified.py")
    said = tree.passes("tests/contracts/test_mechanisms.py", "-vv")
    for key in ("dp-sgd", "distributed-gaussian", "unamplified"):
        assert f"which_charges_what_the_mechanism_says[{key}] PASSED" in said
    said = tree.passes("tests/fedlora/test_ledger_rosters.py", "-vv", "-k", "is_stored_as_before")
    assert "PASSED" in said

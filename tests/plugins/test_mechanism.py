"""A third privacy mechanism is one new file for plan, ledger and report. No option of a command names it."""

from tests.plugins.scratch import TOYS, Tree


def test_a_mechanism_of_one_file_keeps_what_every_mechanism_promises_and_changes_nothing_for_the_others(tmp_path):
    tree = Tree.with_file(tmp_path / "tree", TOYS / "unamplified.py", "fedlora/privacy/mechanisms/unamplified.py")
    said = tree.passes("tests/contracts/test_mechanisms.py", "-vv")
    for key in ("dp-sgd", "distributed-gaussian", "unamplified"):
        assert f"which_charges_what_the_mechanism_says[{key}] PASSED" in said
        assert f"the_report_of_a_run_states_what_its_ledger_charges_and_verifies[{key}] PASSED" in said
    said = tree.passes("tests/fedlora/test_ledger_rosters.py", "-vv", "-k", "is_stored_as_before")
    assert "PASSED" in said

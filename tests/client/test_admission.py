"""A run's cost is shown, and the owner asked, before anything is charged; the ledger then charges what was shown."""

import dataclasses
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedlora.plan import Refusal
from fedlora.privacy import Budget, Ledger, Policy, RunTerms, four_digits
from fedlora_client.admission import Cost, panel
from fedlora_client.state import FolderState
from fedlora_client.terms import Limits, private_terms
from tests.contracts.test_mechanisms import plan_of
from tests.driven_server import Server
from tests.fedlora.test_plan import make_plan
from tests.terminal import Terminal

DELTA, RATE, STEPS, ROUNDS = 1e-5, 0.05, 4, 10


def terms(epsilon, run="ab" * 8):
    budget = Budget(epsilon, DELTA, 1000)
    return RunTerms(run, "a" * 64, "row", 1000, RATE, budget.noise_multiplier(50, STEPS * ROUNDS), DELTA, 1.0, {},
                    STEPS, ROUNDS)


@pytest.fixture
def ledger():
    ledger = Ledger(None, simulated=True)
    ledger.declare("north", epsilon=8.0, delta=DELTA)
    yield ledger
    ledger.close()


def begin(ledger, terms, rounds=1):
    ledger.begin_run("north", terms)
    for number in range(rounds):
        ledger.reserve("north", terms.run_id, number + 1, 0).begin()
    ledger.end_run("north", terms.run_id)


def shown(cost):
    console = Console(width=100, file=StringIO())
    console.print(panel(cost, "north", "1,000 records", make_plan()))
    return console.file.getvalue()


def test_what_is_left_after_a_run_at_the_whole_epsilon_is_nothing_even_if_it_breaks_off(ledger):
    cost = Cost.of(ledger.book(), "north", terms(8.0))
    assert cost.closes and cost.left == 8.0 and cost.afterwards == 0.0 and not cost.second_fits
    assert "reserved       ε 8.000 of the 8.000" in shown(cost) and "even if the run breaks off" in shown(cost)
    begin(ledger, terms(8.0))
    assert ledger.lifetime("north").remaining == 0.0


def test_what_is_left_after_a_small_run_is_what_the_ledger_says_of_one_that_begins_all_its_rounds(ledger):
    cost = Cost.of(ledger.book(), "north", terms(2.0))
    assert not cost.closes and cost.second_fits and "like it fits as well" in shown(cost)
    begin(ledger, terms(2.0), rounds=ROUNDS)
    assert ledger.lifetime("north").remaining == pytest.approx(cost.afterwards)
    assert f"ε {four_digits(cost.afterwards, down=True)} left, and more if" in shown(cost)


def test_two_runs_fit_at_the_epsilon_that_is_named_and_not_at_a_little_more(ledger):
    named = float(four_digits(Cost.of(ledger.book(), "north", terms(8.0)).for_two, down=True))
    assert 3.0 < named < 8.0
    for epsilon, fits in ((named, True), (named + 0.05, False)):
        book = ledger.book()
        first, second = terms(epsilon), terms(epsilon, "cd" * 8)
        assert Cost.of(book, "north", first).second_fits == fits  # leaves the first one in this book
        assert (book.admit("north", second) is not None) == fits
    for run in (first, second) if fits else (terms(named), terms(named, "cd" * 8)):
        begin(ledger, run, rounds=ROUNDS)
    assert ledger.lifetime("north").closed_by is None


def test_where_nothing_is_left_for_a_second_run_it_is_said(ledger):
    ledger.declare("north", epsilon=0.02, delta=DELTA)
    quiet = dataclasses.replace(terms(8.0), noise_multiplier=terms(0.02).noise_multiplier)
    cost = Cost.of(ledger.book(), "north", quiet)
    assert cost is None or cost.for_two is None
    begin(ledger, terms(0.019))
    assert Cost.of(ledger.book(), "north", terms(1.0, "cd" * 8)) is None


@pytest.fixture
def server(tmp_path, checkpoint):
    server = Server(tmp_path, checkpoint("bert"))
    yield server
    server.engine.close("the test is over")
    server.deployment.__exit__()


class AtTerminal(Terminal):
    """The installed fedlora-client, joining a server."""

    def __init__(self, server, *arguments):
        home = server.deployment.home("north")
        super().__init__(
            "client", "--data", server.data, "--name", "north", "--server", server.deployment.address, "--model",
            server.deployment.checkpoint, "--state", home / "uploads", "--threads", 1, "--device", "cpu", "--precision",
            "fp32", *arguments, home=home)


def test_at_a_terminal_the_owner_is_asked_for_the_size_and_once_a_run_whether_to_take_part(server):
    policy = server.deployment.home("north") / "config" / "fedlora" / "policy.toml"
    unwilling = AtTerminal(server)
    unwilling.expect("Declared size [120]: ", "\n")
    unwilling.expect("Take part? [y/N]: ", "\n")
    assert unwilling.end() == 4 and not policy.exists() and server.charges() == ()
    willing = AtTerminal(server)
    willing.expect("Declared size [120]: ", "about a hundred\n")
    willing.expect("whole number")
    willing.expect("Declared size [120]: ", "130\n")
    willing.expect("130 records. It is public")
    willing.expect("even if the run breaks off")
    assert not policy.exists()
    willing.expect("Take part? [y/N]: ", "y\n")
    server.deployment.processes["north"] = willing.process
    server.deployment.log = lambda name: willing.text
    assert server.ask(1).steps == 2
    assert Policy.read(policy).dataset_at(str(server.data)).declared_size == 130
    willing.expect("updates released: 1; ε ")
    willing.kill()
    again = AtTerminal(server)
    again.expect("waiting to be asked")
    assert "Take part?" not in again.text and "Declared size" not in again.text
    again.kill()


@pytest.mark.parametrize("given", [(), ("--yes",), ("--declared-size", 120)])
def test_without_a_terminal_a_real_ledger_needs_a_yes_and_a_size_before_a_server_is_called(server, given):
    server.client(*given, defaults=False)
    assert server.deployment.end("north", 60) == 2
    assert "--yes" in server.log() and "--declared-size" in server.log() and server.engine.streams == []


def test_a_size_or_labels_that_contradict_the_policy_are_an_error(server, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[dataset.north]\ndata = "{server.data}"\nepsilon = 8.0\ndelta = 1e-5\ndeclared-size = 100\n'
                      'labels = ["urgent", "routine"]\n')
    for flags, message in (((), "--declared-size is not what [dataset.north]"),
                           (("--declared-size", 100, "--labels", "routine"), "--labels is not what [dataset.north]")):
        server.client("--policy", policy, *flags)
        assert server.deployment.end("north", 60) == 2
        assert message in server.log() and server.engine.streams == []
    server.client("--policy", policy, "--yes", defaults=False)
    assert server.ask(1).steps == 2
    assert "100 records. It is public" in server.log()


def test_a_witness_that_cannot_be_written_ends_a_client_before_anything_is_spent(server):
    (server.data.parent / ".fedlora-witness-north.json.new").mkdir()
    server.client()
    assert server.deployment.end("north", 60) == 2
    assert "set `witness` in policy.toml" in server.log() and server.charges() == ()
    assert not any(member.ready_at for member in server.engine.members())


def test_a_disk_without_room_for_an_upload_is_known_before_the_charge(tmp_path, monkeypatch):
    state = FolderState(tmp_path / "state")
    state.check_room(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5))
    with pytest.raises(OSError, match=r"--state .* has room for 5 bytes, and an upload of 1,000 is"):
        state.check_room(1000)


def test_a_run_beyond_what_is_left_is_declined_when_joining_and_its_client_is_not_waited_with(server):
    server.client()
    assert server.ask(1).steps == 2
    server.deployment.processes["north"].kill()
    server.deployment.processes["north"].wait()
    server.come_back_with(run_id="cd" * 8)
    server.client()
    assert server.deployment.end("north", 60) == 4
    assert "closed by run abababababababab" in server.log() and "waiting to be asked" not in server.log()
    assert server.engine.idle() == [] and list(server.engine.get_node_ids()) == []
    assert len(server.charges()) == 1 and Refusal("budget").code in server.log()


def of_sums(epsilon=3.0, trust="local"):
    plan = plan_of("distributed-gaussian")
    return private_terms(Limits(epsilon, trust=trust, least_members=6), Budget(epsilon, DELTA, 5000), plan)


def test_both_guarantees_of_secure_sums_are_forecast_with_what_each_assumes(ledger):
    own = of_sums()
    cost = Cost.of(ledger.book(), "north", own, pinned=True)
    text = " ".join(shown(cost).replace("│", "").split())
    assert f"by own noise ε {four_digits(own.epsilon(60))} against everyone who sees what leaves" in text
    assert f"in the sums ε {four_digits(own.sums_epsilon(60))} against whoever sees the sums alone" in text
    assert "relies on 4 honest ones of 6 members or more" in text
    assert 'charged by own noise (trust = "local" in policy.toml)' in text
    assert own.sums_epsilon(60) < own.epsilon(60) == cost.guarantee


def test_without_pinned_members_nothing_is_forecast_for_the_sums(ledger):
    text = " ".join(shown(Cost.of(ledger.book(), "north", of_sums())).replace("│", "").split())
    assert "in the sums not stated: policy.toml does not name the members' keys" in text
    assert "by own noise" not in shown(Cost.of(ledger.book(), "north", terms(2.0)))


def test_where_sums_are_charged_they_are_what_is_reserved(ledger):
    own = of_sums(trust="aggregate")
    cost = Cost.of(ledger.book(), "north", own, pinned=True)
    assert cost.guarantee == own.sums_epsilon(60) <= 3.0 < cost.sums.local
    assert 'charged in the sums (trust = "aggregate"' in " ".join(shown(cost).replace("│", "").split())
    assert cost.sums.charged == "aggregate" and cost.sums.aggregate == cost.guarantee

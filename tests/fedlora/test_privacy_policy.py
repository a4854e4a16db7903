"""Tests of policy.toml: what it allows, what it refuses, and that unclear settings are errors."""

import math

import pytest

from fedlora.plan import AGGREGATE, Proposal
from fedlora.privacy import About
from fedlora.privacy.policy import Forbidden, Policy

from .ledgers import ended, forked
from .test_plan import make_plan


def proposed(**changes):
    """Return a server's proposal of a run of 8 rounds of Fed-SB, with changes to its plan."""
    plan = make_plan(**{"strategy": "fed-sb", "family": "bra", "rounds": 8, "max_participations": 8} | changes)
    return {"proposal": Proposal(plan), "server": "127.0.0.1:9092"}


def policy(folder, text):
    path = folder / "policy.toml"
    path.write_text(text)
    return Policy.read(path)


def test_a_missing_policy_allows_what_the_defaults_allow(tmp_path):
    empty = Policy.read(tmp_path / "none.toml")
    empty.check_proposal(**proposed(labels=(), private_start=True))
    empty.check_terms(0.1)
    empty.check_terms(None)
    assert (empty.max_rounds, empty.max_sampling_rate) == (math.inf, 0.2) and not empty.datasets


@pytest.mark.parametrize(("line", "changes"), [
    ('strategies = ["fedsvd"]', {}), ('families = ["lora", "frozen-a"]', {}), ('models = ["' + "b" * 64 + '"]', {}),
    ('servers = ["10.0.0.1:9092"]', {}),
    ("max-rounds = 7", {}), ("announce-labels = false", {"labels": ()}),
    ("private-start = false", {"private_start": True})])
def test_a_proposal_outside_a_limit_is_forbidden_and_the_message_names_the_limit(tmp_path, line, changes):
    with pytest.raises(Forbidden) as error:
        policy(tmp_path, line).check_proposal(**proposed(**changes))
    assert line.split(" = ")[0] in str(error.value) and "policy.toml" in str(error.value)


def test_a_proposal_at_the_limits_is_allowed(tmp_path):
    policy(tmp_path, f'strategies = ["fed-sb"]\nfamilies = ["bra"]\nmodels = ["{"a" * 64}"]\n'
                     'servers = ["127.0.0.1:9092"]\n'
                     "max-rounds = 8\nannounce-labels = false\nprivate-start = false\n").check_proposal(**proposed())


def test_the_names_of_strategies_and_families_are_free_so_that_a_policy_outlives_a_version(tmp_path):
    later = policy(tmp_path, 'strategies = ["of-next-year", "fed-sb"]\nfamilies = ["of-next-year", "bra"]\n')
    later.check_proposal(**proposed())
    later.check_proposal(**proposed(strategy="of-next-year", family="of-next-year"))
    with pytest.raises(Forbidden, match="families"):
        later.check_proposal(**proposed(family="lora"))


@pytest.mark.parametrize("noise_multiplier", [0.49, None])
def test_too_little_noise_is_forbidden(tmp_path, noise_multiplier):
    demanding = policy(tmp_path, "min-noise-multiplier = 0.5")
    demanding.check_terms(0.5)
    with pytest.raises(Forbidden, match="min-noise-multiplier"):
        demanding.check_terms(noise_multiplier)


def test_a_data_set_is_found_by_its_place_whatever_the_spelling(tmp_path):
    (tmp_path / "north").mkdir()
    declared = policy(tmp_path, f'[dataset.n]\ndata = "{tmp_path}/north/"\nepsilon = 8\ndelta = 1e-5\n'
                                'unit = "column:patient_id"\ndistinct = ["s"]\n')
    found = declared.dataset_at(str(tmp_path / "north" / ".." / "north"))
    assert found.id == "n" and found.epsilon == 8.0 and found.unit == "column:patient_id" and found.distinct == ("s",)
    assert declared.dataset_at(str(tmp_path)) is None


def test_the_first_use_is_written_down_and_read_back(tmp_path):
    data = tmp_path / 'my "records" ä'
    data.mkdir()
    path = tmp_path / "conf" / "policy.toml"
    adopted = Policy.read(path).adopt(str(data), epsilon=3.5, delta=1e-6, unit="row")
    again = Policy.read(path)
    assert again.dataset_at(str(data)) == adopted
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / data.name).mkdir()
    second = again.adopt(str(tmp_path / "other" / data.name), epsilon=1.0, delta=1e-6, unit="column:id")
    assert second.id == adopted.id + "-2"
    assert Policy.read(path).datasets == {adopted.id: adopted, second.id: second}


def test_first_uses_at_once_leave_a_whole_policy_with_an_entry_each(tmp_path):
    path, places = tmp_path / "policy.toml", [tmp_path / str(i) / "notes" for i in range(8)]
    path.write_text("max-rounds = 3  # ours\n")
    path.chmod(0o640)
    for place in places:
        place.mkdir(parents=True)
    read_early = Policy.read(path)

    def first_use(place):
        for _ in range(3):  # and the same data again
            read_early.adopt(str(place), epsilon=2.0, delta=1e-6, unit="row", taken={"notes"})

    processes = [forked(lambda place=place: first_use(place)) for place in places]
    assert [ended(process) for process in processes] == [0] * 8
    policy = Policy.read(path)
    assert sorted(policy.datasets) == sorted(f"notes-{i}" for i in range(2, 10)) and policy.max_rounds == 3
    assert all(policy.dataset_at(str(place)).epsilon == 2.0 for place in places)
    assert path.read_text().startswith("max-rounds = 3  # ours\n") and path.stat().st_mode & 0o777 == 0o640


def test_the_first_of_two_declarations_counts(tmp_path):
    early, late = (Policy.read(tmp_path / "policy.toml") for _ in range(2))
    first = early.adopt(str(tmp_path), epsilon=2.0, delta=1e-6, unit="row")
    assert late.adopt(str(tmp_path), epsilon=50.0, delta=1e-6, unit="row") == first


@pytest.mark.parametrize(("text", "message"), [
    ("max-rouns = 3", "max-rouns is not known"), ("max-rounds = true", "it must be int"),
    ("max-rounds = 2.5", "it must be int"), ('strategies = "fed-sb"', "it must be list"),
    ("strategies = [1]", "strings"),
    ("[dataset.a]\nepsilon = 1\ndelta = 1e-5", "lacks data"), ("dataset = 3", "must be tables"),
    ('[dataset.a]\ndata = "x"\nepsilon = 0\ndelta = 1e-5', "epsilon is 0.0"),
    ('[dataset.a]\ndata = "x"\nepsilon = 1\ndelta = 1.0', "delta is 1.0"),
    ('[dataset.a]\ndata = "x"\nepsilon = 1\ndelta = 1e-5\nunit = "patient"', "row or column:NAME"),
    ('[dataset."a b"]\ndata = "x"\nepsilon = 1\ndelta = 1e-5', "no id of a data set"),
    ('[dataset.a]\ndata = "x"\nepsilon = 1\ndelta = 1e-5\n[dataset.b]\ndata = "x"\nepsilon = 1\ndelta = 1e-5',
     "one place has one budget"), ("max-rounds", "not TOML")])
def test_what_is_not_understood_is_an_error_that_names_the_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"policy\.toml") as error:
        policy(tmp_path, text)
    assert message in str(error.value)


@pytest.mark.parametrize("line", ["min-noise-multiplier = nan", "min-noise-multiplier = -1.0",
                                  "min-noise-multiplier = inf", "max-sampling-rate = nan", "max-rounds = -1"])
def test_a_limit_that_would_limit_nothing_is_refused(tmp_path, line):
    path = tmp_path / "policy.toml"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=line.split()[0]):
        Policy.read(path)


def test_fingerprints_may_stand_in_groups_as_they_are_printed(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(f'server-fingerprints = ["{"AB12 " * 16}"]\n')
    assert Policy.read(path).server_fingerprints == ("ab12" * 16,)
    path.write_text('server-fingerprints = ["ab12"]\n')
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        Policy.read(path)


def test_a_pinned_server_is_the_only_one_and_all_other_lines_stay(tmp_path):
    path, key = tmp_path / "config" / "policy.toml", "ab12" * 16
    Policy.read(path).pin_server(key)
    assert Policy.read(path).server_fingerprints == (key,) and path.stat().st_mode & 0o777 == 0o600
    before = '# mine\nmax-rounds = 7\n[dataset.a]  # theirs\ndata = "x"\nepsilon = 1.0\ndelta = 1e-5\n'
    path.write_text(before)
    path.chmod(0o640)
    Policy.read(path).pin_server(key)
    now = Policy.read(path)
    assert now.server_fingerprints == (key,) and now.max_rounds == 7 and set(now.datasets) == {"a"}
    assert path.read_text().endswith(before) and path.stat().st_mode & 0o777 == 0o640
    once = path.read_text()
    now.pin_server(key)
    assert path.read_text() == once


def test_a_list_of_keys_and_a_file_that_cannot_be_read_are_left_to_their_owner(tmp_path):
    path = tmp_path / "policy.toml"
    for text, says in ((f'server-fingerprints = ["{"cd" * 32}"]\n', 'names other keys; add "ab12'),
                       ("x =", "not TOML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            Policy(path).pin_server("ab12" * 16)
        assert path.read_text() == text


def test_a_policy_that_cannot_be_written_is_told_with_the_line_to_add(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written: .* server-fingerprints = \[\"ab12"):
        Policy(tmp_path / "folder" / "policy.toml").pin_server("ab12" * 16)


ABOUT = ('controller = "Hospital North"\nprocessor = "North IT"\npurpose = "triage of notes"\n'
         'legal-basis = "Art. 9(2)(j)"\nretention = "two years"\nrecipient = "the coordinator"\n')


def test_the_owners_statements_about_a_data_set_are_read_and_written(tmp_path):
    declared = f'[dataset.n]\ndata = "{tmp_path}"\nepsilon = 8\ndelta = 1e-5\n{ABOUT}'
    [known] = policy(tmp_path, declared).datasets.values()
    assert known.about == About("Hospital North", "North IT", "triage of notes", "Art. 9(2)(j)", "two years",
                                "the coordinator")
    [again] = policy(tmp_path, known.toml()).datasets.values()
    assert again == known
    [silent] = policy(tmp_path, declared.removesuffix(ABOUT)).datasets.values()
    assert silent.about == About() and "purpose" not in silent.toml()


@pytest.mark.parametrize(("line", "says"), [
    ('purpose = ""', "one line of text"), ('purpose = "  "', "one line of text"),
    ('purpose = "one\\ntwo"', "one line of text"), (f'legal-basis = "{"x" * 301}"', "legal-basis has 301 characters"),
    ("retention = 10", "retention is 10; it must be str"), ('roles = "x"', "roles is not known")])
def test_a_statement_that_does_not_fit_on_a_line_is_refused(tmp_path, line, says):
    with pytest.raises(ValueError, match=r"\[dataset\.n\]") as error:
        policy(tmp_path, f'[dataset.n]\ndata = "{tmp_path}"\nepsilon = 8\ndelta = 1e-5\n{line}\n')
    assert says in str(error.value)


KEY, OTHER, THIRD = "ab" * 32, "cd" * 32, "ef" * 32


def test_trust_in_the_sums_is_refused_without_members_and_their_least_number(tmp_path):
    with pytest.raises(ValueError, match=r'policy\.toml: trust is "aggregate", and members and least-members must'):
        policy(tmp_path, f'trust = "aggregate"\nmembers = ["{KEY}", "{OTHER}"]\n')
    with pytest.raises(ValueError, match="members and least-members must then be set"):
        policy(tmp_path, 'trust = "aggregate"\nleast-members = 3\n')
    trusting = policy(tmp_path, f'trust = "aggregate"\nleast-members = 3\nmembers = ["{KEY}", "{OTHER}", "{THIRD}"]\n')
    assert trusting.trust == "aggregate" and trusting.fewest_members == 3


def test_the_members_keys_may_stand_in_groups_and_this_sites_own_need_not_be_named(tmp_path):
    grouped = "AB" * 16 + " " + "ab" * 16
    named = policy(tmp_path, f'members = ["{grouped}", "{OTHER}"]\n')
    assert named.members == (KEY, OTHER) and named.trust == "local" and named.fewest_members == 3
    assert named.pins(THIRD) == {KEY, OTHER, THIRD} and named.pins(KEY) == {KEY, OTHER}
    assert policy(tmp_path, "").pins(THIRD) is None


def test_how_many_may_collude_is_the_owners_to_demand(tmp_path):
    sums = {"mechanism": AGGREGATE, "least_members": 6, "local_steps": 1, "optimizer": "sgd"}
    demanding = policy(tmp_path, "least-colluding = 1\n")
    with pytest.raises(Forbidden, match=r"least-colluding = 1, and the promise of this run's sums withstands 0; ask"):
        demanding.check_proposal(**proposed(**sums))
    demanding.check_proposal(**proposed(**sums, colluding=1))
    demanding.check_proposal(**proposed())


@pytest.mark.parametrize(("lines", "why"), [
    ('trust = "everyone"', "trust is 'everyone'; it must be local or aggregate"),
    ("least-members = 2", "least-members is 2; it must be 3 to 200"),
    ("least-members = 201", "it must be 3 to 200"),
    ("least-colluding = -1", "least-colluding is -1; it must be at"), ('members = ["abc"]', "64 hexadecimal digits"),
    (f'least-members = 6\nmembers = ["{KEY}", "{OTHER}"]', "members names 2 keys, with which no roster of 6 members")])
def test_what_is_said_of_members_must_be_possible(tmp_path, lines, why):
    with pytest.raises(ValueError, match=why):
        policy(tmp_path, lines)

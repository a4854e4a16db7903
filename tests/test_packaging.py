"""What is shipped, and that its parts depend on each other only downwards."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"fedlora", "fedlora_client", "fedlora_server", "fedlora_simulations", "fedlora_strategies",
            "fedlora_adapter"}


def test_a_wheel_holds_exactly_the_six_packages_and_the_wire_code(tmp_path):
    source = tmp_path / "source"  # a build leaves files behind, which a later one would ship
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    tmp_path, source], check=True, capture_output=True)
    [wheel] = tmp_path.glob("fedlora-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert {"fedlora/wire/fedlora_pb2.py", "fedlora/wire/fedlora.proto"} <= set(names)
    assert {name for name in names if not name.endswith((".py", ".pyi"))
            and ".dist-info/" not in name} == {"fedlora/wire/fedlora.proto", *(f"{name}/py.typed" for name in PACKAGES)}


@pytest.mark.parametrize("argv", [["--help"], ["--roundz", "3"]], ids=["help", "an unknown flag"])
@pytest.mark.parametrize("command", ["client", "client budget", "client verify", "server", "server presets",
                                     "simulations", "adapter", "adapter inspect", "adapter combine"])
def test_help_and_errors_on_the_command_line_come_without_loading_what_trains(command, argv):
    package, *sub = command.split()
    code = (f"import sys; from fedlora_{package}.cli import main\n"
            "try: main(sys.argv[1:])\nexcept SystemExit as ended: code = ended.code\n"
            "heavy = {'torch', 'numpy', 'flwr', 'transformers', 'grpc', 'rich', 'opacus', 'cryptography'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\nsys.exit(code)")
    ended = subprocess.run([sys.executable, "-c", code, *sub, *argv], capture_output=True, text=True)
    assert ended.returncode == (0 if argv == ["--help"] else 2), ended.stderr
    assert f"fedlora-{command.replace('simulations', 'simulate')}" in ended.stdout + ended.stderr

"""What is shipped, and that its parts depend on each other only downwards."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"fedlora", "fedlora_client", "fedlora_server", "fedlora_simulations", "fedlora_strategies"}


def test_a_wheel_holds_exactly_the_five_packages_and_the_wire_code(tmp_path):
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
            and ".dist-info/" not in name} == {"fedlora/wire/fedlora.proto"}


def test_help_needs_neither_torch_nor_flower():
    for command in ("client", "server", "simulations"):
        code = (f"import sys; sys.argv = ['x', '--help']; from fedlora_{command}.cli import main\n"
                "try: main()\nexcept SystemExit: pass\n"
                "assert not {'torch', 'transformers', 'flwr', 'grpc'} & set(sys.modules)")
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

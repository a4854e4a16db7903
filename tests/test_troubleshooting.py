"""Every message that docs/troubleshooting.md quotes is one of the sources', so that a search for it finds both."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedlora", "client/fedlora_client", "server/fedlora_server", "strategies/fedlora_strategies",
            "simulations/fedlora_simulations")
VALUE = "…"
"""Stands for a value, in the page and in what is made of the sources' strings."""


def quoted() -> list[str]:
    """Return the messages that the page quotes: the first cell of each row of its tables, in backticks."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def strings(path: Path) -> list[str]:
    """Return every string of a module but its docstrings, with `VALUE` in place of what is computed."""
    found = []
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(re.sub(r"%(\.\d+)?[sdrgf]", VALUE, node.value))
    return found


def holds(string: str, message: str) -> bool:
    """Return whether the string holds the pieces of a message between its values, in their order."""
    at = 0
    for piece in filter(None, map(str.strip, message.split(VALUE))):
        found = string.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def test_every_message_that_the_page_quotes_is_in_the_sources():
    sources = [string for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
               for string in strings(path)]
    messages = quoted()
    assert len(messages) >= 60
    missing = [message for message in messages if not any(holds(string, message) for string in sources)]
    assert not missing, "no string of the sources holds: " + "; ".join(missing)


def test_a_message_that_was_reworded_is_noticed():
    assert holds("no server at … for … s (…). Start fedlora-server there", "no server at … for … s")
    assert not holds("nobody answers at … for … s", "no server at … for … s")
    assert not holds("for … s there is no server at …", "no server at … for … s"), "the pieces have an order"
    assert holds(f"Round {VALUE} was stopped", "Round … was stopped")


def test_no_message_is_quoted_twice():
    messages = quoted()
    assert len(messages) == len(set(messages))

"""Every example of docs/extending.md is a toy, word for word, and so is run by the tests beside this file."""

import re

from tests.plugins import test_family_and_start, test_strategy_toys, test_tasks_and_trackers
from tests.plugins.scratch import ROOT, TOYS

EXAMPLE = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def test_every_toy_is_an_example_and_every_example_a_toy():
    examples = dict(EXAMPLE.findall((ROOT / "docs" / "extending.md").read_text("utf-8")))
    places = {**test_family_and_start.PLACES, **test_tasks_and_trackers.PLACES, **{
        toy: f"{test_strategy_toys.OURS}/{seam}" for toy, seam in test_strategy_toys.PLACES.items()}}
    toys = {f"{place}/{toy}.py": (TOYS / f"{toy}.py").read_text("utf-8") for toy, place in places.items()}
    assert examples.keys() == toys.keys()
    for path, toy in toys.items():
        assert examples[path] == toy, f"the page shows another {path} than tests/plugins/toys holds; copy it anew"

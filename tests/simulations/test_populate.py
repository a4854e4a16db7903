"""Populations: how the rows of --data are dealt to simulated clients."""

import json

import numpy as np
import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora_simulations.population import populate


def dealt(path, labels, *arguments):
    path.write_text("".join(json.dumps({"text": f"note {i}", "label": label, "patient": f"p{i // 2}"}) + "\n"
                            for i, label in enumerate(labels)))
    options = read_config(SimulationConfig, [f"--data={path}", "--clients=2", *arguments])
    return populate(options, 0)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:5", "shards:1"])
@pytest.mark.parametrize("unit", ["row", "column:patient"])
def test_rows_without_a_label_are_dealt_to_nobody_and_change_nothing(tmp_path, scheme, unit):
    labels = [None, "a", "b", "a", None, None, *"ab" * 20, *[None] * 40]
    arguments = f"--partition={scheme}", f"--privacy-unit={unit}"
    population = dealt(tmp_path / "rows.jsonl", labels, *arguments)
    labelled = [i for i, label in enumerate(labels) if label is not None]
    assert np.array_equal(np.sort(np.concatenate(list(population.parts.values()))), labelled)
    patients = [{population.rows.units[i] for i in part} for part in population.parts.values() if population.rows.units]
    assert not patients or patients[0].isdisjoint(patients[1])
    if unit == "row":
        without = dealt(tmp_path / "labelled.jsonl", [labels[i] for i in labelled], *arguments)
        for name, part in population.parts.items():
            assert [labelled.index(i) for i in part] == without.parts[name].tolist()


def test_data_without_any_label_is_an_error_and_a_language_model_needs_none(tmp_path):
    with pytest.raises(ValueError, match="no row with a label; fill the label column"):
        dealt(tmp_path / "rows.jsonl", [None, None], "--labels=a,b")
    parts = dealt(tmp_path / "rows.jsonl", [None] * 4, "--task=causal-lm").parts
    assert sorted(np.concatenate(list(parts.values())).tolist()) == [0, 1, 2, 3]

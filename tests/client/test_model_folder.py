"""A client's --model is a folder of its own, or names the plan's model."""

import pytest

from fedlora_client.installed import model_folder

PLANNED = f"org/name@{'a' * 40}"


def test_the_plans_model_may_be_named_without_its_commit_as_in_a_file_that_both_sides_share():
    for model in (None, "org/name", PLANNED):
        assert model_folder(model, PLANNED) is None
    assert model_folder("minilm", "minilm") is None


def test_a_folder_is_taken_and_another_name_refused(tmp_path):
    assert model_folder(str(tmp_path), PLANNED) == tmp_path
    for model in ("org/other", f"org/name@{'b' * 40}"):
        with pytest.raises(ValueError, match="neither a folder nor the plan's org/name@"):
            model_folder(model, PLANNED)
    for model in ("org/other", "local"):
        with pytest.raises(ValueError, match=f"--model {model} is no folder, .* give that of your copy"):
            model_folder(model, "local")

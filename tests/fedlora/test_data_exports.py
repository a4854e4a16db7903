"""Exports of spreadsheets, databases and statistics programs are read as meant, or refused with what to do."""

from __future__ import annotations

import logging

import pytest

from fedlora.config import ClientConfig, read_config
from fedlora.data import Rows
from fedlora.plan import unit_column
from fedlora.tasks import read
from tests.exports_data import EXPORTS, NOTES


def read_export(what: str, folder) -> Rows:
    export = EXPORTS[what]
    made = export.make(folder)
    options = read_config(ClientConfig, ["--data=x", *export.options])
    return read(made or folder, options.task, columns=options.column, unit=unit_column(options.privacy_unit or "row"),
                options=options.read_options())


@pytest.mark.parametrize("what", EXPORTS)
def test_an_export_is_read_as_meant_or_refused_with_its_remedy(what, tmp_path, caplog):
    export = EXPORTS[what]
    with caplog.at_level(logging.WARNING):
        if export.texts is None:
            with pytest.raises(ValueError) as refused:
                read_export(what, tmp_path)
            said = str(refused.value)
        else:
            rows = read_export(what, tmp_path)
            said = "\n".join(caplog.messages)
            assert rows.texts == export.texts
            if len(rows) == len(NOTES) and "--label-map" not in str(export.options):
                assert rows.labels == tuple(label for _, label in NOTES)
    said = said.replace(str(tmp_path), "DATA")
    assert all(words in said for words in export.says), said
    assert export.says or not said, said
    assert not any(text[:12] in said for text, _ in NOTES), "no text of a row is in a message"

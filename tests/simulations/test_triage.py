"""The demo's notes: they depend on the seed alone, shares of labels differ, and single words do not give them away."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from fedlora.data import label_names
from fedlora.tasks import read
from fedlora_simulations import notes, triage


@pytest.fixture(scope="module", params=[0, 1])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    hospitals = triage.write_hospitals(folder / "hospitals", request.param, rows=3000)
    held_out = triage.write_held_out(folder / "held-out.jsonl", request.param)
    return [read(file, "classification") for file in hospitals], read(held_out, "classification")


def test_the_seed_alone_decides_every_byte(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        triage.write_hospitals(tmp_path / name, seed, rows=200)
        triage.write_held_out(tmp_path / name / "held-out.jsonl", seed, rows=200)
    for file in ("hospital-1.jsonl", "hospital-2.jsonl", "hospital-3.jsonl", "held-out.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and a != c
    assert len({(tmp_path / "a" / f"hospital-{i}.jsonl").read_bytes() for i in (1, 2, 3)}) == 3


def test_hospitals_differ_in_their_labels_and_the_held_out_set_is_balanced(written):
    hospitals, held_out = written
    shares = [rows.labels.count("urgent") / len(rows) for rows in hospitals]
    assert shares == pytest.approx([0.3, 0.5, 0.7]) and all(len(rows) == 3000 for rows in hospitals)
    assert held_out.labels.count("urgent") * 2 == len(held_out) == 1000
    assert label_names(held_out) == triage.LABELS


def test_no_held_out_note_is_in_any_hospital_of_any_seed(written):
    _, held_out = written
    for seed in range(3):
        for share in (0.3, 0.7):
            rng = np.random.default_rng(seed)
            assert not set(held_out.texts) & {text for text, _ in triage.notes(rng, 3000, share)}


def test_notes_are_short_distinct_and_varied(written):
    hospitals, held_out = written
    for rows in (*hospitals, held_out):
        assert len(set(rows.texts)) == len(rows)
        lengths = [len(text.split()) for text in rows.texts]
        assert min(lengths) >= 2 and max(lengths) <= 30 and 6 <= np.mean(lengths) <= 20


def test_no_single_word_gives_the_label_away(written):
    hospitals, _ = written
    texts = [text for rows in hospitals for text in rows.texts]
    labels = [label for rows in hospitals for label in rows.labels]
    with_word: Counter[str] = Counter()
    urgent_with_word: Counter[str] = Counter()
    for text, label in zip(texts, labels, strict=True):
        words = set(text.lower().replace(".", " ").replace(",", " ").replace(";", " ").replace(":", " ").split())
        with_word.update(words)
        urgent_with_word.update(words if label == "urgent" else ())
    for word, count in with_word.items():
        if count >= len(texts) * 0.01:
            assert 0.05 < urgent_with_word[word] / count < 0.95, word


def test_a_bag_of_words_does_not_find_the_label(written):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    hospitals, held_out = written
    words = text.CountVectorizer()
    seen = words.fit_transform([text for rows in hospitals for text in rows.texts])
    model = linear.LogisticRegression(max_iter=1000).fit(seen, [label for rows in hospitals for label in rows.labels])
    assert model.score(words.transform(held_out.texts), held_out.labels) < 0.92


def test_more_notes_than_there_are_end_in_an_error(monkeypatch):
    monkeypatch.setattr(triage, "note", lambda rng, urgent: "The same note.")
    with pytest.raises(ValueError, match="no further note differs from the 1 that are written"):
        triage.notes(np.random.default_rng(0), 2, 0.5, held_out=kept_back("The same note."))


def kept_back(text):
    """Return whether a note is one of those reserved for the held-out set."""
    return hashlib.sha256(text.encode()).digest()[0] % triage.HELD_OUT_SHARE == 0


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--rows", "0"]])
def test_notes_says_in_a_line_what_it_cannot_do(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as ended:
        notes.main([str(tmp_path / "notes"), *words])
    assert ended.value.code == 2 and not (tmp_path / "notes").exists()


def test_no_note_is_in_two_hospitals(tmp_path):
    assert notes.main([str(tmp_path / "notes"), "--rows", "500"]) == 0
    texts = [line for file in (tmp_path / "notes" / "data").iterdir() for line in file.read_text().splitlines()]
    assert len(set(texts)) == len(texts) == 1500

import collections
import re

import pytest

from data_prep import splits
from decomp_jax.errors import UserError

IDS = [f"patient {i}" for i in range(200)]


def test_by_hash_is_seeded_and_ignores_the_order():
    first = splits.split_by_hash(IDS, splits.PHANTOM_SHARES, seed=3)
    assert first == splits.split_by_hash(IDS[::-1], splits.PHANTOM_SHARES, seed=3)
    assert first != splits.split_by_hash(IDS, splits.PHANTOM_SHARES, seed=4)
    assert collections.Counter(first.values()) == {"train": 140, "validation": 12, "query": 16, "reference": 32}


@pytest.mark.parametrize("n", range(4, 20))
def test_no_split_is_left_empty(n):
    assert set(splits.split_by_hash(IDS[:n], splits.PATIENT_SHARES, seed=0).values()) == set(splits.PATIENT_SHARES)


def test_of_a_set_that_grows_patients_keep_their_splits():
    shares = splits.PATIENT_SHARES
    first, more = (splits.split_by_hash(IDS[:n], shares, seed=3, growing=True) for n in (60, 200))
    assert first == {name: more[name] for name in first}
    counts = collections.Counter(splits.split_by_hash(range(20000), shares, seed=0, growing=True).values())
    for name, share in shares.items():
        assert counts[name] / 20000 == pytest.approx(share, abs=5 * (share * (1 - share) / 20000) ** 0.5), name
    assert splits.split_by_hash(IDS[:1], shares, seed=0, growing=True).keys() == {*IDS[:1]}


def test_too_few_patients_are_refused():
    with pytest.raises(UserError, match="3 labelled patients: too few.*--splits"):
        splits.split_by_hash(IDS[:3], splits.PATIENT_SHARES, seed=0)


def test_patients_without_labels_are_for_reference():
    labelled = {name: i % 2 == 0 for i, name in enumerate(IDS)}
    found = splits.split_labelled(labelled, seed=0)
    assert {found[name] for name in IDS[1::2]} == {"reference"}
    assert set(found[name] for name in IDS[::2]) == set(splits.PATIENT_SHARES)
    assert set(splits.split_labelled(dict.fromkeys(IDS, False), seed=0).values()) == {"reference"}


def test_a_file_names_each_patient_once(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("\ufeffpatient_id, split\r\na, train\r\nb,query\r\n", encoding="utf-8")
    assert splits.split_by_file(path, ["b", "a"]) == {"a": "train", "b": "query"}


@pytest.mark.parametrize("text, reason", [
    ("patient_id,split\na,train\nb,query\na,query\n", "patient a is in train and in query"),
    ("patient_id,split\na,train\nb,test\n", "patient b has split 'test'"),
    ("patient_id,split\na,train\n", "patient b (1 in all) has no line"),
    ("patient_id,split\na,train\nb,query\nc,query\n", "patient c (1 in all) is not in the source"),
    ("patient,split\na,train\n", "no column patient_id"),
    ("patient_id,split\na,train\nb\n", "line 3 has not 2 fields"),
    ("patient_id,split\na,train\n\n\nb\n", "line 5 has not 2 fields"),
    ("patient_id;split\na;train\n", "in its first line, 'patient_id;split'"),
    ("patient_id,split\n", "has no lines"),
    ("", "no column patient_id, split"),
    ("patient_id,split,split\na,train,train\n", "two columns have the same name"),
    (b"\xff\xfe\x00", "can't be read as CSV"),
])
def test_broken_files_are_refused(tmp_path, text, reason):
    path = tmp_path / "splits.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"splits.csv: .*{re.escape(reason)}.*; "):
        splits.split_by_file(path, ["a", "b"])
    with pytest.raises(UserError, match="none.csv: can't be read"):
        splits.split_by_file(tmp_path / "none.csv", ["a", "b"])

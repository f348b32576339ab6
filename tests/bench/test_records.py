"""Records on disk: written whole, once, and read only if they are what their name says."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, replace

import pytest

from variegate.bench.records import read, write
from variegate.schema import FORMAT


def test_a_record_comes_back_as_it_was_written(cell, record, tmp_path):
    path = write(tmp_path, record)
    assert path.name == f"{cell.key}.json"
    found = read(tmp_path, [cell])[cell.key]
    assert json.loads(json.dumps(asdict(found))) == json.loads(json.dumps(asdict(record)))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_record_is_never_written_over(cell, record, tmp_path):
    path = write(tmp_path, record)
    before = path.read_bytes(), path.stat().st_ino
    write(tmp_path, replace(record, measures={"vendi": 9.0}))
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_no_piece_of_a_record(cell, record, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # the system refuses every byte after these
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path, record).is_file()


def test_numbers_that_are_none_are_refused(cell, record, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write(tmp_path, replace(record, measures={"vendi": float("nan")}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}, and this version of variegate reads format {FORMAT}; use"),
        ({"settings": {"method": "none", "n": 3}}, "is damaged: it does not hold the record of its name"),
        ({"settings": {}}, "is damaged"),
        ({"colour": "red"}, "is damaged"),
        ({"made": None}, r"does not hold the record of its name \(made=None is not table\); remove it and run again"),
        ({"made": {}}, r"made.model is missing"),
        ({"measures": {"vendi": "1.5"}}, r"measures.vendi='1.5' is not int or float"),
        ({"measures": {"vendi": float("nan")}}, r"measures.vendi=nan is out of range"),
        ({"verdicts": [["cat", "noto"]]}, r"verdicts\[0\]=\['cat', 'noto'\] is not list of 3"),
        ({"hardware": []}, r"hardware=\[\] is not table"),
        ({"seeds": [0, "1"]}, r"seeds\[1\]='1' is not int"),
        ({"settings": {"method": ["none"]}}, r"settings.method=\['none'\] is not str"),
        ({"format": "1"}, "has format '1', and this version"),
    ],
)
def test_a_record_that_is_another_is_refused_and_stays(cell, record, tmp_path, change, sentence):
    path = write(tmp_path, record)
    text = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path, [cell])
    assert path.read_text() == text


def test_a_record_without_a_format_is_that_of_the_first_version(cell, record, tmp_path):
    path = write(tmp_path, record)
    table = json.loads(path.read_text())
    del table["format"]
    path.write_text(json.dumps(table))
    assert read(tmp_path, [cell])[cell.key].pixels == record.pixels


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "[" * 100_000, '{"made": ' + "[" * 100_000, '{"pixels": "0", "pixels": "0"}', "\udcff"],
    ids=lambda text: ascii(text[:40]),
)
def test_a_file_that_is_no_record_is_refused(cell, record, tmp_path, text):
    write(tmp_path, record).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"is damaged: .*; remove it and run again"):
        read(tmp_path, [cell])

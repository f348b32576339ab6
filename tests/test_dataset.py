"""The data set builder's matching of icon names to emoji; no npm, no network, no renderer."""

import importlib
import io
import json
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMOJIBASE = [
    {"hexcode": "1F43B", "label": "bear", "tags": ["animal", "face"], "group": 3, "subgroup": 7},
    {"hexcode": "2764-FE0F", "label": "red heart", "group": 3, "subgroup": 8},
    {"hexcode": "1F600", "label": "grinning face", "tags": [], "group": 3, "subgroup": 7},
    {"hexcode": "1F1F9-1F1F7", "label": "flag: Türkiye", "group": 3, "subgroup": 9},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
GROUPS = {"groups": {"3": "nature"}, "subgroups": {"7": "animal-mammal", "8": "heart", "9": "country-flag"}}


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "training")
    return importlib.import_module("dataset")


@pytest.fixture
def emoji(dataset):
    return dataset.emoji_table(EMOJIBASE, GROUPS)


@pytest.mark.parametrize(
    ("codes", "normal"),
    [
        ("1f43b", "1F43B"),
        ("2764-fe0f", "2764"),
        ("a9", "00A9"),
        ("1F468 200D 2764 FE0F 200D 1F468", "1F468-200D-2764-200D-1F468"),
        ("0023_fe0f_20e3", "0023-20E3"),
    ],
)
def test_hexcodes_of_every_source_compare_equal(dataset, codes, normal):
    assert dataset.normal_hexcode(codes) == normal


@pytest.mark.parametrize(
    ("name", "squashed"),
    [
        ("Grinning Face", "grinningface"),
        ("piñata", "pinata"),
        ("Salt & Pepper", "saltandpepper"),
        ("man’s shoe", "mansshoe"),
        ("keycap: *", "keycap*"),
        ("keycap: #", "keycap#"),
        ("clock_1230", "clock1230"),
    ],
)
def test_spellings_of_a_name_compare_equal(dataset, name, squashed):
    assert dataset.squash(name) == squashed


def test_emoji_table_leaves_out_flags_and_bare_letters(dataset, emoji):
    assert list(emoji) == ["1F43B", "2764", "1F600"]
    assert emoji["1F43B"] == dataset.Emoji("bear", "animal|face", "nature", "animal-mammal")
    assert emoji["2764"].tags == ""


def test_code_table_keeps_known_emoji_and_the_first_code(dataset, emoji):
    chars = {
        "1f43b-1f3fb": "pale-bear",
        "1f43b-1f3fc": "bear",
        "1f43b": "bear",
        "2764": "bear",
        "1f600": "grin",
    }
    assert dataset.code_table(chars, emoji) == {"bear": "1F43B", "grin": "1F600"}


def test_current_names_win_over_old_ones(dataset, emoji):
    coded = [
        (
            {"bear-head": "1F43B", "red-heart": "1F600"},
            {"bruin": {"parent": "bear-head"}, "x": {"parent": "y"}},
        )
    ]
    shortcodes = [{"2764-FE0F": ["bear", "bruin", "heavy_black_heart", "love"], "1F1F9-1F1F7": "turkey"}]
    names = dataset.name_table(emoji, coded, shortcodes)
    assert names["bear"] == "1F43B"  # its label, not the heart's shortcode
    assert names["redheart"] == "2764"  # its label, not the coded package's icon
    assert names["bearhead"] == names["bruin"] == names["bearface"] == "1F43B"  # icon, alias, Unicode's name
    assert names["heavyblackheart"] == names["love"] == "2764"
    assert "turkey" not in names
    assert "x" not in names


def test_a_package_with_code_points_is_not_matched_by_name(dataset):
    found = dataset.match("noto", ["bear", "grin"], {"grin": "1F600"}, {"bear": "1F43B"})
    assert found == {"grin": "1F600"}


def test_a_package_without_code_points_is_matched_by_name(dataset):
    names = {"bear": "1F43B", "keycap1": "0031-20E3", "keycap": "1F600"}
    found = dataset.match("streamline", ["Bear", "bear-2", "keycap-1", "logo"], {}, names)
    assert found == {"Bear": "1F43B", "bear-2": "1F43B", "keycap-1": "0031-20E3"}


def test_corrections_replace_or_drop_an_icon_of_their_own_style_only(dataset):
    names = {"cat": "1F408", "pistol": "1F52B"}
    assert dataset.match("fxemoji", ["cat", "pistol"], {}, names) == {"cat": "1F431"}
    assert dataset.match("other", ["cat", "pistol"], {}, names) == {"cat": "1F408", "pistol": "1F52B"}


def test_a_downloaded_package_is_not_downloaded_again(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # any attempt to run npm fails
    archive = tmp_path / "iconify-json-noto-1.2.9.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, value in {"icons": {"a": 1}, "chars": {"b": 2}}.items():
            content = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert dataset.fetch("@iconify-json/noto@1.2.9", tmp_path) == archive
    assert dataset.read(archive, "chars.json", "icons.json") == [{"b": 2}, {"a": 1}]
    with pytest.raises(FileNotFoundError):
        dataset.fetch("@iconify-json/noto@9.9.9", tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_every_source_is_licensed_and_credited(dataset):
    domain = importlib.import_module("domain")
    assert tuple(dataset.ARTWORK) == domain.LICENSED_STYLES
    credits = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    for package in [dataset.METADATA, *dataset.ARTWORK.values()]:
        assert f"`{package}`" in credits

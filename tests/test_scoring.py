"""Scores of folders, against the measures they are made of."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiny import tiny_sd3
from variegate import Request, generate
from variegate.cli import app
from variegate.diagnosis import diagnose
from variegate.metrics import efficientnet_lite0, kid, mean_pairwise_distance, vendi_score
from variegate.scoring import score


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A gallery of two prompts, stock and repelled."""
    folder = tmp_path_factory.mktemp("ours")
    request = Request(("a cat", "a dog"), n=3, model="tiny", steps=2, parameters={"strength": 5.0, "stop": None})
    gallery = generate(request, pipeline=tiny_sd3())
    gallery.save(folder)
    return folder, gallery


def picture(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


@pytest.fixture
def foreign(tmp_path):
    """Two subfolders of other people's images, of mixed sizes and formats."""
    for name, colours in (("a", ("red", "green", "blue")), ("b", ("white", "black"))):
        (tmp_path / name).mkdir()
        for place, colour in enumerate(colours):
            picture(colour, (32, 32 + 8 * place)).save(tmp_path / name / f"{place}.{'png' if place else 'jpg'}")
    picture("red").save(tmp_path / "sheet.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_our_images_are_grouped_by_prompt_and_method(ours):
    folder, gallery = ours
    extract = efficientnet_lite0()
    found = {one.name: one for one in score([folder])}
    assert set(found) == {f"{folder} (none)", f"{folder} (contextual-repulsion)"}
    for place, name in enumerate(("none", "contextual-repulsion")):
        features = [extract(group.rows[place].images) for group in gallery.groups]
        one = found[f"{folder} ({name})"]
        assert (one.images, one.groups, one.kid) == (6, 2, None)
        assert one.vendi == pytest.approx(sum(vendi_score(f).item() for f in features) / 2)
        assert one.distance == pytest.approx(sum(mean_pairwise_distance(f).item() for f in features) / 2)


def test_other_images_are_grouped_by_folder(foreign, ours):
    [one] = score([foreign], reference=ours[0])
    assert (one.images, one.groups) == (5, 2)
    extract = efficientnet_lite0()
    files = sorted(path for path in foreign.rglob("*") if path.parent != foreign and path.is_file())
    features = extract([Image.open(path) for path in files])
    real = extract([image for group in ours[1].groups for row in group.rows for image in row.images])
    assert one.vendi == pytest.approx((vendi_score(features[:3]) + vendi_score(features[3:])).item() / 2, abs=1e-5)
    assert one.kid == pytest.approx(kid(features, real, scale=1).item(), abs=1e-6)


def test_an_extractor_of_ones_own(foreign):
    [one] = score([foreign], extractor=lambda images: torch.eye(3)[: len(images)])
    assert one.vendi == pytest.approx(2.5)
    assert one.distance == pytest.approx(1.0)


def test_the_command(ours, foreign, tmp_path):
    command = ["score", str(ours[0]), str(foreign), "--reference", str(foreign), "--json", str(tmp_path / "s.json")]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "KID" in result.stdout
    assert len(json.loads((tmp_path / "s.json").read_text())) == 3


def test_bad_folders_are_one_sentence(tmp_path):
    def error(path):
        result = CliRunner().invoke(app, ["score", str(path)])
        assert result.exit_code == 2
        return " ".join(result.stderr.split())

    assert "nowhere is no folder." in error(tmp_path / "nowhere")
    assert "has no images" in error(tmp_path)
    picture("red").save(tmp_path / "one.png")
    assert "has no two images of one prompt" in error(tmp_path)
    (tmp_path / "two.png").write_bytes(b"not an image")
    assert "two.png can't be read as a picture" in error(tmp_path)


def test_a_diagnosis_is_between_its_two_extremes():
    pipe = tiny_sd3()
    request = Request(("a cat",), n=4, model="tiny", steps=2, method="none")
    found = diagnose(request, pipeline=pipe)
    prompt, independent = (group.rows[0] for group in found.gallery.groups)
    assert found.typicality == pytest.approx(min(1, max(0, 1 - (prompt.vendi - 1) / (independent.vendi - 1))), abs=1e-6)
    features = efficientnet_lite0()(prompt.images)
    similarity = (features @ features.T).sum(1)
    assert (similarity[:-1] >= similarity[1:]).all()
    seeds = generate(request, pipeline=pipe).groups[0].rows[0].images
    assert sorted(image.tobytes() for image in seeds) == sorted(image.tobytes() for image in prompt.images)
    assert found.gallery.groups[1].prompt.startswith("independent prompts: red apple, rocket")


def test_a_diagnosis_refuses_what_it_cannot_do(tmp_path):
    for change, message in ((("a", "b"), "a diagnosis is of one prompt"), (("a",), "n=1 is out of range")):
        with pytest.raises(ValueError, match=message):
            diagnose(Request(change, n=1, method="none"))
    result = CliRunner().invoke(app, ["diagnose", "an animal", "-n", "17"])
    assert result.exit_code == 2
    assert "n=17 is out of range" in result.stderr
    command = ["diagnose", "an animal", "-n", "3", "--steps", "4", "-o", str(tmp_path / "sheets" / "d.png")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "% typical" in result.stdout
    assert Image.open(tmp_path / "sheets" / "d.png").width > 300

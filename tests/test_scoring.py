"""Scores of folders, against the measures they are made of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from networks import save_clip, save_vgg16
from tiny import tiny_sd3
from variegate import Request, generate
from variegate.cli import app
from variegate.diagnosis import diagnose
from variegate.metrics import (
    LPIPS,
    clip,
    clip_score,
    efficientnet_lite0,
    fid,
    kid,
    mean_pairwise_distance,
    mean_pairwise_ms_ssim,
    prdc,
    vendi_score,
)
from variegate.metrics.features import to_tensors
from variegate.scoring import earlier, save, score


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


def brightness(images):
    """An extractor of one's own, narrow enough for a Frechet distance of few images."""
    values = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
    return torch.tensor(values, dtype=torch.float32)[:, :2] + 1


def test_an_extractor_of_ones_own(foreign):
    [one] = score([foreign], extractor=lambda images: torch.eye(3)[: len(images)])
    assert one.vendi == pytest.approx(2.5)
    assert one.pair_vendi == pytest.approx(2.0)
    assert one.distance == pytest.approx(1.0)
    assert one.features == "unstated"


def test_the_measures_beside_a_reference(ours, tmp_path):
    folder, gallery = ours
    for place in range(6):
        picture((40 * place, 250 - 30 * place, 90)).save(tmp_path / f"{place}.png")
    [one, _] = score([folder], reference=tmp_path, extractor=brightness)
    features = brightness([image for group in gallery.groups for image in group.rows[0].images])
    real = brightness([Image.open(tmp_path / f"{place}.png") for place in range(6)])
    assert one.fid == pytest.approx(fid(features, real).item())
    shares = tuple(value.item() for value in prdc(features, real, k=5))
    assert (one.precision, one.recall, one.density, one.coverage) == pytest.approx(shares)
    assert one.reference.startswith("6 images ")
    picture("white").save(tmp_path / "5.png")
    [changed, _] = score([folder], reference=tmp_path, extractor=brightness)
    assert changed.reference.startswith("6 images ")
    assert changed.reference != one.reference
    (tmp_path / "5.png").unlink()
    [few, _] = score([folder], reference=tmp_path, extractor=brightness)
    assert few.precision is None
    assert few.fid is not None
    assert few.reference != one.reference
    assert score([folder], reference=tmp_path)[0].fid is None


def test_the_measures_of_pixels(ours, foreign, tmp_path):
    folder, gallery = ours
    save_vgg16(tmp_path)
    network = LPIPS(tmp_path)
    [one, _] = score([folder], ms_ssim=True, lpips=network)
    tensors = [torch.cat(to_tensors(group.rows[0].images)) for group in gallery.groups]
    assert one.ms_ssim == pytest.approx(sum(mean_pairwise_ms_ssim(x).item() for x in tensors) / 2)
    assert one.lpips == pytest.approx(sum(network.mean_pairwise(x).item() for x in tensors) / 2)
    assert one.ms_ssim_of == "1 scales, 16 x 16"
    assert one.lpips_of == f"{network.features}, 16 x 16"
    with pytest.raises(ValueError, match="has images of 32 x 32 and of 32 x 40; MS-SSIM and LPIPS need images of one"):
        score([foreign], ms_ssim=True)


def test_clip_also_scores_the_prompts_that_images_tell(ours, foreign, tmp_path):
    save_clip(tmp_path)
    folder, gallery = ours
    network = clip(tmp_path)
    [one, _] = score([folder], extractor=network)
    expected = [
        clip_score(network([image]), network.texts([group.prompt])).item()
        for group in gallery.groups
        for image in group.rows[0].images
    ]
    assert one.clip_score == pytest.approx(sum(expected) / 6, rel=1e-4)
    assert score([foreign / "a"], extractor=network)[0].clip_score is None


def test_a_group_of_one_is_told(foreign):
    (foreign / "b" / "0.jpg").unlink()
    with pytest.warns(UserWarning, match="1 of 2 groups are a single image"):
        [one] = score([foreign])
    assert (one.images, one.groups) == (4, 1)


def command(*words):
    result = CliRunner().invoke(app, ["score", *map(str, words)], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_the_command(ours, foreign, tmp_path):
    code, out, _ = command(ours[0], foreign, "--reference", foreign, "--json", tmp_path / "new" / "s.json")
    assert code == 0
    assert "KID" in out
    assert "No FID" in out
    assert "Features: efficientnet-lite0, 128 x 128 bilinear" in out
    assert len(json.loads((tmp_path / "new" / "s.json").read_text())) == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.json"]


def test_ratios_to_earlier_scores(ours, foreign, tmp_path):
    old, other = tmp_path / "old.json", tmp_path / "clip"
    assert command(foreign / "a", "--ms-ssim", "--json", old)[2].endswith("MS-SSIM and LPIPS need images of one size.")
    found = score([foreign / "a"], reference=ours[0])
    save([replace(found[0], vendi=found[0].vendi / 2, kid=-1.0)], old)
    code, out, _ = command(foreign / "a", "--reference", ours[0], "--compare", old)
    assert code == 0
    assert f"{found[0].vendi:.4g} (2.00x)" in out
    assert f"{found[0].distance:.4g} (1.00x)" in out
    assert f"{found[0].kid:.4g} " in out
    assert out.count("x)") == 3  # not of counts, and not of a KID that was below 0
    code, out, _ = command(foreign / "b", "--compare", old)  # the only one there is
    assert code == 0
    other.mkdir()
    save_clip(other)
    code, _, error = command(foreign / "a", "--extractor", "clip", "--model", other, "--compare", old)
    assert code == 2
    assert "can't be compared: its features is 'efficientnet-lite0, 128 x 128" in error
    code, _, error = command(foreign / "a", "--reference", foreign, "--compare", old)
    assert code == 2
    assert "can't be compared: its reference is '12 images " in error


def test_scores_without_a_counterpart(foreign, tmp_path):
    old = tmp_path / "old.json"
    found = score([foreign])
    save([replace(found[0], name="x"), replace(found[0], name="y")], old)
    with pytest.raises(ValueError, match=r"has no score of .*, but of x, y"):
        earlier(found, old)
    unstated = score([foreign], extractor=brightness)
    save(unstated, old)
    with pytest.raises(ValueError, match=r"its features is 'unstated', and that of .* 'unstated'"):
        earlier(unstated, old)
    for text in ("[{}]", "{", "3"):
        old.write_text(text)
        with pytest.raises(ValueError, match=r"old\.json has no scores"):
            earlier(found, old)


def test_a_score_file_is_whole_or_not_there(foreign, tmp_path):
    found = score([foreign])
    save(found, tmp_path / "s.json")
    before = (tmp_path / "s.json").read_text()
    with pytest.raises(TypeError):
        save([replace(found[0], kid=torch.zeros(1))], tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == before
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save(found, tmp_path / "taken")
    assert not list(tmp_path.glob(".*"))


def test_bad_folders_are_one_sentence(tmp_path):
    def error(*words):
        code, _, text = command(*words)
        assert code == 2
        return text

    assert "nowhere is no folder." in error(tmp_path / "nowhere")
    assert "has no images" in error(tmp_path)
    picture("red").save(tmp_path / "one.png")
    assert "has no two images of one prompt" in error(tmp_path)
    assert "has one image; a reference needs at least two." in error(tmp_path, "--reference", tmp_path)
    assert "extractor='vgg' is unknown" in error(tmp_path, "--extractor", "vgg")
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

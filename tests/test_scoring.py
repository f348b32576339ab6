"""Scores of folders, against the measures they are made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
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
from variegate.metrics.features import Features, Network, to_tensors
from variegate.scoring import earlier, save, score

pytestmark = pytest.mark.filterwarnings("ignore:.* left out .* of other kinds")  # what pytest leaves beside pictures


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


def test_a_file_of_no_scores_is_one_sentence(foreign, tmp_path):
    old = tmp_path / "old.json"
    with pytest.warns(UserWarning, match="left out"):
        found = score([foreign], extractor=brightness)
    save(found, old)
    [facts] = json.loads(old.read_text())
    assert earlier(found[:0], old) == []
    wrong = [{**facts, name: value} for name in facts for value in (True, [], {})]
    wrong += [{**facts, name: 1} for name in ("name", "features", "reference", "ms_ssim_of", "grouping")]
    wrong += [{**facts, name: "1"} for name in ("images", "vendi", "kid")] + [{**facts, "images": 1.5}]
    wrong += [{**facts, "vendi": float("nan")}, {**facts, "kid": float("inf")}, {**facts, "vendi": None}]
    wrong += [{**facts, "more": 1}, {name: value for name, value in facts.items() if name != "vendi"}]
    texts = [json.dumps([facts, one]) for one in wrong]
    texts += [
        "[{}]",
        "{",
        "3",
        "",
        "null",
        json.dumps(facts),
        "[" * 200_000,
        '[{"name":' * 100_000,
        b"\xff\xfe[",
    ]
    for text in texts:
        old.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(
            ValueError, match=r"old\.json has no scores; use a file that `variegate score --json` wrote"
        ):
            earlier(found, old)
    os.mkfifo(tmp_path / "pipe.json")
    for file in ("pipe.json", "nowhere.json", "."):
        with pytest.raises(ValueError, match="has no scores"):
            earlier(found, tmp_path / file)
    assert (
        "nowhere.json has no scores" in command(foreign / "none", "--compare", "nowhere.json")[2]
    )  # is looked at first


def test_earlier_scores_that_others_named_do_not_steer_the_terminal(foreign, tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        found = score([foreign], extractor=efficientnet_lite0())
    save([replace(found[0], name=f"\x1b[{place}m" + "x" * 500) for place in range(100)], tmp_path / "old.json")
    with pytest.raises(ValueError, match=r"but of \?\[0mx{52} \.\.\.(, .*){7} and others\.$"):
        earlier(found, tmp_path / "old.json")
    save([replace(found[0], features="\x1b" * 500)], tmp_path / "old.json")
    with pytest.raises(ValueError, match=r"its features is '\?{196} \.\.\.', and that of"):
        earlier(found, tmp_path / "old.json")


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


@pytest.fixture
def four(tmp_path):
    """Four good pictures in a folder."""
    folder = tmp_path / "four"
    folder.mkdir()
    for place, colour in enumerate(("red", "green", "blue", "white")):
        picture(colour).save(folder / f"{place}.png")
    return folder


@pytest.mark.parametrize("where", ["folder", "reference"])
def test_a_broken_file_is_refused_or_left_out_aloud(four, tmp_path, where):
    expected = score([four])[0]
    with open(four / "1.png", "rb") as file:
        (four / "bad.png").write_bytes(file.read()[:-20])
    other = tmp_path / "other"
    other.mkdir()
    picture("red").save(other / "0.png")
    picture("blue").save(other / "1.png")
    words = [four] if where == "folder" else [other, "--reference", four]
    code, out, error = command(*words, "--json", tmp_path / "new" / "s.json")
    assert (code, out) == (2, "")
    assert error == f"Error: {four}/bad.png can't be read as a picture: it is truncated."
    assert not (tmp_path / "new").exists()
    code, out, error = command(*words, "--json", tmp_path / "s.json", "--skip-bad")
    assert code == 0
    assert "left out 1 of 5 images as broken" in error
    assert "bad.png can't be read" in error
    [found] = json.loads((tmp_path / "s.json").read_text())
    if where == "folder":
        assert (found["images"], found["vendi"]) == (4, pytest.approx(expected.vendi))
    else:
        assert found["reference"].startswith("4 images ")


def test_a_file_that_breaks_behind_its_header_is_refused_as_well(four):
    picture("red", (256, 256)).resize((256, 256)).save(four / "half.jpg")
    data = (four / "half.jpg").read_bytes()
    (four / "half.jpg").write_bytes(data[: len(data) * 2 // 3])
    code, _, error = command(four)
    assert code == 2
    assert "half.jpg can't be read as a picture: image file is truncated" in error
    assert command(four, "--skip-bad")[0] == 0


def test_what_is_left_out_is_said_and_the_groups_are_shown(four):
    (four / ".hidden.png").touch()
    (four / "sub.png").mkdir()
    (four / "__MACOSX").mkdir()
    os.mkfifo(four / "pipe.png")
    (four / "notes.txt").touch()
    code, out, error = command(four, f"{four}/../four", "--reference", four)
    assert code == 0
    left_out = "1 __MACOSX, 1 folders named like a picture, 1 hidden, 1 of other kinds (*.txt), 1 special files."
    assert error.count(f"four: left out {left_out}") == 2  # for the folder and for the reference
    assert "given twice; it counts once." in error
    assert f"Groups of {four}: 1 by folder: four/." in out
    assert out.splitlines()[-1].endswith("rows of length 1, transparent parts on white.")


def test_groups_by_a_pattern(four, tmp_path):
    for seed in range(2):
        for prompt in range(2):
            (tmp_path / "x" / f"{seed}").mkdir(parents=True, exist_ok=True)
            picture(("red", "blue")[prompt]).save(tmp_path / "x" / f"{seed}" / f"gen_{prompt}.png")
    code, out, error = command(tmp_path / "x", "--group-by", "{seed}/gen_{prompt}.png")
    assert (code, error) == (0, "")
    assert "2 by pattern: 0, 1." in out
    [one] = score([tmp_path / "x"], group_by="{seed}/gen_{prompt}.png")
    assert one.vendi == pytest.approx(1)
    assert score([tmp_path / "x"])[0].vendi > 1.1
    code, out, error = command(tmp_path / "x", "--group-by", "{seed}/{prompt}.jpg")
    assert (code, out) == (2, "")
    assert "group_by='{seed}/{prompt}.jpg' matches none of the 4 pictures in" in error


def test_a_picture_of_no_recipe_is_anybodys(four):
    info = PngInfo()
    info.add_text("variegate", "made by my own script")
    picture("red").save(four / "0.png", pnginfo=info)
    code, out, error = command(four)
    assert code == 0
    assert "four: 1 of 4 pictures have a variegate text that is no recipe of ours, and count as anybody's." in error
    assert "1 by folder: four/." in out


def test_clip_scores_the_prompts_that_other_programs_wrote(four, tmp_path):
    save_clip(tmp_path)
    network = clip(tmp_path)
    assert score([four], extractor=network)[0].clip_score is None
    pictures = [picture(colour) for colour in ("red", "green", "blue", "white")]
    for place, image in enumerate(pictures):
        info = PngInfo()
        info.add_text("parameters", f"{('a cat', 'a dog')[place % 2]}\nSteps: 20, Seed: {place}")
        image.save(four / f"{place}.png", pnginfo=info)
    [one] = score([four], extractor=network)
    expected = clip_score(network(pictures), network.texts(["a cat", "a dog"] * 2)).mean().item()
    assert one.clip_score == pytest.approx(expected, rel=1e-4)
    assert one.grouping == "2 by prompt: a cat, a dog"


def test_a_network_is_given_one_picture_at_a_time(four):
    alive: list[weakref.ref] = []
    most = []

    def forward(images):
        rows = []
        for image in images:
            alive.append(weakref.ref(image))
            most.append(sum(reference() is not None for reference in alive))
            rows.append(torch.tensor(image.getpixel((0, 0)), dtype=torch.float32) + 1)
        return torch.stack(rows)

    [one] = score([four], extractor=Network(Features("mean", "none", "none"), forward, batch_size=4))
    assert one.images == len(most) == 4
    assert max(most) <= 2  # the next is read before the last is let go


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory as Linux counts it")
def test_memory_does_not_grow_with_the_number_of_large_pictures(tmp_path):
    for count in (2, 32):
        (tmp_path / f"{count}").mkdir()
        for place in range(count):
            picture((8 * place, 50, 90), (1024, 1024)).save(tmp_path / f"{count}" / f"{place}.png", compress_level=1)
    code = (
        "import resource, sys; from variegate.scoring import score\n"
        "for folder in sys.argv[1:]:\n"
        "    score([folder], reference=folder)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "2"), str(tmp_path / "32")]
    few, many = map(int, subprocess.check_output(words, text=True).split())
    # One such picture takes 12 MB as floats, and the network up to 3 MB for each picture of a batch.
    assert many - few < 150


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

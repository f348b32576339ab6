"""The judge: the prompts it knows, its verdicts, and that its bundled reference is that of the domain."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from variegate.emoji import reference as reference_module
from variegate.emoji.judge import Judge, Verdict, eyes
from variegate.emoji.reference import FEATURES, Drawing, Reference
from variegate.metrics import efficientnet_lite0, kid, mean_pairwise_distance, vendi_score

ROOT = Path(__file__).parents[1]


def picture(shape, colour):
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if shape == "ball":
        draw.ellipse((8, 8, 56, 56), colour)
    elif shape == "box":
        draw.rectangle((8, 8, 56, 56), colour)
    else:
        draw.polygon([(32, 4), (60, 60), (4, 60)], colour)
    return image


@pytest.fixture(scope="module")
def bundled():
    return Reference.load()


@pytest.fixture(scope="module")
def small():
    """A judge that knows a ball and a box, each in two styles, and a tree in one."""
    extract = eyes()
    drawings = (
        Drawing("red ball", "paint", "toy", "red ball"),
        Drawing("red ball", "ink", "toy", "ball"),
        Drawing("box", "paint", "toy", "box"),
        Drawing("box", "ink", "toy", "box"),
        Drawing("tree", "paint", "plant", "tree"),
    )
    pictures = [
        picture("ball", "red"), picture("ball", "black"), picture("box", "red"), picture("box", "black"),
        picture("tree", "green"),
    ]  # fmt: skip
    reference = Reference(
        features=extract(pictures),
        drawings=drawings,
        styles={"paint": "bright", "ink": "black and white"},
        phrases={"toy": ("a toy", "a thing"), "plant": ("a thing",)},
    )
    return Judge(reference, extract), pictures


@pytest.mark.parametrize(
    ("prompt", "labels", "style"),
    [
        ("rocket", {"rocket"}, None),
        ("3d rocket", {"rocket"}, "fluent"),
        ("rocket, 3d style", {"rocket"}, "fluent"),
        ("  Bold  flat ROCKET ", {"rocket"}, "twemoji"),
        ("rocket, bright flat style", {"rocket"}, "fluent-flat"),
        ("black and white rocket", {"rocket"}, "silhouette"),
        ("black cat", {"black cat"}, None),  # no style
        ("apple, black and white style", {"red apple", "green apple"}, "silhouette"),
        ("red apple, black and white style", {"red apple"}, "silhouette"),
        ("soft ice cream", {"soft ice cream"}, None),  # rather than ice cream in the soft style
        ("ice cream, soft style", {"ice cream"}, "emojione"),
    ],
)
def test_specific_prompts_allow_their_labels(bundled, prompt, labels, style):
    assert bundled.truth(prompt) == (labels, style)


def test_generic_prompts_allow_every_label_of_their_phrase(bundled):
    animals, style = bundled.truth("an animal, 3d style")
    assert style == "fluent"
    assert {"dog face", "owl", "frog", "snake", "whale", "ant"} <= animals
    assert animals.isdisjoint({"rocket", "rose", "red apple"})
    assert bundled.truth("a mammal").labels < animals
    assert bundled.truth("a frog").labels == {"frog"}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a dancing bear",
        "rocket, shaded",
        "3d",
        "3d, 3d style",
        "3d 3d rocket",
        "rocket, style",
        "3drocket",
    ],
)
def test_a_prompt_without_truth_is_refused(bundled, prompt):
    with pytest.raises(ValueError, match="has no truth to judge by"):
        bundled.truth(prompt)


def test_the_refusal_offers_what_is_near(bundled):
    with pytest.raises(ValueError, match="'tulip'"):
        bundled.truth("tulips")


def test_the_bundled_reference_is_that_of_the_domain(bundled, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "training")
    domain, captions = importlib.import_module("domain"), importlib.import_module("captions")
    assert bundled.styles == domain.STYLES
    assert bundled.phrases == domain.GENERIC
    assert bundled.features.shape == (len(bundled.drawings), 1280)
    assert len({(d.label, d.style) for d in bundled.drawings}) == len(bundled.drawings)
    assert set(domain.POPULAR) <= {d.label for d in bundled.drawings}
    torch.testing.assert_close(bundled.features.norm(dim=1), torch.ones(len(bundled.drawings)))
    for row, drawing in enumerate(bundled.drawings):
        item = captions.Drawing(row, drawing.label, drawing.style, drawing.subgroup, tags=())
        assert drawing.subject == captions.subject_of(item)


def test_the_bundled_features_are_what_the_eyes_see():
    with safe_open(Path(reference_module.__file__).parent / FEATURES, "pt") as file:
        assert file.metadata() == {"made of": str(eyes().features)}
    assert Judge.load().extract is eyes()


def test_the_eyes_do_not_see_what_is_finer_than_strokes():
    plain = picture("ball", "red")
    values = np.asarray(plain).astype(int)
    odd = np.indices(values.shape[:2]).sum(axis=0)[:, :, None] % 2
    chequered = Image.fromarray((values + odd * np.where(values > 0, -40, 40)).astype(np.uint8))
    near, far = (float(a @ b) for a, b in (e([plain, chequered]) for e in (eyes(), efficientnet_lite0())))
    assert near > 0.95 > 0.8 > far


def test_every_caption_but_tags_has_its_truth(bundled):
    clashes = set()
    for label, style, subgroup, subject in bundled.drawings:
        word = bundled.styles[style]
        assert label in bundled.truth(subject).labels
        for prompt in (f"{word} {subject}", f"{subject}, {word} style"):
            truth = bundled.truth(prompt)
            if label not in truth.labels or truth.style != style:
                clashes.add(prompt)
        for phrase in bundled.phrases[subgroup]:
            truth = bundled.truth(f"{phrase}, {word} style")
            assert label in truth.labels
            assert truth.style == style
    assert clashes == {"soft ice cream"}


def test_features_know_an_emoji_in_a_style_they_have_not_seen(bundled):
    labels, styles = (np.array(column) for column in zip(*[d[:2] for d in bundled.drawings], strict=True))
    similarity = (bundled.features @ bundled.features.T).numpy()
    nearest = np.where(styles[:, None] == styles, -1, similarity).argmax(axis=1)
    right = (labels[nearest] == labels).mean()
    assert right > 0.6  # chance is 1 in 310


def test_verdicts_name_the_nearest_drawing(small):
    judge, pictures = small
    verdicts = judge([picture("box", "black"), picture("ball", (250, 10, 10)), pictures[4]])
    assert [(v.label, v.style, v.subgroup) for v in verdicts] == [
        ("box", "ink", "toy"),
        ("red ball", "paint", "toy"),
        ("tree", "paint", "plant"),
    ]
    assert verdicts[0].similarity == pytest.approx(1, abs=1e-5)
    assert 0.9 < verdicts[1].similarity < 1


def test_a_report_of_a_specific_prompt(small):
    judge, pictures = small
    images = [pictures[i] for i in (0, 0, 1, 3)]  # three balls, one of them in ink, and a box in ink
    features = judge.extract(images)
    report = judge.report(images, "ball, black and white style")
    assert report.prompt == "ball, black and white style"
    assert report.verdicts[3] == Verdict("box", "ink", "toy", report.verdicts[3].similarity)
    assert report.precision == 0.75
    assert report.style_precision == 0.5
    assert report.similarity == pytest.approx(1, abs=1e-5)
    assert (report.labels, report.drawings, report.styles) == (2, 3, 2)
    assert report.vendi == pytest.approx(vendi_score(features).item())
    assert report.distance == pytest.approx(mean_pairwise_distance(features).item())


def test_a_report_of_a_generic_prompt(small):
    judge, pictures = small
    assert judge.report(pictures, "a toy").precision == 0.8
    assert judge.report(pictures, "a thing").precision == 1
    assert judge.report(pictures, "a toy").style_precision is None
    assert judge.report(pictures, "a toy, bright style").style_precision == 0.6


def test_the_kid_of_a_report_is_against_what_the_prompt_allows(small):
    judge, pictures = small
    features, drawings = judge.reference.features, judge.reference.drawings
    for prompt in ("a toy", "a toy, bright style"):
        truth = judge.reference.truth(prompt)
        rows = [i for i, d in enumerate(drawings) if d.label in truth.labels and truth.style in (None, d.style)]
        expected = kid(judge.extract(pictures), features[rows], scale=1.0).item()
        assert judge.report(pictures, prompt).kid == pytest.approx(expected)
    assert judge.report(pictures, "tree").kid is None  # one drawing is no distribution


def test_a_report_needs_two_pictures_and_a_truth(small):
    judge, pictures = small
    with pytest.raises(ValueError, match="at least two"):
        judge.report(pictures[:1], "box")
    with pytest.raises(ValueError, match="prompt='a dog'"):
        judge.report(pictures, "a dog")


def test_kid_is_against_the_whole_reference(small):
    judge, pictures = small
    expected = kid(judge.extract(pictures[:3]), judge.reference.features, scale=1.0).item()
    assert judge.kid(pictures[:3]) == pytest.approx(expected)
    assert judge.kid(pictures) < judge.kid([picture("tree", "blue"), picture("tree", "navy")])

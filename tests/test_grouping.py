"""Groups of pictures: by pattern, recipe, prompt, folder; and the prompts that other programs write."""

from __future__ import annotations

import json
import time
import zlib

import pytest
from PIL import Image, PngImagePlugin

from test_pictures import chunk, png
from tiny import tiny_sd3
from variegate import Request, generate
from variegate.embedded import a1111_prompt, comfyui_prompt
from variegate.grouping import describe, grouped, rows_of, shown, usable
from variegate.pictures import inspect


def save(path, colour="red", **texts):
    """A picture with texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (16, 16), colour).save(path, pnginfo=info)


def names(folder, pattern=None):
    """The names of the files of each group, by the group's own; and what was said."""
    notes = []
    groups, more = grouped(folder, usable(folder, notes), pattern)
    return {
        group.name: " ".join(path.relative_to(folder).as_posix() for path in group.files) for group in groups
    }, notes + more


@pytest.mark.parametrize(
    ("pattern", "files", "expected"),
    [
        (
            "{seed}/gen_{prompt}.png",
            ("0/gen_a.png", "0/gen_b.png", "1/gen_a.png", "1/gen_b.png"),
            {"a": "0/gen_a.png 1/gen_a.png", "b": "0/gen_b.png 1/gen_b.png"},
        ),
        (
            "prompt{prompt}_seed{seed}.png",
            ("prompt1_seed1.png", "prompt1_seed12.png", "prompt2_seed1.png"),
            {"1": "prompt1_seed1.png prompt1_seed12.png", "2": "prompt2_seed1.png"},
        ),
        ("{prompt}_{seed}.png", ("a_cat_1.png", "a_cat_2.png"), {"a_cat": "a_cat_1.png a_cat_2.png"}),
        ("{n}_{prompt}.png", ("1_a_cat.png", "2_a_cat.png"), {"a_cat": "1_a_cat.png 2_a_cat.png"}),
        ("{seed}/{index}.png", ("x/1.png", "y/2.png"), {"all": "x/1.png y/2.png"}),
        (
            "{model}/{prompt}/{prompt}-{seed}.png",
            ("m/a-b/a-b-1.png", "m/a-b/a-b-2.png", "m/a/a-1.png"),
            {"model m, prompt a-b": "m/a-b/a-b-1.png m/a-b/a-b-2.png", "model m, prompt a": "m/a/a-1.png"},
        ),
        ("{a}_{b}_{c}.png", ("1_2_3_4.png",), {"a 1, b 2, c 3_4": "1_2_3_4.png"}),
        ("{{{prompt}}}{seed}.png", ("{a}1.png", "{a}2.png"), {"a": "{a}1.png {a}2.png"}),
    ],
)
def test_a_pattern_of_paths(tmp_path, pattern, files, expected):
    for file in files:
        save(tmp_path / file, parameters="one prompt\nSteps: 1")
    assert names(tmp_path, pattern) == (expected, [])


def test_what_a_pattern_does_not_match_is_left_out_and_counted(tmp_path):
    for file in ("a_1.png", "a_2.png", "b.png", "sub/a_3.png"):
        save(tmp_path / file)
    found, notes = names(tmp_path, "{prompt}_{seed}.png")
    assert found == {"a": "a_1.png a_2.png"}
    assert notes == ["2 of 4 pictures don't match group_by='{prompt}_{seed}.png' and are left out."]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{seed}/{prompt}.jpg", r"matches none of the 1 pictures in .*; 'a/b\.png' is one of them"),
        ("a/b.png", "has no field; use a path with fields"),
        ("{seed}{prompt}.png", "has two fields with nothing between"),
        ("{seed", "is no pattern: expected '}'"),
        ("{0}.png", "has a field that is no name"),
        ("{}.png", "has a field that is no name"),
        ("{seed:03d}.png", "has a field that is no name"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_one_sentence(tmp_path, pattern, message):
    save(tmp_path / "a" / "b.png")
    with pytest.raises(ValueError, match=message):
        names(tmp_path, pattern)


def test_no_name_of_a_file_takes_a_pattern_long(tmp_path):
    save(tmp_path / ("_" * 250 + ".png"))
    save(tmp_path / "a_b_c_d_e_f_g_h.jpg")
    before = time.perf_counter()
    assert list(names(tmp_path, "{a}_{b}_{c}_{d}_{e}_{f}_{g}_{h}.jpg")[0]) == ["a a, b b, c c, d d, e e, f f, g g, h h"]
    assert time.perf_counter() - before < 10


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3()


def test_recipes_that_differ_in_more_than_seeds_are_groups_of_their_own(tmp_path, pipe):
    first = Request(("a cat",), n=2, model="tiny", steps=2, method="cads", parameters={"strength": 0.1}, compare=False)
    changes = {
        "first": {},
        "seeds": {"seed": 7, "n": 3},
        "strength": {"parameters": {"strength": 0.5}},
        "steps": {"steps": 3},
        "guidance": {"guidance": 2.0},
        "negative": {"negative_prompt": "a dog"},
        "method": {"method": "none", "parameters": {}},
    }
    for name, change in changes.items():
        request = Request(**{**vars(first), **change})
        generate(request, pipeline=pipe).save(tmp_path / name)
    generate(Request(**{**vars(first), "model": "other"}), pipeline=pipe).save(tmp_path / "model")
    with Image.open(next((tmp_path / "first").glob("a-cat-*.png"))) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("variegate", image.info["variegate"])
        image.resize((8, 8)).save(tmp_path / "smaller.png", pnginfo=info)
    groups, notes = grouped(tmp_path, usable(tmp_path, []))
    assert notes == []
    assert [group.by for group in groups] == ["recipe"] * 8
    assert {frozenset(path.parent.name for path in group.files) for group in groups} == {
        frozenset({"first", "seeds"}),
        frozenset({tmp_path.name}),
        *(frozenset({name}) for name in ("strength", "steps", "guidance", "negative", "method", "model")),
    }
    assert max(len(group.files) for group in groups) == 5
    assert {(group.method, group.prompt) for group in groups} == {("cads", "a cat"), ("none", "a cat")}
    assert len({group.name for group in groups}) == 8
    [strong] = [group for group in groups if group.files[0].parent.name == "strength"]
    assert "strength 0.5" in strong.name
    assert [group.name for group in groups if group.method == "none"] == ["a cat"]
    rows = rows_of([tmp_path], [])
    assert list(rows) == [f"{tmp_path} (cads)", f"{tmp_path} (none)"]


def test_prompts_that_others_wrote_are_groups_wherever_the_files_are(tmp_path):
    for place in range(2):
        save(tmp_path / f"{place}" / "a.png", parameters=f"a cat\nNegative prompt: dog\nSteps: 20, Seed: {place}")
        save(tmp_path / f"{place}" / "b.png", prompt=json.dumps(graph("a dog", seed=place)))
        save(tmp_path / f"{place}" / "c.png")
        save(tmp_path / f"{place}" / "d.png", prompt="[1, 2")
    found, notes = names(tmp_path)
    assert found == {
        "a cat": "0/a.png 1/a.png",
        "a dog": "0/b.png 1/b.png",
        "0": "0/c.png 0/d.png",
        "1": "1/c.png 1/d.png",
    }
    assert notes == [
        "2 of 8 pictures have a text or a graph that does not lead to one prompt, and are grouped by folder."
    ]
    groups, _ = grouped(tmp_path, usable(tmp_path, []))
    assert describe(groups) == "2 by prompt: a cat, a dog; 2 by folder: 0, 1"
    assert [group.prompt for group in groups] == ["a cat", "a dog", None, None]


def test_a_text_of_ours_that_is_no_recipe_makes_a_picture_anybodys(tmp_path):
    for place, text in enumerate(("no JSON", "3", "{}")):
        save(tmp_path / f"{place}.png", variegate=text)
    save(tmp_path / "3.png", variegate="", parameters="a cat")
    found, notes = names(tmp_path)
    assert found == {f"{tmp_path.name}/": "0.png 1.png 2.png", "a cat": "3.png"}
    assert notes == ["4 of 4 pictures have a variegate text that is no recipe of ours, and count as anybody's."]


def test_a_folder_and_a_subfolder_of_its_name_are_two_groups(tmp_path):
    for file in ("x/1.png", "x/x/2.png"):
        save(tmp_path / file)
    assert names(tmp_path / "x")[0] == {"x/": "1.png", "x": "x/2.png"}


def test_a_folder_given_twice_counts_once(tmp_path, monkeypatch):
    for file in ("a/1.png", "a/2.png"):
        save(tmp_path / file)
    (tmp_path / "b").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    notes = []
    assert list(rows_of(["a", "./a", "b", tmp_path / "a"], notes)) == ["a"]
    assert notes == [
        "./a is the folder a, given twice; it counts once.",
        "b is the folder a, given twice; it counts once.",
        f"{tmp_path}/a is the folder a, given twice; it counts once.",
    ]


def test_many_and_long_names_are_shortened():
    assert shown("a " * 100) == "a " * 28 + " ..."
    assert shown("\x1b]0;x\x07\ud800\u202e\n b") == "?]0;x??? b"
    assert len(shown("x" * (1 << 22))) == 60


def graph(text, seed=0, **more):
    """A ComfyUI graph as its first workflow."""
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {"seed": seed, "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "model.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurred", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
        **more,
    }  # fmt: skip


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


LONG = {str(place): node("ConditioningZeroOut", conditioning=[str(place + 1), 0]) for place in range(100, 5000)}
FLUX = {
    "1": node("SamplerCustomAdvanced", noise=["2", 0], guider=["3", 0], sampler=["4", 0], latent_image=["9", 0]),
    "3": node("BasicGuider", model=["8", 0], conditioning=["5", 0]),
    "5": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
    "6": node("CLIPTextEncodeFlux", clip=["8", 1], clip_l="a cat", t5xxl="a cat on a mat", guidance=3.5),
}


TEXT = graph("a cat")
BOTH = {"positive": ["10", 0], "negative": ["10", 1]}
CROSSED = {"positive": ["10", 1], "negative": ["10", 0]}
CONTROL = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["11", 0])
SWAPPED = node("ControlNetApplyAdvanced", positive=["7", 0], negative=["6", 0], control_net=["11", 0])
JOINED = node("StringConcatenate", string_a=["11", 0], string_b="on a mat", delimiter=" ")
COMBINED = node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["7", 0])
STRING = node("PrimitiveString", value="a cat")


@pytest.mark.parametrize(
    ("nodes", "prompt"),
    [
        (graph(" a cat\n"), "a cat"),
        (FLUX, "a cat\na cat on a mat"),
        (FLUX | {"3": node("CFGGuider", positive=["5", 0], negative=["7", 0])}, "a cat\na cat on a mat"),
        # Both conditionings through one node, which hands them on in order.
        (TEXT | {"3": node("KSampler", **BOTH), "10": CONTROL}, "a cat"),
        (TEXT | {"3": node("KSampler", **CROSSED), "10": SWAPPED}, "a cat"),
        # Strings from other nodes, joined and handed on.
        (graph(["10", 0]) | {"10": JOINED, "11": STRING}, "a cat\non a mat"),
        (graph(["10", 0]) | {"10": node("Reroute", text=["11", 0]), "11": STRING}, "a cat"),
        (TEXT | {"3": node("KSampler", **BOTH), "10": node("Reroute", **{"": ["6", 0]})}, "a cat"),
        (TEXT | {"3": node("KSampler (Efficient)", **CROSSED), "10": node("Loader", positive="x", negative="y")}, "x"),
        # A second sampler of the same text, and of another; two texts for one.
        (TEXT | {"20": node("KSampler", positive=["6", 0])}, "a cat"),
        (TEXT | {"20": node("KSampler", positive=["7", 0])}, None),
        (TEXT | {"20": node("Detailer", positive=["7", 0], latent_image=["3", 0])}, None),
        (TEXT | {"3": node("KSampler", **BOTH), "10": COMBINED}, None),
        # No text there.
        (graph(""), None),
        (graph(["77", 0]), None),
        (TEXT | {"6": node("Unknown", a=["7", 0], b=["7", 0])}, None),
        ({"6": node("CLIPTextEncode", text="a cat", clip=["4", 1])}, None),
        # Loops, and what no program writes.
        ({"1": node("KSampler", positive=["2", 0]), "2": node("Reroute", a=["2", 0])}, None),
        (graph(["10", 0]) | {"10": node("A", text=["11", 0]), "11": node("A", text=["10", 0])}, None),
        ({"1": node("KSampler", positive=["100", 0])} | LONG | {"5000": node("Encode", text="a cat")}, "a cat"),
        ({"1": 3, "2": {"inputs": [1]}, "3": {"class_type": [], "inputs": {"positive": [{}, 0]}}}, None),
        ({"1": node("KSampler", positive=[{}, 0], guider=[[], []])}, None),
        ({"1": node("KSampler", positive=[True, True], guider=None)}, None),
        ([], None),
        (3, None),
        (None, None),
    ],
)
def test_the_prompt_of_a_graph(nodes, prompt):
    assert comfyui_prompt(json.dumps(nodes)) == prompt


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "[" * 2_000_000,
        '{"1":' * 500_000,
        # Every sampler leads to every link of one node.
        json.dumps(
            {str(n): node("KSampler", positive=["x", n]) for n in range(20_000)}
            | {"x": {"inputs": {f"cond{n}": ["x", n] for n in range(50_000)}}}
        ),
        json.dumps(
            {str(n): node("KSampler", positive=[f"e{n}", 0]) for n in range(9_000)}
            | {f"e{n}": node("Encode", text=["x", 0]) for n in range(9_000)}
            | {"x": {"inputs": {f"text{n}": f"{n}" for n in range(50_000)}}}
        ),
    ],
    ids=["nothing", "words", "deep list", "deep object", "many links", "many strings"],
)
def test_no_graph_takes_long(text):
    before = time.perf_counter()
    assert comfyui_prompt(text) is None
    assert time.perf_counter() - before < 5


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a cat\nNegative prompt: a dog\nSteps: 20, Sampler: Euler, Seed: 1", "a cat"),
        ("a cat\nin two lines\nSteps: 20, Sampler: Euler", "a cat\nin two lines"),
        ("a cat", "a cat"),
        ("Steps: to heaven\nNegative prompt: x", "Steps: to heaven"),
        ("Negative prompt: a dog\nSteps: 20", None),
        ("Steps: 20, Seed: 3", None),
        ("", None),
    ],
)
def test_the_prompt_of_parameters(text, prompt):
    assert a1111_prompt(text) == prompt


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"tEXt", b"parameters\0caf\xe9"),
        chunk(b"tEXt", b"parameters\0caf\xc3\xa9"),
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"caf\xe9")),
        chunk(b"iTXt", b"parameters\0\0\0en\0key\0caf\xc3\xa9"),
        chunk(b"iTXt", b"parameters\0\1\0en\0key\0" + zlib.compress(b"caf\xc3\xa9")),
    ],
)
def test_all_kinds_of_texts_in_a_png(tmp_path, text):
    for data in (png(16, 1, text), png(16, 1).replace(chunk(b"IEND"), text + chunk(b"IEND"))):
        (tmp_path / "a.png").write_bytes(data)
        assert inspect(tmp_path / "a.png").texts == {"parameters": "café"}


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a café".encode("utf-16-be"),
        b"UNICODE\0" + "a café".encode("utf-16-le"),
        b"\0" * 8 + "a café".encode(),
    ],
)
def test_prompts_in_exif(tmp_path, suffix, comment):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    exif[0x110] = 'prompt:{"3": 1}'
    Image.new("RGB", (16, 16)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert inspect(tmp_path / f"a.{suffix}").texts == {"parameters": "a café", "prompt": '{"3": 1}'}

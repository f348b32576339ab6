"""Build the data set: open emoji artwork from npm packages, drawn at 64 x 64 pixels on white.

Needs npm, and the packages of `pip install -e ".[train]"`. Downloads 30 MB into `OUT/npm`, where a second run
finds them; rendering takes about two minutes on one CPU core.

    python training/dataset.py --out data

`OUT/emoji64.npz` has `images` `[N, 64, 64, 3]` uint8 and, row by row, the strings `hexcode` (code points in
hex, joined by `-`), `label`, `tags` (joined by `|`), `group`, `subgroup` (Unicode's), `style` and `icon` (the
name in its package). Skin tones and country flags are left out. Authors and licences: THIRD_PARTY.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from variegate.files import replacing

SIZE = 64
SUPERSAMPLING = 2  # drawn directly at 64 pixels, stacked gradients show their seams

# MIT, Apache-2.0 and CC-BY-4.0 only. Share-alike sets (openmoji, emojione-v1) are left out on purpose.
ARTWORK = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "silhouette": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "emojione": "@iconify-json/emojione@1.2.3",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
}
METADATA = "emojibase-data@17.0.0"
SHORTCODES = ("emojibase", "emojibase-legacy", "iamcal", "joypixels")
SKIPPED_SUBGROUPS = {"country-flag", "subdivision-flag", "skin-tone", "hair-style"}

# Icons whose name or code misleads, found by looking at labelled sheets: the emoji shown, or None to drop it.
CORRECTIONS = {
    "fxemoji/cat": "1F431",  # fxemoji's animals of plain name are faces
    "fxemoji/dog": "1F436",
    "fxemoji/mouse": "1F42D",
    "fxemoji/pig": "1F437",
    "fxemoji/tiger": "1F42F",
    "fxemoji/bow": "1F380",  # the ribbon
    "fxemoji/kiss": "1F618",
    "fxemoji/couple": "1F491",
    "fxemoji/pout": "1F64E",
    "fxemoji/pouting": "1F621",
    "fxemoji/wave": "1F30A",  # of water
    "fxemoji/sunglasses": "1F60E",
    "fxemoji/up": "1F446",
    "fxemoji/down": "1F447",
    "twemoji/man-in-suit-levitating": "1F574",  # its own code is no emoji of Unicode's list
    "fxemoji/tramcar": None,  # renders as a black box
    "fxemoji/fog": None,  # almost blank
    "blob/asterisk": None,  # blank
    "streamline/turkey": None,  # the countries' flags
    "streamline/japan": None,
    "blob/pistol": None,  # real guns; the emoji of that name is now a water pistol
    "fxemoji/pistol": None,
    "emojione/pistol": None,
    "streamline/pistol": None,
}


class Emoji(NamedTuple):
    """What Unicode says about one emoji; `tags` are joined by `|`."""

    label: str
    tags: str
    group: str
    subgroup: str


class Icon(NamedTuple):
    """One row of the data set; `svg` has Iconify's `body`, `left`, `top`, `width` and `height`."""

    style: str
    icon: str
    hexcode: str
    svg: Mapping[str, Any]


def fetch(package: str, cache: Path) -> Path:
    """The tarball of npm's `name@version`, downloaded unless `cache` has it."""
    archive = cache / (re.sub("[/@]", "-", package.lstrip("@")) + ".tgz")
    if not archive.exists():
        # A killed download must not leave half a tarball under the final name.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            os.replace(Path(folder, archive.name), archive)
    return archive


def read(archive: Path, *names: str) -> list[Any]:
    """The JSON files of a package, in the order asked for."""
    with tarfile.open(archive) as tar:
        return [json.load(file) for name in names if (file := tar.extractfile(f"package/{name}"))]


def normal_hexcode(codes: str) -> str:
    """Code points in hex as upper case joined by `-`, without the variation selector."""
    points = (point.upper().zfill(4) for point in re.split("[-_ ]", codes))
    return "-".join(point for point in points if point != "FE0F")


def squash(name: str) -> str:
    """A name with nothing but its letters and digits, `*` and `#`, so that spellings compare equal."""
    letters = unicodedata.normalize("NFD", name).lower().replace("&", "and")  # accents become characters
    return re.sub("[^a-z0-9*#]", "", letters)


def emoji_table(data: Iterable[Mapping[str, Any]], groups: Mapping[str, Any]) -> dict[str, Emoji]:
    """Hexcode to emoji, from emojibase's `data.json` and `groups.json`."""
    table = {}
    for entry in data:
        if "group" not in entry:  # the letters that country flags are spelled with
            continue
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        if subgroup not in SKIPPED_SUBGROUPS:
            group = groups["groups"][str(entry["group"])]
            tags = "|".join(entry.get("tags", []))
            table[normal_hexcode(entry["hexcode"])] = Emoji(entry["label"], tags, group, subgroup)
    return table


def code_table(chars: Mapping[str, str], emoji: Mapping[str, Emoji]) -> dict[str, str]:
    """Icon name to hexcode, from a package's `chars.json`; empty for packages without code points."""
    table: dict[str, str] = {}
    for codes, icon in chars.items():
        if normal_hexcode(codes) in emoji:
            table.setdefault(icon, normal_hexcode(codes))
    return table


def name_table(
    emoji: Mapping[str, Emoji],
    coded: Iterable[tuple[Mapping[str, str], Mapping[str, Mapping[str, Any]]]],
    shortcodes: Iterable[Mapping[str, str | list[str]]],
) -> dict[str, str]:
    """Squashed name to hexcode; where names clash, the more recent kind of name wins.

    Args:
        emoji: the table by hexcode.
        coded: code table and aliases of every package that has code points: their names are today's, their
            aliases yesterday's.
        shortcodes: hexcode to one or several names.

    Returns:
        Today's names, then those of the coded packages, Unicode's character names, and the shortcodes.
    """
    pairs = [(entry.label, code) for code, entry in emoji.items()]
    for codes, aliases in coded:
        pairs += codes.items()
        pairs += [(alias, codes[of["parent"]]) for alias, of in aliases.items() if of["parent"] in codes]
    pairs += [(unicodedata.name(chr(int(code, 16)), ""), code) for code in emoji if "-" not in code]
    for table in shortcodes:
        for code, listed in table.items():
            names = [listed] if isinstance(listed, str) else listed
            pairs += [(name, normal_hexcode(code)) for name in names]
    result: dict[str, str] = {}
    for name, code in pairs:
        if code in emoji:
            result.setdefault(squash(name), code)
    return result


def match(style: str, icons: Iterable[str], codes: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Icon name to hexcode, for the icons of one package that show a known emoji.

    A package with code points is believed. In the others the name decides, and `bear-2` is one more `bear`.
    """
    found = {}
    for icon in icons:
        if f"{style}/{icon}" in CORRECTIONS:
            code = CORRECTIONS[f"{style}/{icon}"]
        elif codes:
            code = codes.get(icon)
        else:
            code = names.get(squash(icon)) or names.get(squash(re.sub(r"-\d$", "", icon)))
        if code:
            found[icon] = code
    return found


def icons(archives: Mapping[str, Path]) -> tuple[list[Icon], dict[str, Emoji]]:
    """The matched icons, in the order of `ARTWORK`, and the emoji by hexcode."""
    shortcode_files = [f"en/shortcodes/{name}.json" for name in SHORTCODES]
    data, groups, *shortcodes = read(archives[METADATA], "en/data.json", "meta/groups.json", *shortcode_files)
    emoji = emoji_table(data, groups)
    sets, codes = {}, {}
    for style, package in ARTWORK.items():
        sets[style], chars = read(archives[package], "icons.json", "chars.json")
        codes[style] = code_table(chars, emoji)
    names = name_table(emoji, [(codes[s], sets[s]["aliases"]) for s in ARTWORK if codes[s]], shortcodes)
    codes["fluent"] = codes["fluent-flat"]  # the same icon names; only the flat package has code points

    rows = []
    for style in ARTWORK:
        drawn = sets[style]["icons"]
        box = {"left": 0, "top": 0, "width": sets[style]["width"], "height": sets[style]["height"]}
        for icon, code in match(style, drawn, codes[style], names).items():
            rows.append(Icon(style, icon, code, {**box, **drawn[icon]}))
    return rows, emoji


def render(icon: Icon) -> np.ndarray:
    """Draw one icon, centred, on white: `[64, 64, 3]` uint8."""
    import resvg_py  # here, so that the matching can be used and tested without it

    box, side = icon.svg, SIZE * SUPERSAMPLING
    width, height = box["width"], box["height"]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box["left"]} {box["top"]} {width} {height}" width="{width}" height="{height}">'
        f"{box['body']}</svg>"
    )
    scale = side / max(width, height)
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=round(width * scale),
        height=round(height * scale),
        background="#ffffff",
        skip_system_fonts=True,
    )
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.reduce(SUPERSAMPLING))


def main() -> None:
    """Download, match, render, write; the last line has the hash of the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of emoji64.npz and of the downloads")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render")
    args = parser.parse_args()
    if shutil.which("npm") is None:
        parser.error("npm is not on the PATH: install Node.js, which brings it")

    cache = args.out / "npm"
    cache.mkdir(parents=True, exist_ok=True)
    packages = [METADATA, *ARTWORK.values()]
    rows, emoji = icons({p: fetch(p, cache) for p in track(packages, description="download")})
    for style, package in ARTWORK.items():
        shown = [row.hexcode for row in rows if row.style == style]
        print(f"{style:12} {len(shown):4} images of {len(set(shown)):4} emoji, {package}")
    with Pool(args.workers) as pool:
        rendered = pool.imap(render, rows, chunksize=16)
        images = np.stack(list(track(rendered, description="render", total=len(rows))))

    columns = {name: np.array([getattr(row, name) for row in rows]) for name in ("hexcode", "style", "icon")}
    columns |= {name: np.array([getattr(emoji[row.hexcode], name) for row in rows]) for name in Emoji._fields}
    path = args.out / "emoji64.npz"
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, images=images, **columns)
    print(f"{path}: {len(images)} images, sha256 {hashlib.sha256(images.data).hexdigest()}")


if __name__ == "__main__":
    main()

"""What programs that make pictures write into them: texts, and the prompt that can be found there.

All of it comes from elsewhere: sizes are bounded, nothing recurses, and what makes no sense is no prompt.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TEXTS = ("variegate", "parameters", "prompt")  # ours, A1111's, ComfyUI's
MOST_TEXT = 1 << 22
MOST_STEPS = 20_000
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_INPUT = re.compile(r"(?!.*neg).*(text|prompt|string|clip_[lg]$|t5xxl|bert|llama|value$)")
CONDITIONING_INPUT = re.compile(r"(cond|guider|positive)")


def read_png(data: memoryview) -> tuple[bytes, dict[str, str]]:
    """A PNG reduced to what is seen of it, every chunk checked, and its texts.

    Pillow overlooks wrong checksums of pixels, and refuses pictures for the size of their texts.
    """
    place, kept, texts, kind = len(SIGNATURE), [data[: len(SIGNATURE)]], {}, b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise ValueError("it is truncated")
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        if end > len(data):
            raise ValueError("it is truncated")
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError("a checksum is wrong")
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            key, text = _text(kind, data[place + 8 : end - 4])
            if key in TEXTS:
                texts[key] = text
        elif kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept), texts


def _text(kind: bytes, chunk: memoryview) -> tuple[str, str]:
    """Keyword and text of a PNG chunk."""
    name, _, rest = chunk[: MOST_TEXT + 1024].tobytes().partition(b"\0")
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    elif kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    if packed:
        try:
            rest = zlib.decompressobj().decompress(rest, MOST_TEXT + 1)
        except zlib.error:
            rest = b""
    if len(rest) > MOST_TEXT:
        rest = b""
    try:
        text = rest.decode()
    except UnicodeDecodeError:
        text = rest.decode("latin-1")
    return name.decode("latin-1"), text


def comment_text(value: bytes) -> str:
    """The text of an EXIF user comment."""
    code, text = value[:8], value[8 : MOST_TEXT * 2]
    if (
        code == b"UNICODE\0"
    ):  # the standard does not say which UTF-16: Latin letters have their zeros in front or behind
        order = "utf-16-be" if text[::2].count(0) >= text[1::2].count(0) else "utf-16-le"
        return text.decode(order, "replace")
    return text.decode("utf-8", "replace").strip("\0")


def a1111_prompt(text: str) -> str | None:
    r"""The prompt in the text that A1111, and we, write as `parameters`; None if there is none.

    Example:
        >>> a1111_prompt("a cat,\nasleep\nNegative prompt: a dog\nSteps: 20, Sampler: Euler, Seed: 1")
        'a cat,\nasleep'
    """
    lines: list[str] = []
    for line in text.strip().splitlines():
        if re.match(r"Negative prompt:|Steps: \d", line):
            break
        lines.append(line.strip())
    return "\n".join(lines).strip() or None


def comfyui_prompt(text: str) -> str | None:
    """The text that leads to the samplers' positive input in a graph that ComfyUI saved as `prompt`.

    Links are followed from the samplers back through whatever combines or changes conditionings, to the nodes that
    encode texts, and from these to nodes that hold or join strings.

    Args:
        text: JSON: nodes by number, each with `class_type` and `inputs`; a link is `[number, output]`.

    Returns:
        None if it is no such graph, has no text there, or more than one.

    Example:
        >>> graph = {
        ...     "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "negative": ["3", 0]}},
        ...     "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 0]}},
        ...     "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurred", "clip": ["4", 0]}},
        ... }
        >>> comfyui_prompt(json.dumps(graph))
        'a cat'
    """
    try:
        nodes = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(nodes, dict):
        return None
    graph, strings, links = dict[str, dict[str, Any]](), dict[str, list[Any]](), list[Any]()
    for number, node in nodes.items():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            inputs = graph[number] = node["inputs"]
            strings[number] = [value for name, value in inputs.items() if TEXT_INPUT.match(name)]
            if "sampler" in str(node.get("class_type")).lower() or "latent_image" in inputs:
                links += [inputs[name] for name in ("positive", "guider") if name in inputs]
    steps = iter(range(MOST_STEPS))  # for the whole graph: far more than any that was drawn by hand
    found, seen = set[str](), set[tuple[str, bool]]()
    while links and next(steps, None) is not None:
        link = links.pop()
        if isinstance(link, str):
            found.add(link.strip())
            continue
        source = _source(link)
        if source not in graph or (source, link[1] == 1) in seen:
            continue
        seen.add((source, link[1] == 1))
        inputs = graph[source]
        if "positive" in inputs:
            # What changes both conditionings hands them on in the same order.
            second = link[1] == 1 and _source(inputs["positive"])
            links.append(inputs.get("negative" if second else "positive"))
        elif strings[source]:
            found.add("\n".join(dict.fromkeys(filter(None, _strings(strings, source, steps)))))
        else:
            every = {name: value for name, value in inputs.items() if _source(value)}
            onward = [value for name, value in every.items() if CONDITIONING_INPUT.match(name)]
            links += onward or (every.values() if len(every) == 1 else ())
    complete = next(steps, None) is not None
    return (found.pop() or None) if complete and len(found) == 1 else None


def _source(link: Any) -> str:
    """Number of the node that a link comes from; empty if it is no link."""
    if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int) and isinstance(link[1], int):
        return str(link[0])
    return ""


def _strings(strings: Mapping[str, Sequence[Any]], number: str, steps: Iterator[int]) -> Iterator[str]:
    """The strings of a node, in the order of its inputs, and in their places those that it takes from others."""
    waiting: list[Any] = [[number, 0]]
    seen = set[str]()
    while waiting and next(steps, None) is not None:
        value = waiting.pop()
        if isinstance(value, str):
            yield value.strip()
        elif (source := _source(value)) in strings and source not in seen:
            seen.add(source)
            waiting += reversed(strings[source])

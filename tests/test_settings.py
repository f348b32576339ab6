"""What methods and requests may be set to: numbers of all kinds taken or refused, in one sentence, when built."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pytest

from tiny import tiny_sd3
from variegate import DAVE, SGI, SPARKE, ContextualRepulsion, Request, TokenIntervention, generate
from variegate.emoji import load_pipeline
from variegate.fields import Range, checked
from variegate.gallery import read_recipe
from variegate.request import METHODS, to_text

if TYPE_CHECKING:
    from nowhere import Unknown

NUMBERS = [
    (method, option.name, option.default)
    for method, cls in METHODS.items()
    if cls is not None
    for option in dataclasses.fields(cls)
    if isinstance(option.default, int | float) and not isinstance(option.default, bool)
]


def refused(method, **parameters):
    """The one sentence that refuses these parameters."""
    with pytest.raises(ValueError, match=r"\A[^\n]*\.\Z") as caught:
        METHODS[method](**parameters)
    return str(caught.value)


@pytest.mark.parametrize(("method", "name", "default"), NUMBERS)
def test_every_number_of_every_method_is_a_finite_number_and_nothing_else(method, name, default):
    for bad in (True, np.True_, math.nan, -math.inf, "1", "a", b"1", 1j, [1], np.ones(2), {}, 10**400):
        assert refused(method, **{name: bad}).startswith(f"{name}=")
    if isinstance(default, int) and name != "start":
        for bad in (2.0, 1.5, np.float32(2), Fraction(3, 2), None):
            assert refused(method, **{name: bad}).startswith(f"{name}=")
    kinds = (np.float64, np.float32) if isinstance(default, float) else (np.int64, np.uint16)
    for kind in kinds:
        taken = getattr(METHODS[method](**{name: kind(default)}), name)
        assert type(taken) is type(default)
        assert taken == pytest.approx(default, rel=1e-6)


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if hasattr(cls, "strength")])
def test_strength_is_at_most_a_thousand(method):
    assert METHODS[method](strength=1000).strength == 1000
    for strength in (1000.1, 1e6, 1e30):
        assert refused(method, strength=strength).endswith("is out of range; use a number from 0 to 1,000.")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"blocks": 1}, "blocks=1 is of type int; use 'all', 'first', 'middle', 'last', a slice or a list of integers"),
        ({"blocks": True}, "blocks=True is of type bool; use 'all'"),
        ({"blocks": [0, 1.5]}, r"blocks=\[0, 1.5\] holds 1.5, which is of type float; use 'all'"),
        ({"blocks": [True]}, r"blocks=\[True\] holds True"),
        ({"blocks": ()}, r"blocks=\(\) is empty"),
        ({"blocks": {0, 1}}, r"blocks=\{0, 1\} is of type set"),
        ({"blocks": range(10**12)}, "is no list of up to 100,000"),
        ({"blocks": slice(0, 4, 0)}, r"blocks=slice\(0, 4, 0\) has a step below 1"),
        ({"blocks": slice(0.5, 4)}, r"blocks=slice\(0.5, 4, None\) has bounds that are no integers"),
        ({"tokens": 3}, "tokens=3 is of type int; use a slice, a list of integers or None"),
        ({"tokens": "some"}, "tokens='some' is of type str"),
        ({"padding": 1}, "padding=1 is of type int; use True or False"),
        ({"objective": "a\udcffb"}, "has bytes that are no text"),
        ({"stop": "0.2"}, "stop='0.2' is of type str; use a step count"),
        ({"strength": 2, "eta": 1e8}, "strength=2 beside eta=100000000.0: each is the step length; give one"),
    ],
)
def test_other_settings_are_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        ContextualRepulsion(**setting)
    assert "\n" not in str(caught.value)


def test_places_become_plain():
    for blocks in ([0, 2], np.array([0, 2]), (np.int8(0), np.int8(2)), range(0, 4, 2)):
        assert ContextualRepulsion(blocks=blocks).blocks == (0, 2)
    assert ContextualRepulsion(blocks=slice(np.int64(1), None)).blocks == slice(1, None)
    assert ContextualRepulsion(order=math.inf).order == math.inf
    assert ContextualRepulsion(padding=np.False_).padding is False
    assert type(SPARKE(strength=Fraction(1, 2)).strength) is float


def test_eta_stands_alone_and_survives_copies():
    paper = ContextualRepulsion.paper("flux-dev", eta=1e8)
    assert replace(paper, inner_steps=3).eta == 1e8
    assert paper.split(4) == paper
    assert replace(ContextualRepulsion(), eta=5.0).eta == 5.0
    assert ContextualRepulsion(strength=2).split(4).strength == 0.5
    parameters = {option.name: to_text(getattr(paper, option.name)) for option in dataclasses.fields(paper)}
    assert Request(("a cat",), parameters=parameters).configured == paper  # as a recipe has it


def test_tokens_that_no_prompt_has_are_told():
    import torch

    tokens = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"tokens=\(4, 5\): the prompt has 5 text tokens, 0 to 4"):
        ContextualRepulsion(tokens=[4, 5]).edit(tokens)
    assert not torch.equal(ContextualRepulsion(tokens=[4, -5]).edit(tokens), tokens)


def test_a_new_method_cannot_forget_a_check():
    @dataclass(frozen=True, kw_only=True)
    class Nearer(TokenIntervention):
        rate: float = 0.5
        count: Annotated[int, Range(2, 4)] = 3
        other: Unknown | None = None
        below: Annotated[float, Range(high=1)] = 0

        def edit(self, tokens):
            return tokens

    thing = object()
    assert Nearer(other=thing).other is thing  # whose annotation is known to type checkers only
    for setting, sentence in (
        ({"rate": "fast"}, "rate='fast' is of type str; use a finite number."),
        ({"count": 5}, "count=5 is out of range; use an integer from 2 to 4."),
        ({"below": 2}, "below=2 is out of range; use a number up to 1."),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the whole sentence is compared
            Nearer(**setting)
        assert str(caught.value) == sentence


class Quiet:
    def __repr__(self):
        raise RuntimeError


def test_a_sentence_is_one_line_of_a_bearable_length():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("a\nb" * 10_000, np.ones((50, 50)), Quiet(), deep, "1" * 5000, Fraction(10**5000)):
        with pytest.raises(ValueError, match=r"^n=") as caught:
            checked("n", value, int)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": 2.0}, "n=2.0 is of type float; use an integer from 1 to 1,024"),
        ({"n": "2"}, "n='2' is of type str"),
        ({"n": True}, "n=True is of type bool"),
        ({"n": 10**9}, "n=1000000000 is out of range"),
        ({"n": None}, "n=None is of type NoneType"),
        ({"steps": 1e9}, "steps=1000000000.0 is of type float; use an integer from 1 to 10,000 or None"),
        ({"steps": 10**9}, "steps=1000000000 is out of range"),
        ({"height": 2**40}, "height=1099511627776 is out of range; use an integer from 1 to 16,384 or None"),
        ({"width": 0}, "width=0 is out of range"),
        ({"guidance": 1e30}, r"guidance=1e\+30 is out of range; use a number from 0 to 1,000 or None"),
        ({"guidance": math.nan}, "guidance=nan is out of range"),
        ({"seed": 1.0}, "seed=1.0 is of type float"),
        ({"seed": 2**62 + 1}, "seed=4611686018427387905 is out of range"),
        ({"prompts": ("a \udcff cat",)}, r"holds 'a \\udcff cat', which has bytes that are no text"),
        ({"prompts": ("a cat", 3)}, r"prompts=\('a cat', 3\) holds 3, which is of type int; use a list of texts"),
        ({"prompts": None}, "prompts=None is of type NoneType"),
        ({"model": 3}, "model=3 is of type int; use text"),
        ({"negative_prompt": "\ud800"}, "negative_prompt='.ud800' has bytes that are no text"),
        ({"compare": 1}, "compare=1 is of type int; use True or False"),
        ({"parameters": [("strength", 1)]}, r"parameters=\[\('strength', 1\)\] is of type list; use a mapping"),
        ({"parameters": {1: 2}}, "1 is no parameter of method"),
        ({"seeds": 4}, "seeds=4 is of type int"),
        ({"seeds": (0, 1.5)}, "holds 1.5"),
        ({"seeds": (3, 3)}, r"seeds=\(3, 3\) hold one twice"),
    ],
)
def test_requests_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        replace(Request(("a cat",), n=2), **change)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_made_and_saved(tmp_path):
    request = Request(
        np.array(["a cat"]),
        n=np.int64(2),
        model="tiny",
        parameters={"strength": np.float32(0.5), "inner_steps": np.int16(3), "blocks": np.arange(2)},
        seeds=np.arange(2) + 5,
        steps=np.uint8(2),
        guidance=np.float64(3),
        height=np.int32(16),
        width=np.int64(16),
        compare=np.True_,
    )
    facts = dataclasses.asdict(request)
    assert json.loads(json.dumps(facts)) == {**facts, "prompts": ["a cat"], "seeds": [5, 6]}
    files = generate(request, pipeline=tiny_sd3()).save(tmp_path)
    recipe = read_recipe(files[2])
    assert (recipe["n"], recipe["seeds"], recipe["guidance"]) == (2, [5, 6], 3.0)
    assert (recipe["parameters"]["strength"], recipe["parameters"]["blocks"]) == (0.5, "0,1")


def test_a_model_may_be_a_path():
    assert Request(("a cat",), model=Path("models") / "mine").model == str(Path("models") / "mine")


# The strongest settings there are.
STRONGEST = {
    "cads": [{"strength": 1000}],
    "cno": [{"strength": 1000, "temperature": 1e-3}],
    "contextual-repulsion": [
        {"strength": 1000, "objective": objective, "blocks": "all", "stop": None}
        for objective in ("vendi", "rke", "log_det", "cosine")
    ],
    "dave": [{"keep": 100}, {"keep": -100}],
    "diverse-flow": [{"strength": 1000, "spread": 1e-3}, {"strength": 1000, "spread": 1000}],
    "feature-self-guidance": [
        {"blend": 1, "learning_rate": 1000, "inner_steps": 1000, "temperature": temperature, "low": 0}
        for temperature in (1e-3, 1000)
    ],
    "particle-guidance": [{"strength": 1000}],
    "pink-noise": [{"exponent": 10}],
    "seed-variance": [{"strength": 1000, "stop": None}],
    "sparke": [{"strength": 1000, "image_width": 1e-3, "text_width": 1e-3}],
    "spell": [{"strength": 1000, "radius": 1000}],
    "stride": [{"strength": 1000, "exponent": 10}],
}


def test_the_strongest_settings_make_pictures():
    """Of finite values, or `generate` would refuse them."""
    unlimited = {"interval-guidance", "sgi", "none"}
    assert {*STRONGEST, *unlimited} == {*METHODS}
    pipe = load_pipeline("emoji-base")
    for method, settings in STRONGEST.items():
        for parameters in settings:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of methods that change nothing at all, at that
                request = Request(("an animal",), n=2, steps=2, compare=False, method=method, parameters=parameters)
                assert len(generate(request, pipeline=pipe).groups[0].diverse.images) == 2


def test_the_bounds_are_those_of_the_table():
    """Nothing in the table above could be any stronger."""
    for method, parameters in (
        ("dave", {"keep": 101}),
        ("pink-noise", {"exponent": 10.1}),
        ("spell", {"radius": 1001}),
        ("feature-self-guidance", {"temperature": 1e-4}),
        ("cno", {"temperature": 1e-4}),
    ):
        refused(method, **parameters)
    assert DAVE(keep=np.float32(0.5)) == DAVE(keep=0.5)
    assert SGI(candidates=np.int64(6)) == SGI(candidates=6)

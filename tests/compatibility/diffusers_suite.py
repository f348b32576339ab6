"""The fast tests of diffusers' own pipelines, plain and with an attachment of strength 0 around every call.

DIFFUSERS_CHECKOUT=path/to/diffusers python tests/compatibility/diffusers_suite.py [TEST FOLDER ...]

The tests bring the library of their checkout, and need what it needs: httpx, parameterized, requests_mock, torchvision.
What they would take from the hub, tiny tokenizers, is made here, so that those with stored numbers fail, plain as well.
What counts is that attached the same ones pass. Exit code 1 if not.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FOLDERS = ("tests/pipelines/stable_diffusion_3", "tests/pipelines/flux", "tests/pipelines/qwenimage")
ATTACHED = "VARIEGATE_ATTACHED_CALLS"  # file that an attached run counts its calls in; unset, it is plain


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: nothing comes from a hub, and every call of a pipeline of diffusers gets an attachment."""
    stand_in()
    if ATTACHED not in os.environ:
        return
    import diffusers

    from variegate import ContextualRepulsion, attach

    def attached(call: Any) -> Any:
        @functools.wraps(call)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(type(self), "listeners_of_variegate"):  # the pipeline's own call, within that of the attachment
                return call(self, *args, **kwargs)
            with attach(self, ContextualRepulsion(strength=0)):
                with open(os.environ[ATTACHED], "a") as file:
                    file.write(".")
                return self(*args, **kwargs)

        return wrapper

    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        ours = name.startswith(("StableDiffusion3", "Flux", "QwenImage")) and "__call__" in vars(cls)
        if ours and not name.endswith("PriorReduxPipeline"):  # that has no denoiser
            cls.__call__ = attached(cls.__call__)


def stand_in() -> None:
    """Tokenizers of a token a letter in the place of tiny ones on the hub."""
    import transformers

    letters = [*map(chr, range(33, 127)), "\u0120"]
    ends = [f"{letter}</w>" for letter in letters]
    clip = {token: i for i, token in enumerate([*letters, *ends, "<|startoftext|>", "<|endoftext|>"])}
    made = {
        "tiny-random-clip": lambda: transformers.CLIPTokenizer(vocab=clip, merges=[], model_max_length=77),
        "tiny-random-t5": lambda: transformers.T5Tokenizer(
            vocab=[(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "\u2581", *letters)], extra_ids=0
        ),
        "tiny-random-Qwen2VLForConditionalGeneration": lambda: transformers.Qwen2Tokenizer(
            vocab={token: i for i, token in enumerate(("<|endoftext|>", *letters))}, merges=[]
        ),
    }

    def replacing(load: Any) -> Any:
        def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
            make = made.get(str(name).removeprefix("hf-internal-testing/"))
            return make() if make else load(name, *args, **kwargs)

        return staticmethod(from_pretrained)

    for cls in ("AutoTokenizer", "CLIPTokenizer", "Qwen2Tokenizer"):
        getattr(transformers, cls).from_pretrained = replacing(getattr(transformers, cls).from_pretrained)
    load = transformers.AutoConfig.from_pretrained
    tiny = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
    transformers.AutoConfig.from_pretrained = staticmethod(
        lambda name, *args, **kwargs: (
            transformers.T5Config(**tiny) if str(name).endswith("tiny-random-t5") else load(name, *args, **kwargs)
        )
    )


def outcomes(checkout: Path, folders: list[str], calls: Path | None) -> dict[str, str]:
    """Test to "passed", "failed" or "skipped"."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    environment |= {ATTACHED: str(calls)} if calls else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "diffusers_suite", f"--junitxml={report}", "-p", "no:cacheprovider"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *folders], cwd=checkout, env=environment, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        return {
            f"{case.get('classname')}.{case.get('name')}": next(
                (kinds[x.tag] for x in case if x.tag in kinds), "passed"
            )
            for case in cases
        }


def main() -> None:
    """Run both and compare."""
    if "DIFFUSERS_CHECKOUT" not in os.environ:
        sys.exit("DIFFUSERS_CHECKOUT is not set; give it the folder of a checkout of diffusers.")
    checkout = Path(os.environ["DIFFUSERS_CHECKOUT"]).resolve()
    folders = sys.argv[1:] or list(FOLDERS)
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder, "calls")
        plain, attached = outcomes(checkout, folders, None), outcomes(checkout, folders, calls)
        count = len(calls.read_text()) if calls.exists() else 0
    passed = [sum(found == "passed" for found in outcome.values()) for outcome in (plain, attached)]
    different = [name for name in plain | attached if plain.get(name) != attached.get(name)]
    for name in different:
        print(f"{name}: {plain.get(name)} plain, {attached.get(name)} attached")
    print(f"{passed[0]} of {len(plain)} tests passed plain, {passed[1]} attached, in {count} attached calls")
    sys.exit(bool(different) or not count)


if __name__ == "__main__":
    main()

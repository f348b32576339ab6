"""The command line: options in, a `Request` to the engine, a table and files out."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from variegate import __version__
from variegate.bench.cli import bench
from variegate.terminal import plain_errors, progress

if TYPE_CHECKING:
    from variegate.gallery import Gallery

app = typer.Typer(
    help="Ask a text-to-image model for eight pictures and get eight different ones.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app()


class _Documented(TyperCommand):
    """Shows, as defaults of options that are passed on only if given, those of the classes that get them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Look the defaults up; importing the classes takes too long for anything but help."""
        from variegate.request import METHODS, Request

        classes: list[Any] = [Request, METHODS[Request(("any",)).method]]
        defaults = {option.name: option.default for cls in classes for option in dataclasses.fields(cls)}
        for parameter in self.params:
            if parameter.default is None and isinstance(defaults.get(str(parameter.name)), str | int | float):
                parameter.default = defaults[str(parameter.name)]
        super().format_help(ctx, formatter)


def _place(text: str) -> int | float | None:
    """A step count such as 4, or a fraction of the steps such as 0.2."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a step count nor a fraction of the steps.") from None


def _pair(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE; numbers and true, false and null as in JSON, anything else as it is."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not of the form NAME=VALUE.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


OUTPUT = Path("variegate-out")
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures; made if needed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the gallery that the folder holds.")]


@app.callback(invoke_without_command=True)
def _variegate(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"variegate {__version__}")
        raise typer.Exit


@app.command(cls=_Documented)
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", show_default=False)],
    n: Annotated[int | None, typer.Option("-n", help="Pictures per prompt.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundled model, pipeline folder or hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="Diversity method, or none; see variegate methods.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How hard pictures are pushed apart: 0 (off) to 1,000.")
    ] = None,
    start: Annotated[Any, typer.Option(parser=_place, metavar="STEP", help="First step to push in: 4, or 0.2.")] = None,
    stop: Annotated[Any, typer.Option(parser=_place, metavar="STEP", help="End of the pushing: 4, or 0.2.")] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Where to push: all, first, middle, last (third), 0,2,5 or 3:6.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="What to push: context, attention, image or cross_attention tokens.")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Any other of the method.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; the next has the next.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the pictures should not show.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the model's")] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Also make the stock pipeline's pictures.")
    ] = True,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    offload: Annotated[
        str | None, typer.Option(help="Weights to keep off the accelerator: none, model or sequential.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    output: Output = OUTPUT,
    overwrite: Overwrite = False,
) -> None:
    """Make n different pictures of each prompt, beside the stock pipeline's."""
    options = {
        "n": n, "model": model, "method": method, "seed": seed, "steps": steps, "guidance": guidance,
        "negative_prompt": negative_prompt, "height": height, "width": width, "compare": compare,
        "dtype": dtype, "device": device, "offload": offload, "revision": revision,
    }  # fmt: skip
    parameters = _given({"strength": strength, "start": start, "stop": stop, "blocks": blocks, "site": site})
    with plain_errors():
        from variegate.folder import TakenError
        from variegate.gallery import check_output
        from variegate.request import Request

        for name, value in map(_pair, parameter or ()):
            if name in parameters:
                raise ValueError(f"{name} is given twice; give it once.")
            parameters[name] = value
        request = Request(tuple(prompts), parameters=parameters, **_given(options))
        check_output(output, request.prompts, overwrite=overwrite)
        with progress(f"loading {request.model}") as report:
            from variegate.generation import generate as run

            gallery = run(request, progress=report)
        try:
            files = gallery.save(output, overwrite=overwrite)
        except TakenError as error:  # by another run, meanwhile; what is made is not to be lost
            output = Path(tempfile.mkdtemp(prefix=f"{output.name}-", dir=output.parent))
            typer.echo(f"Warning: {error} The pictures are elsewhere.", err=True)
            files = gallery.save(output)
    _print_table(gallery)
    Console(soft_wrap=True).print(
        f"{len(files) - 2} pictures, sheet.png and run.json are in {escape(str(output))}", highlight=False
    )


@app.command()
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG that variegate made.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="Where its model is now: bundled, folder or hub id.", show_default="as it says, if bundled"),
    ] = None,
    trust_recipe: Annotated[
        bool, typer.Option("--trust-recipe", help="Also load the model of the hub that the file names.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.", show_default="as it was made")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the picture and its group.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a picture again, with its whole group, and say whether it is identical (exit code 1 if not)."""
    with plain_errors():
        if output is not None:
            from variegate.gallery import check_output

            check_output(output, overwrite=overwrite)
        with progress("loading") as report:
            from variegate.generation import replay as run

            again = run(image, model=model, device=device, progress=report, trust_recipe=trust_recipe)
        if output is not None:
            again.gallery.save(output, overwrite=overwrite)
    typer.echo(f"{image.name} is {again.report}.")
    if output is not None:
        typer.echo(f"The group is in {output}")
    raise typer.Exit(int(again.difference > 0))


@app.command()
def models() -> None:
    """List the bundled models: pipeline class, size, steps, guidance, licence of the artwork they learnt from."""
    from variegate.emoji.models import LICENCES, bundled_models, describe

    table = Table("model", "pipeline", "size", "steps", "guidance", box=None)
    for name in bundled_models():
        model = describe(name)
        size = f"{model.parameters / 1e6:.1f} M, {model.bytes / 1e6:.0f} MB"
        table.add_row(name, model.pipeline, size, str(model.steps), model.guidance)
    Console().print(table)
    typer.echo(f"They learnt from artwork under {LICENCES}; authors: THIRD_PARTY.md.")


@app.command(cls=_Documented)
def diagnose(
    prompt: Annotated[str, typer.Argument(show_default=False)],
    n: Annotated[int | None, typer.Option("-n", help="Pictures, 2 to 16.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundled model, pipeline folder or hub id.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; the next has the next.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the sheet.")] = Path("diagnosis.png"),
) -> None:
    """Is a model typical on a prompt? Its pictures beside those of prompts that have nothing in common."""
    options = {"n": n, "model": model, "seed": seed, "steps": steps, "guidance": guidance, "device": device}
    with plain_errors():
        from variegate.files import replacing
        from variegate.gallery import check_picture
        from variegate.request import Request

        request = Request((prompt,), method="none", **_given(options))
        kind = check_picture(output)
        with progress(f"loading {request.model}") as report:
            from variegate.diagnosis import diagnose as run

            found = run(request, progress=report)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            found.gallery.sheet().save(temporary, kind)
    own, others = (group.rows[0].vendi for group in found.gallery.groups)
    typer.echo(
        f"{request.n} pictures of {prompt!r} are as varied as {own:.2f} distinct ones, of independent prompts as "
        f"{others:.2f}: {found.typicality:.0%} typical. The most typical picture comes first in {output}"
    )


@app.command()
def score(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", show_default=False)],
    reference: Annotated[Path | None, typer.Option(help="Folder of images to measure the distance to.")] = None,
    extractor: Annotated[
        str, typer.Option(help="Network that sees the images: efficientnet-lite0, dinov2 or clip.")
    ] = "efficientnet-lite0",
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the dinov2 or clip network.")] = None,
    device: Annotated[str, typer.Option(help="Where the networks run: cpu, cuda or mps.")] = "cpu",
    ms_ssim: Annotated[bool, typer.Option("--ms-ssim", help="Also measure structural similarity.")] = False,
    lpips: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also measure LPIPS: timm/vgg16.tv_in1k, or a folder of it.")
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Path below the folder with fields, as {seed}/gen_{prompt}.png: files that agree in all but seed, n "
            "and index are a group.",
            show_default="by recipe, else the prompt in the file, else subfolder",
        ),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be read.")] = False,
    compare: Annotated[Path | None, typer.Option(help="An earlier --json file: show ratios to its numbers.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers.")] = None,
) -> None:
    """Measure the diversity of folders of images, within each prompt, and the distance to a reference."""
    with plain_errors():
        from variegate import metrics
        from variegate.gallery import check_writable
        from variegate.grouping import shown
        from variegate.scoring import earlier, save
        from variegate.scoring import score as measure

        if json_file is not None:
            check_writable(json_file.parent, json_file.name or ".")
        if compare is not None:
            earlier((), compare)  # can it be read?
        eyes = metrics.extractor(extractor, model=model, device=device)
        network = None if lpips is None else metrics.LPIPS(lpips, device=device)
        scores = measure(folders, reference, eyes, ms_ssim=ms_ssim, lpips=network, group_by=group_by, skip_bad=skip_bad)
        before = [None] * len(scores) if compare is None else earlier(scores, compare)
        if json_file is not None:
            save(scores, json_file)
    console = Console()
    console.print(_score_table(scores, before, {
        "images": "images", "groups": "groups", "vendi": "Vendi", "pair_vendi": "Vendi of 2",
        "distance": "mean distance", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "clip_score": "CLIPScore",
    }))  # fmt: skip
    if reference is not None:
        console.print(_score_table(scores, before, {
            "kid": "KID", "fid": "FID", "precision": "precision", "recall": "recall", "density": "density",
            "coverage": "coverage",
        }))  # fmt: skip
        if all(found.fid is None for found in scores):
            console.print("No FID: it takes more images, and more of the reference, than a feature has values.")
    for found in scores:
        typer.echo(f"Groups of {shown(found.name, 200)}: {found.grouping}.")
    typer.echo(f"Features: {scores[0].features}.")


def _score_table(scores: Sequence[Any], before: Sequence[Any], columns: dict[str, str]) -> Table:
    """Measures, without those that none has, and their ratios to earlier ones above 0 (KID can be below)."""
    from variegate.grouping import shown

    columns = {name: title for name, title in columns.items() if any(getattr(s, name) is not None for s in scores)}
    table = Table("folder", *columns.values())
    for found, then in zip(scores, before, strict=True):
        cells = []
        for name in columns:
            value, old = getattr(found, name), getattr(then, name, None)
            text = "-" if value is None else f"{value:.4g}"
            comparable = isinstance(value, float) and old is not None and old > 0
            cells.append(f"{text} ({value / old:.2f}x)" if comparable else text)
        table.add_row(escape(shown(found.name, 200)), *cells)
    return table


@app.command()
def methods() -> None:
    """List the diversity methods, their parameters and defaults."""
    from variegate.request import METHODS, to_text

    for name, cls in METHODS.items():
        if cls is not None:
            typer.echo(f"{name}: {(cls.__doc__ or '').splitlines()[0]}")
            for option in dataclasses.fields(cls):
                typer.echo(f"    {option.name}={to_text(option.default)}")


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Bundled model, pipeline folder or hub id.", show_default=False)],
    site: Annotated[
        str | None, typer.Option(help="context, attention, image or cross_attention.", show_default="the first it has")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Any prompt.")] = "an animal",
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.", show_default="auto")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Check on one denoising step that what is known of a model's tokens is right (exit code 1 if not)."""
    with plain_errors(), progress(f"loading {model}"):
        from variegate.attachment import denoisers_of
        from variegate.check import capture_call, check_layout
        from variegate.emoji.models import call_defaults, load_pipeline

        pipe = load_pipeline(model, device=device or "auto", revision=revision)
        report = check_layout(denoisers_of(pipe)[0], capture_call(pipe, prompt, **call_defaults(model)), site)
    typer.echo(str(report))
    raise typer.Exit(int(not report.passed))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_table(gallery: Gallery) -> None:
    table = Table("prompt", "pictures", "Vendi", "mean distance")
    for group in gallery.groups:
        for row in group.rows:
            name = "stock pipeline" if row.method == "none" else row.method
            numbers = ["-" if value is None else f"{value:.3f}" for value in (row.vendi, row.distance)]
            table.add_row(escape(group.prompt) if row is group.rows[0] else "", name, *numbers)
    Console().print(table)

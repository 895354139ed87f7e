"""``edgewarden-convert``: makes bundles and looks into them. Translates arguments and results; decides nothing."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.text import Text

    from converters.inspection import inspect
    from converters.pack import Order, Packed, pack, write_file, write_folder
except ModuleNotFoundError as missing:  # an installation without this program's extra
    sys.exit(f"edgewarden-convert needs {missing.name}: pip install 'edgewarden[converters]'")

import msgspec

from converters.refusal import Refused
from protocol import __version__
from protocol.manifest import Calibrator, Manifest, Preprocess, Reference, Resize, TensorSpec
from protocol.metrics import proportion

BAD_INPUT = 2

EXIT_CODES = "Exit codes: 0 done, 2 what was given is not acceptable (the message names the file and the field)."

program = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make bundles and look into them.", epilog=EXIT_CODES
)


class PackedReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``pack --json`` prints."""

    folder: str
    bundle: str | None
    samples: int
    agreeing: int  # samples on which all runtimes agree within the tolerance
    worst_difference: float  # in the output's own units
    absent_classes: tuple[str, ...]
    manifest: Manifest


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"edgewarden-convert {__version__}")
        raise typer.Exit


@program.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make bundles and look into them."""


@program.command("pack")
def pack_command(
    model: Annotated[Path, typer.Argument(help="Quantised model, .tflite.")],
    *,
    samples: Annotated[Path, typer.Option(help=".npz with x (real-valued inputs) and y (true classes).")],
    classes: Annotated[Path, typer.Option(help="Text file, one class name a line.")],
    name: Annotated[str, typer.Option("--model", help="Name of the model in the fleet, such as digits.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to write.")],
    title: Annotated[str, typer.Option(help="Name for people.")] = "",
    variant: Annotated[str, typer.Option(help="Which quantisation this is.")] = "int8",
    bundle: Annotated[Path | None, typer.Option(help="Write this .ewb file too.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Allowed golden difference, in the output's own units (int8: steps)."),
    ] = None,
    device_class: Annotated[list[str] | None, typer.Option(help="Device class it may run on; repeat. Any.")] = None,
    lineage: Annotated[list[str] | None, typer.Option(help="KEY=VALUE about how it was made; repeat.")] = None,
    picture_mean: Annotated[
        list[float] | None,
        typer.Option(
            help="The model takes pictures: real = (pixel - MEAN) * SCALE, pixel in 0…255. Repeat per channel."
        ),
    ] = None,
    picture_scale: Annotated[list[float] | None, typer.Option(help="SCALE of the same; repeat per channel.")] = None,
    picture_resize: Annotated[Resize, typer.Option(help="How a picture of another shape fits.")] = Resize.STRETCH,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a quantised model on every installed runtime and pack it as a bundle."""
    try:
        order = Order(
            model=model,
            samples=samples,
            classes=classes,
            name=name,
            title=title,
            variant=variant,
            device_classes=tuple(device_class or ()),
            tolerance=tolerance,
            lineage=_pairs(lineage or []),
            pictures=_pictures(picture_mean or [], picture_scale or [], picture_resize),
        )
        packed = pack(order)
        write_folder(packed, output)
        if bundle is not None:
            write_file(packed, bundle)
    except (Refused, OSError) as error:
        _refuse(error)
    _print_packed(packed, output, bundle, as_json=as_json)


@program.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Bundle file (.ewb) or bundle folder.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Check every member of a bundle against its manifest, and show what the manifest says."""
    try:
        manifest = inspect(path)
    except (Refused, OSError) as error:
        _refuse(error)
    if as_json:
        _print_json(manifest)
    else:
        _print_manifest(Console(), manifest)


def main() -> None:
    """Console entry point."""
    program()


def _pairs(words: list[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise Refused(f"--lineage {word!r}: KEY=VALUE is expected")
    return dict(word.split("=", 1) for word in words)


def _pictures(mean: list[float], scale: list[float], resize: Resize) -> Preprocess | None:
    if not mean and not scale:
        return None
    if not mean or not scale:
        raise Refused("--picture-mean and --picture-scale are given together, or neither is")
    return Preprocess(mean=tuple(mean), scale=tuple(scale), resize=resize)


def _refuse(error: Exception) -> NoReturn:
    Console(stderr=True).print(
        f"edgewarden-convert: {error}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    raise typer.Exit(BAD_INPUT) from error


def _print_packed(packed: Packed, folder: Path, bundle: Path | None, *, as_json: bool) -> None:
    if as_json:
        _print_json(
            PackedReport(
                folder=str(folder),
                bundle=str(bundle) if bundle else None,
                samples=packed.agreement.samples,
                agreeing=len(packed.agreement.agreeing),
                worst_difference=packed.agreement.worst,
                absent_classes=packed.absent_classes,
                manifest=packed.manifest,
            )
        )
        return
    console = Console()
    _print_manifest(console, packed.manifest)
    console.print(_agreement(packed), soft_wrap=True)
    if packed.absent_classes:
        console.print(f"No sample shows: {', '.join(packed.absent_classes)}.", style="yellow", markup=False)
    console.print(f"Wrote {folder}{f' and {bundle}' if bundle else ''}.", markup=False, soft_wrap=True)


def _agreement(packed: Packed) -> str:
    runtimes = [runtime.value for runtime in packed.manifest.needs.runtimes]
    if len(runtimes) == 1:
        return f"Ran on {runtimes[0]} only: install the other runtime too, to be sure of devices that have that one."
    found = packed.agreement
    return (
        f"Ran on {' and '.join(runtimes)}: {len(found.agreeing)} of {found.samples} samples agree within the "
        f"tolerance, the largest difference is {found.worst:g}."
    )


def _print_json(value: msgspec.Struct) -> None:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    sys.stdout.write(text + "\n")


def _print_manifest(console: Console, manifest: Manifest) -> None:
    for field, value in _rows(manifest):
        console.print(Text.assemble((f"{field:<12}", "bold"), value), soft_wrap=True)


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    needs, golden = manifest.needs, manifest.golden
    classes = ", ".join(needs.device_classes) or "any device class"
    return [
        ("model", f"{manifest.model} {manifest.version or '(not published)'} {manifest.variant}"),
        ("title", manifest.title or "-"),
        ("task", manifest.task.value),
        *(("input", _tensor(spec)) for spec in manifest.inputs),
        *(("output", _tensor(spec)) for spec in manifest.outputs),
        ("classes", f"{len(manifest.classes)}: {', '.join(manifest.classes[:12])}"),
        ("needs", f"{needs.memory // 1024} KiB, {' or '.join(r.value for r in needs.runtimes)}, {classes}"),
        ("golden", f"{golden.samples} samples, tolerance {golden.tolerance:g}"),
        ("reference", _accuracy(manifest.reference)),
        ("calibrator", _calibrator(manifest.calibrator)),
        *([] if manifest.preprocess is msgspec.UNSET else [("pictures", _preprocess(manifest.preprocess))]),
        *(("member", f"{name} {digest}") for name, digest in sorted(manifest.members.items())),
        *(("lineage", f"{key} = {value}") for key, value in sorted(manifest.lineage.items())),
    ]


def _tensor(spec: TensorSpec) -> str:
    shape = "x".join(str(size) for size in spec.shape)
    quantisation = "" if spec.scale is None else f", scale {spec.scale:g}, zero point {spec.zero_point}"
    return f"{spec.name} {spec.dtype} {shape}{quantisation}"


def _preprocess(preprocess: Preprocess) -> str:
    pairs = zip(preprocess.mean, preprocess.scale, strict=True)
    channels = ", ".join(f"(pixel - {mean:g}) * {scale:g}" for mean, scale in pairs)
    return f"{channels}, {preprocess.resize.value}"


def _accuracy(reference: Reference | None) -> str:
    if reference is None:
        return "n/a"
    share = proportion(reference.right, reference.samples)
    if share.value is None or share.low is None or share.high is None:
        return "n/a"
    return f"accuracy {share.value:.1%} ({share.low:.1%} to {share.high:.1%}), n = {share.n}"


def _calibrator(calibrator: Calibrator | None) -> str:
    return "n/a" if calibrator is None else f"temperature {calibrator.temperature:g}, n = {calibrator.samples}"


if __name__ == "__main__":
    main()

"""`penstock inspect`: what an ONNX file is."""

import dataclasses
from pathlib import Path

import click

from penstock.cli.output import print_fields, print_json, print_table, size_text


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def inspect(file: Path, *, as_json: bool) -> None:
    """Show the signature, operators, size and versions of the ONNX model FILE, and what can run it here."""
    from penstock.converters import ConversionError
    from penstock.converters import inspect as inspect_model

    try:
        found = inspect_model(file)
    except ConversionError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json({**dataclasses.asdict(found), "path": str(file)})
        return
    specs = [("input", spec) for spec in found.signature.inputs] + [
        ("output", spec) for spec in found.signature.outputs
    ]
    rows = [(kind, spec.name, spec.datatype, f"[{', '.join(map(str, spec.shape))}]") for kind, spec in specs]
    print_table(("", "name", "datatype", "shape"), rows, "No inputs and outputs.")
    click.echo()
    print_table(("operator", "count"), found.operators.items(), "No operators.")
    click.echo()
    print_fields(
        [
            ("parameters", f"{found.parameter_count:,}"),
            ("size", f"{size_text(found.size_bytes)} ({found.size_bytes:,} bytes)"),
            ("opset", ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())),
            ("ir version", found.ir_version),
            ("producer", found.producer),
            ("external data", ", ".join(found.external_data) or "none"),
            *((f"metadata {key}", value) for key, value in found.metadata.items()),
            *((provider.name, provider.refusal or "can run it") for provider in found.providers),
        ]
    )

"""The commands `inspect` and `verify`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cli_output import plain, print_json

if TYPE_CHECKING:
    from .packed import PackedLayer


def inspect(options: argparse.Namespace) -> int:
    """Print what a file holds; 0."""
    from .artefact import read

    artefact = read(options.file)
    layers = [
        {
            "name": name,
            "type": layer.type_name,
            "shape": list(layer.weight_shape()),
            "mean_bits": float(layer.bits.float().mean()) if len(layer.bits) else 0.0,
            "bits": {str(b): int(n) for b in range(9) if (n := (layer.bits == b).sum())},
            "bytes": layer.data.numel(),
            "input": _input_of(layer),
        }
        for name, layer in artefact.layers.items()
    ]
    manifest = {k: artefact.manifest[k] for k in ("format", "architecture", "sha256", "notes")}
    values = {name: [str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in artefact.values.items()}
    if options.json:
        print_json({"file": str(options.file), "bytes": artefact.size, **manifest, "layers": layers, "values": values})
        return 0
    table = Table(title=Text(f"{plain(options.file.name)}: {artefact.size:,} bytes, format {manifest['format']}"))
    with_inputs = any(row["input"] for row in layers)
    for column in ("layer", "type", "weight", "mean bits", "rows by bits", "bytes", *["input"] * with_inputs):
        table.add_column(column, justify="right" if column in ("mean bits", "bytes") else "left")
    for row in layers:
        shown = " ".join(f"{b}:{n}" for b, n in row["bits"].items())
        name = Text(plain(row["name"]))  # never markup: a layer may be called "[/bold]"
        said = [name, row["type"], str(row["shape"]), f"{row['mean_bits']:.2f}", shown, f"{row['bytes']:,}"]
        if with_inputs:
            grid = row["input"]
            said.append(f"{grid['code_min']}..{grid['code_max']} × {grid['scale']:.4g}" if grid else "float")
        table.add_row(*said)
    console = Console()
    console.print(table)
    console.print(f"{len(values)} other tensors, {sum(v.numel() for v in artefact.values.values()):,} values")
    console.print(Text(plain(f"architecture {manifest['architecture']}, notes {manifest['notes']}")))
    console.print(f"sha256 {manifest['sha256']}", soft_wrap=True)
    return 0


def _input_of(layer: PackedLayer) -> dict[str, Any] | None:
    """The grid that the layer rounds its input to, if any."""
    if getattr(layer, "input_grid", None) is None:
        return None
    scale, low, high = layer.get_buffer("input_grid").tolist()
    return {"scale": scale, "code_min": int(low), "code_max": int(high)}


def verify(options: argparse.Namespace) -> int:
    """Print that a file is whole; 0.

    Raises:
        ArtefactError: If it is not.
    """
    from .artefact import ArtefactError, read

    try:
        artefact = read(options.file)
    except ArtefactError as error:
        if options.json:
            print_json({"file": str(options.file), "ok": False, "reason": str(error)})
        raise
    if options.json:
        print_json(
            {"file": str(options.file), "ok": True, "bytes": artefact.size, "sha256": artefact.manifest["sha256"]}
        )
    else:
        print(f"{options.file.name}: whole, {artefact.size:,} bytes, {len(artefact.layers)} packed layers")
    return 0

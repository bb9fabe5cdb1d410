"""What tests of the GPU bench share: a run without a GPU, and the rows of a section."""

from __future__ import annotations

from bench import gpu_device, record


def of_section(folder, section):
    found = record.read("gpu_kernels", folder)
    return [[entry for entry in found[kind] if entry["section"] == section] for kind in ("rows", "claims")]


def a_run(**changes):
    device = gpu_device.Interpreted()
    return gpu_device.Run(device, True, 0.0, lambda: 1.0, lambda *a: None, **{"copy": 1e9, **changes})

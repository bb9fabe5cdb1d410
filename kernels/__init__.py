"""Operations with one meaning each and several implementations. Installed and imported as `sgsc.kernels`."""

if __name__ == "kernels":
    # Python runs with the repository root on sys.path and something asks for the other package of that name
    # (Hugging Face's). Hand over to it, or say that it is absent: never load our files under its name.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p or ".").resolve() != _root])
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError("No module named 'kernels' (this project's are sgsc.kernels)", name=__name__)
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[__name__] = _module
    _spec.loader.exec_module(_module)
else:
    from importlib.util import find_spec

    from .fake_quantize import fake_quantize, fake_quantize_many
    from .fake_quantize_mixed import fake_quantize_mixed
    from .op import OPS, Op, backend
    from .packed_conv2d import packed_conv2d, tile_kernel
    from .packed_embedding import packed_embedding
    from .packed_linear import NUMERICS, packed_linear
    from .packing import PackedRows, pack, unpack
    from .run_form import TiledRows, tile_rows

    if find_spec("triton") is not None:
        from . import triton_fake_quantize, triton_packed  # noqa: F401  register the CUDA kernels

    __all__ = [
        "NUMERICS",
        "OPS",
        "Op",
        "PackedRows",
        "TiledRows",
        "backend",
        "fake_quantize",
        "fake_quantize_many",
        "fake_quantize_mixed",
        "pack",
        "packed_conv2d",
        "packed_embedding",
        "packed_linear",
        "tile_kernel",
        "tile_rows",
        "unpack",
    ]

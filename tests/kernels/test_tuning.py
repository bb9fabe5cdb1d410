"""Tuned configurations: looked up by products, kept in files that nobody trusts, found by a search with any clock."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to tune")
tl = triton.language

from sgsc import tuning  # noqa: E402
from sgsc.kernels import run_form, triton_configuration, triton_packed, triton_tables, triton_tuning  # noqa: E402
from sgsc.kernels.packed_linear import reference  # noqa: E402
from sgsc.kernels.triton_configuration import Config, configure  # noqa: E402
from sgsc.kernels.triton_tables import Gpu, Key, allowed, bucket, read_table, tuned, write_table  # noqa: E402
from sgsc.packed import pack  # noqa: E402
from sgsc.preparation import prepare  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HERE = triton_tables.gpu(None)
H200 = Gpu("NVIDIA H200", 132, 232_448, 90)
KEY = Key(torch.bfloat16, "tokens", 16, 4, 64, 8, 640)
CONFIG = Config(16, 2, 2, "wide", 4, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache, and nothing read of it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(triton_tables, "_tables", {})
    return tmp_path / "sgsc"


class Launches:
    """Kernels that compute by the reference and note how they are launched."""

    def __init__(self):
        self.configs, self.wrong, self.error = [], lambda config: False, None
        self.linear_kernel = self.conv2d_kernel = self

    def __getitem__(self, grid):
        return self.launch

    def launch(self, x, words, plan, grid, bias, y, partial, counters, columns, rows, *how, **options):
        linear = len(how) == 6
        names = ("COLUMNS", "BLOCKS", "ORDER", "num_warps", "num_stages")
        sizes, blocks, *rest = (options[name] for name in names)
        config = Config(sizes, blocks, how[3 if linear else 2], *rest)
        self.configs.append(config)
        if self.error and self.wrong(config):
            raise self.error
        y.copy_(reference(x, words, plan, grid, None, rows, how[0], False) if linear else x.flatten()[0].expand_as(y))
        if self.wrong(config):
            y.view(-1)[-1] *= 1.1


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    monkeypatch.setattr(triton_packed, "_products", found)
    monkeypatch.setattr(triton_packed, "INTERPRETED", tl.constexpr(True))
    monkeypatch.setitem(run_form.FORMS, "cpu", run_form.FRAGMENTS)
    return found


def layer(rows=40, width=1_300):
    return pack(prepare(torch.nn.Sequential(torch.nn.Linear(width, rows, bias=False))).model)[0]


def product(columns=3, dtype=torch.float32, **shape):
    """A product of given words, and the words."""
    one = layer(**shape)
    tiles = tuning._tiles(one, torch.device("cpu"))
    return tuning._product(one, tiles, columns, dtype, torch.device("cpu")), tiles.lines


def stored(table, here=HERE):
    path = triton_tables.cache_path(here)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_table(table, here))
    return path


def asks(key=KEY):
    """What a product of this key is told."""
    x, words = torch.empty(0, dtype=key.dtype), torch.empty(64 * key.planes, dtype=torch.int32)
    return tuned(x, words, key.x, key.most, key.tiles, key.size, key.across, key.groups)


def complaint():
    """The one warning that two questions give, and neither an answer."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert (asks(), asks()) == (None, None)
    (warning,) = said
    assert warning.category is RuntimeWarning
    return str(warning.message)


# ---- look-up ----


def test_a_product_runs_as_its_entry_says_and_as_the_heuristic_without(launches):
    run, words = product()
    run(words)
    heuristic = configure(torch.float32, 3, 3, 16, 11, HERE)
    assert launches.configs == [heuristic]
    key = triton_tuning.key_of(run, words)
    assert key == (torch.float32, "tokens", 8, 3, 16, 11, len(words) // 64, 1)
    entry = Config(8, 1, 3, "wide", 2, 5)
    stored({key: entry, key._replace(planes=key.planes + 1): Config(8, 1, 1, "wide", 2, 5)})
    triton_tables.forget()
    run(words)
    assert launches.configs[-1] == entry != heuristic
    other, its = product(columns=9)
    other(its)
    assert launches.configs[-1] == configure(torch.float32, 9, 3, 16, 11, HERE)


def test_the_heuristic_can_still_be_replaced(launches, monkeypatch):
    monkeypatch.setattr(triton_packed, "configure", lambda *shape: CONFIG)
    run, words = product()
    run(words)
    assert launches.configs == [CONFIG]


@pytest.mark.parametrize("field", Key._fields)
def test_every_field_of_a_key_counts(field):
    stored({KEY: CONFIG})
    assert asks() == CONFIG
    other = {"dtype": torch.float16, "x": "runs", "most": 32, "tiles": 5, "size": 16, "across": 9, "planes": 641}
    other["groups"] = 2
    assert asks(KEY._replace(**{field: other[field]})) is None


def test_buckets():
    for pixels, base, ends in ((False, 2, [8, 16, 32, 64, 128, 256]), (True, 4, [16, 64, 256, 1_024, 4_096])):
        found = [bucket(n, pixels) for n in range(1, ends[-1] + 1)]
        assert found == [next(end for end in ends if end >= n) for n in range(1, ends[-1] + 1)], base


def test_a_first_product_without_files_looks_twice_and_opens_nothing(monkeypatch):
    looks = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: looks.append(path) or stat(path, **how))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened a file"))
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("read a file"))
    triton_tables.sources.cache_clear()
    assert (asks(), asks(), asks()) == (None, None, None)
    assert looks == [triton_tables.shipped_path(HERE), triton_tables.cache_folder()]


class OnGpu:
    device, dtype = torch.device("cuda", 0), KEY.dtype


def test_a_captured_product_reads_nothing_and_a_later_one_does(monkeypatch):
    stored({KEY: CONFIG}, H200)
    words = torch.empty(64 * KEY.planes, dtype=torch.int32)
    monkeypatch.setattr(triton_tables, "gpu", lambda index: pytest.fail("asked for the GPU"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned(OnGpu(), words, "tokens", 16, 4, 64, 8) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_tables, "gpu", lambda index: H200)
    assert tuned(OnGpu(), words, "tokens", 16, 4, 64, 8) == CONFIG
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked again"))
    assert tuned(OnGpu(), words, "tokens", 9, 4, 64, 8) == CONFIG


# ---- files ----


def test_tables_survive_a_round_trip(folder):
    make = random.Random(0)
    table = {}
    while len(table) < 200:
        key = Key(
            make.choice(list(triton_tables.DTYPES.values())),
            x := make.choice(triton_tables.X),
            bucket(make.randint(1, 4_096), x != "tokens"),
            *(make.randint(1, 99) for _ in range(5)),
        )
        chosen = {name: make.choice(values) for name, values in triton_tables.VALUES.items()}
        config = Config(parts=make.randint(1, 9), **chosen)
        if allowed(key, config, H200):
            table[key] = config
    path = stored(table, H200)
    assert read_table(path, H200) == table
    assert path.read_bytes() == write_table(dict(reversed(table.items())), H200)
    assert path.name.startswith(f"nvidia-h200-132-triton-{triton.__version__}-")
    assert json.loads(path.read_bytes())["gpu"] == "NVIDIA H200"
    assert read_table(stored({}), HERE) == {}


@pytest.mark.parametrize(
    ("field", "other"),
    [
        *(("gpu", "interpreter "), ("gpu", None), ("processors", 3), ("processors", 2.0), ("format", 1)),
        *(("format", True), ("triton", "3.4.0"), ("sources", "0" * 64)),
    ],
)
def test_a_table_for_something_else_is_not_used(field, other):
    path = stored({KEY: CONFIG})
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: other}))
    assert f"{path} is for another {field} than" in complaint()


def test_another_gpu_triton_or_source_is_another_file(folder, monkeypatch):
    paths = {triton_tables.cache_path(here) for here in (HERE, H200, H200._replace(processors=114))}
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    paths.add(triton_tables.cache_path(HERE))
    monkeypatch.setattr(triton_tables, "sources", lambda: "0" * 64)
    paths.add(triton_tables.cache_path(HERE))
    assert len(paths) == 5
    assert {path.parent for path in paths} == {folder}
    odd = triton_tables.cache_path(Gpu("../../\0é x" + "y" * 500, 1, 1, 90))
    assert odd.parent == folder
    assert len(odd.name.encode()) < 250


def test_sources_are_those_of_the_kernels(monkeypatch, tmp_path):
    folder, reached = Path(triton_tables.__file__).parent, ["triton_packed_kernels"]
    for name in reached:  # what it imports of ours, on and on, but for the layout's own means
        found = re.findall(r"^from \.(\w*) import (\w+)", (folder / f"{name}.py").read_text(), re.MULTILINE)
        found = [module or imported for module, imported in found if name != "fragments"]
        reached += [module for module in found if module not in reached]
    assert sorted(f"{name}.py" for name in reached) == sorted(triton_tables.SOURCES)
    before = triton_tables.sources()
    for name in triton_tables.SOURCES:
        (tmp_path / name).write_bytes(Path(triton_tables.__file__).with_name(name).read_bytes())
    monkeypatch.setattr(triton_tables, "__file__", str(tmp_path / "triton_tables.py"))
    found = [before]
    for name in ("none", *triton_tables.SOURCES):
        if name != "none":
            (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        triton_tables.sources.cache_clear()
        found.append(triton_tables.sources())
    triton_tables.sources.cache_clear()
    assert found[0] == found[1]
    assert len(set(found)) == 1 + len(triton_tables.SOURCES)


def test_the_cache_is_at_home_without_an_absolute_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    for base in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert triton_tables.cache_folder() == Path("/somebody/.cache/sgsc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert triton_tables.cache_folder() == Path("/somebody/.cache/sgsc")


def a_directory(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


FILES = {
    "empty": b"",
    "not-json": b"{",
    "not-text": b"\xff\xfe\xfa",
    "deep": b"[" * 200_000,
    "a-list": b"[]",
    "a-number": b"1" * 5_000,
    "nothing-in-it": b"{}",
    "no-entries": lambda path: path.write_text(path.read_text().replace("entries", "entires")),
    "more": lambda path: path.write_text(path.read_text().replace('{"format"', '{"more": 1, "format"', 1)),
    "entries-no-list": lambda path: path.write_text(path.read_text().split("[")[0] + "{}}"),
    "an-entry-no-object": lambda path: path.write_text(path.read_text().split("[")[0] + "[[]]}"),
    "an-entry-a-string": lambda path: path.write_text(path.read_text().split("[")[0] + '["columns"]}'),
    "huge": lambda path: path.write_bytes(path.read_bytes() + b" " * triton_tables.MOST_BYTES),
    "a-directory": a_directory,
    "a-pipe": a_pipe,
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_ignored_with_one_warning(name):
    path = stored({KEY: CONFIG})
    change = FILES[name]
    change(path) if callable(change) else path.write_bytes(change)
    said = complaint()
    assert str(path) in said
    assert "`sgsc tune` makes a new one" in said


def test_an_unreadable_file_is_ignored_with_one_warning(monkeypatch):
    path = stored({KEY: CONFIG})
    triton_tables.sources()

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert f"Permission denied: '{path}'" in complaint()


def test_a_warning_that_is_an_error_comes_once():
    stored({KEY: CONFIG}).write_text("")
    with pytest.raises(RuntimeWarning, match="is not JSON"):
        asks()
    assert asks() is None


ENTRIES = {
    **{f"no-{name}": {name: ...} for name in (*Key._fields, *Config._fields)},
    **{f"{name}-{kind}": {name: kind} for name in ("columns", "parts", "tiles", "most") for kind in (True, "8", None)},
    **{f"{name}-a-fraction": {name: 2.0} for name in ("blocks", "warps", "stages", "across", "planes", "size")},
    **{f"{name}-{n}": {name: n} for name in ("columns", "blocks", "warps", "stages", "parts") for n in (0, -1, 3_000)},
    **{"columns-odd": {"columns": 12}, "blocks-odd": {"blocks": 3}, "warps-odd": {"warps": 3}},
    **{"stages-many": {"stages": 6}, "order": {"order": "diagonal"}, "order-number": {"order": 1}},
    **{"columns-past-the-bucket": {"columns": 32}, "parts-past-the-steps": {"parts": 5}},
    **{"most-no-bucket": {"most": 17}, "most-huge": {"most": 10**4_000}, "tiles-none": {"tiles": 0}},
    **{"dtype": {"dtype": "float64"}, "dtype-list": {"dtype": ["float16"]}, "x": {"x": 0}, "x-unknown": {"x": "both"}},
    **{"memory": {"columns": 128, "most": 128, "blocks": 4, "stages": 5}, "programs": {"tiles": 33}, "more": {"b": 1}},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_file_with_an_entry_that_tuning_would_not_write_is_ignored(name):
    path = stored({KEY: CONFIG, KEY._replace(planes=641): CONFIG})
    said = json.loads(path.read_text())
    entry = said["entries"][1] | ENTRIES[name]
    said["entries"][1] = {k: v for k, v in entry.items() if v is not ...}
    path.write_text(json.dumps(said))
    assert f"{path}: entry 1 is none that tuning writes" in complaint()


def test_shipped_tables_hold_for_any_source_and_the_cache_goes_before_them(folder, monkeypatch):
    second = KEY._replace(planes=7)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.4.0")
        patch.setattr(triton_tables, "sources", lambda: "0" * 64)
        triton_tables.SHIPPED.mkdir()
        shipped = triton_tables.shipped_path(HERE)
        shipped.write_bytes(write_table({KEY: CONFIG, second: CONFIG}, HERE))
    assert asks() == CONFIG
    mine = CONFIG._replace(stages=2)
    path = stored({KEY: mine})
    triton_tables.forget()
    assert (asks(), asks(second)) == (mine, CONFIG)
    path.write_text("")
    triton_tables.forget()
    with pytest.warns(RuntimeWarning, match="is not JSON"):
        assert asks() == CONFIG
    path.unlink()
    triton_tables.forget()
    shipped.write_bytes(write_table({KEY: CONFIG}, HERE).replace(b'"interpreter"', b'"another"'))
    assert f"{shipped} is for another gpu" in complaint()


# ---- what may be used ----


def test_the_heuristic_and_all_near_it_are_allowed_or_left_out():
    """On an H200, for layers small and large: the search starts where it may be, and stays there."""
    for dtype in triton_tables.DTYPES.values():
        for columns in (1, 16, 64, 256):
            for tiles, size, across in ((1, 16, 1), (8, 64, 3), (64, 64, 32), (64, 64, 112), (448, 64, 64)):
                key = Key(dtype, "tokens", bucket(columns, False), tiles, size, across, 4 * tiles * across)
                config = configure(dtype, columns, tiles, size, across, H200)
                assert allowed(key, config, H200), (key, config)
                for field in Config._fields:
                    for other in triton_tuning.near(config, field, key):
                        assert 1 <= other.parts <= -(-across // other.blocks)
                        steps = -(-across // other.blocks)
                        assert (other.parts - 1) * -(-steps // other.parts) < steps  # no part without a step
                        different = {f for f in Config._fields if getattr(other, f) != getattr(config, f)}
                        assert different <= {field, "parts"}


@pytest.mark.parametrize(
    ("config", "dtype", "size", "shared"),
    [  # what the compiler took for sm_90; for the last three for sm_80
        (Config(8, 2, 1, "narrow", 4, 3), torch.float16, 64, 40_960),
        (Config(8, 2, 1, "wide", 4, 3), torch.float16, 64, 73_728),
        (Config(16, 2, 1, "narrow", 4, 3), torch.float16, 64, 59_392),
        (Config(16, 2, 1, "narrow", 1, 3), torch.float16, 16, 24_576),
        (Config(32, 1, 1, "wide", 1, 2), torch.float16, 64, 32_768),
        (Config(32, 2, 1, "wide", 4, 4), torch.float16, 64, 114_688),
        (Config(64, 1, 1, "wide", 4, 3), torch.float16, 64, 65_536),
        (Config(128, 2, 1, "wide", 8, 4), torch.float16, 64, 311_296),
        (Config(16, 2, 1, "narrow", 4, 3), torch.float32, 64, 106_496),
        (Config(16, 2, 1, "narrow", 1, 2), torch.float32, 16, 20_480),
        (Config(32, 2, 1, "wide", 2, 3), torch.float32, 16, 81_920),
        (Config(64, 1, 1, "wide", 8, 4), torch.float32, 64, 143_360),
        (Config(128, 1, 1, "wide", 8, 3), torch.float32, 64, 184_320),
        (Config(32, 4, 1, "narrow", 2, 4), torch.float16, 16, 122_880),
        (Config(64, 2, 1, "narrow", 4, 3), torch.float16, 64, 98_304),
        (Config(64, 2, 1, "wide", 4, 3), torch.float16, 64, 131_072),
    ],
)
def test_the_memory_of_a_program_is_never_underestimated(config, dtype, size, shared):
    key = Key(dtype, "tokens", 128, 8, size, 32, 1_000)
    found = triton_configuration.shared(dtype, size, config)
    assert shared <= found <= 2 * shared
    assert not allowed(key, config, H200._replace(shared=found - 1))
    assert allowed(key, config, H200._replace(shared=found))


# ---- search ----


def clock(launches, cost):
    """A clock that asks `cost` what a launch costs."""
    timed = []

    def seconds(run, words):
        run(words)
        timed.append(launches.configs[-1])
        return cost(launches.configs[-1])

    return seconds, timed


def distance(target):
    """Seconds that fall on the way to a configuration, a field at a time."""
    return lambda config: 1.0 + sum(abs(place(config, f) - place(target, f)) for f in Config._fields)


def place(config, field):
    value = getattr(config, field)
    return value.bit_length() if field == "parts" else triton_tables.VALUES[field].index(value)


def test_the_search_finds_the_fastest_and_products_use_it(launches):
    run, words = product(columns=33)
    fastest = Config(16, 4, 1, "wide", 4, 5)
    seconds, timed = clock(launches, distance(fastest))
    found = triton_tuning.tune_product(run, words, 33, seconds)
    assert found.config == fastest
    assert (found.seconds, found.failed) == (1.0, 0)
    assert found.heuristic == distance(fastest)(configure(torch.float32, 33, 3, 16, 11, HERE)) > 1
    assert found.tried == len(set(timed)) < 60
    assert all(allowed(found.key, config, HERE) for config in timed)
    assert asks(found.key) is None  # nothing is stored yet
    tuning.store({found.key: found.config}, HERE)
    run(words)
    assert launches.configs[-1] == fastest


@pytest.mark.parametrize(("gain", "kept"), [(0.019, False), (0.021, True), (0.0, False), (-0.5, False)])
def test_only_what_wins_by_more_than_noise_is_kept(launches, gain, kept):
    run, words = product()
    heuristic = configure(torch.float32, 3, 3, 16, 11, HERE)
    best = heuristic._replace(stages=4)
    seconds, _ = clock(launches, lambda c: 1 - gain if c == best else 1.0 if c == heuristic else 2.0)
    found = triton_tuning.tune_product(run, words, 3, seconds)
    assert found.config == (best if kept else None)


def test_one_lucky_time_is_not_enough(launches):
    run, words = product()
    lucky = iter([1.0, 0.5])  # the heuristic, the first candidate; both are timed again
    seconds, timed = clock(launches, lambda c: next(lucky, 1.0))
    assert triton_tuning.tune_product(run, words, 3, seconds).config is None
    assert timed.count(timed[0]) == timed.count(timed[1]) == 1 + triton_tuning.REPEATS


ERRORS = {
    "wrong": None,
    "too-large": triton.runtime.errors.OutOfResources(9, 1, "shared memory"),
    "does-not-compile": RuntimeError("PassManager::run failed"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_candidate_that_is_wrong_or_fails_is_neither_timed_nor_kept(launches, error):
    run, words = product()
    launches.wrong, launches.error = lambda config: config.stages > 3, error
    seconds, timed = clock(launches, distance(Config(8, 2, 1, "narrow", 1, 5)))
    found = triton_tuning.tune_product(run, words, 3, seconds)
    assert max(config.stages for config in timed) == 3
    assert found.config is None or found.config.stages <= 3
    assert found.failed >= 1


def test_a_candidate_that_is_wrong_the_second_time_is_not_kept(launches):
    run, words = product()
    seen = set()
    launches.wrong = lambda config: config.stages > 3 and (config in seen or seen.add(config))
    seconds, timed = clock(launches, distance(Config(8, 2, 1, "narrow", 1, 5)))
    triton_tuning.tune_product(run, words, 3, seconds)
    assert max(config.stages for config in timed) == 3


def test_an_error_of_the_gpu_is_not_taken_for_a_slow_candidate(launches):
    run, words = product()
    launches.wrong, launches.error = lambda config: config.stages > 3, RuntimeError("CUDA error: illegal access")
    with pytest.raises(RuntimeError, match="illegal access"):
        triton_tuning.tune_product(run, words, 3, clock(launches, distance(Config(8, 2, 1, "narrow", 1, 5)))[0])
    assert triton_tables._tables == {}


@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), 1.1, -1.0, 0.0], ids=["nan", "infinity", "ten-percent", "sign", "zero"]
)
@pytest.mark.parametrize("dtype", triton_tables.DTYPES.values())
@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_a_wrong_result_is_caught(wrong, dtype, unit):
    right = (unit * torch.randn(8, 8)).to(dtype)
    right[3, 3] = unit
    found = right.clone()
    assert triton_tuning.agrees(found, right)
    found[3, 3] *= wrong
    assert not triton_tuning.agrees(found, right)
    found[3, 3] = right[3, 3] * (1 + torch.finfo(dtype).eps)
    assert triton_tuning.agrees(found, right)
    right[0, 0], found[0, 0] = float("inf"), float("inf")
    assert triton_tuning.agrees(found, right)


# ---- storing ----


def test_tuning_again_replaces_its_own_entries_alone():
    others = {KEY._replace(planes=n): CONFIG for n in (1, 2)}
    tuning.store(others | {KEY: CONFIG}, HERE)
    assert asks() == CONFIG
    better = CONFIG._replace(stages=2)
    path = tuning.store({KEY: better}, HERE)
    assert asks() == better
    assert read_table(path, HERE) == others | {KEY: better}
    tuning.store({KEY: None}, HERE)
    assert asks() is None
    assert read_table(path, HERE) == others


def test_nothing_found_leaves_no_file(folder):
    assert not tuning.store({KEY: None}, HERE).exists()


def test_a_malformed_file_is_replaced(folder):
    path = stored({KEY: CONFIG})
    path.write_text("{")
    tuning.store({KEY: CONFIG}, HERE)
    assert asks() == CONFIG
    assert sorted(p.name for p in folder.iterdir()) == [".lock", path.name]


def test_writers_at_the_same_time_lose_nothing():
    start, errors = threading.Barrier(6), []

    def write(writer):
        start.wait()
        try:
            for n in range(8):
                tuning.store({KEY._replace(planes=1 + 8 * writer + n): CONFIG}, HERE)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = read_table(triton_tables.cache_path(HERE), HERE)
    assert sorted(key.planes for key in found) == list(range(1, 49))


# ---- networks ----


def network():
    layers = {
        "first": torch.nn.Linear(300, 24),
        "again": torch.nn.Linear(300, 24),
        "conv": torch.nn.Conv2d(5, 20, 3, stride=2, padding=1),
        "line": torch.nn.Conv1d(5, 20, 3, dilation=2),
        "parts": torch.nn.Conv2d(8, 20, 3, groups=2),
        "apart": torch.nn.Conv2d(6, 6, 3, groups=6),
        "words": torch.nn.Embedding(10, 4),
    }
    return pack(prepare(torch.nn.ModuleDict(layers)).model, remove=False)


def test_every_product_of_a_network_is_tuned_once(launches):
    model, steps = network(), []
    before = {name: value.clone() for name, value in model.named_buffers()}
    seconds, _ = clock(launches, lambda c: 1.0 / c.stages)
    how = {"pixels": (64,), "dtypes": ("float16",), "seconds": seconds}
    records = tuning.tune(model, (1, 5, 16), "cpu", progress=lambda *step: steps.append(step), **how)
    assert [(r["layers"], r["of"], r["columns"]) for r in records] == [
        (["first", "again"], "tokens", 1),
        (["first", "again"], "tokens", 16),
        (["conv"], "pixels", 64),
        (["line"], "pixels", 64),
        (["parts"], "pixels", 64),
    ]
    assert all(r["config"]["stages"] == 5 and r["dtype"] == "float16" and r["failed"] == 0 for r in records)
    assert all(r["microseconds"] == pytest.approx(2e5) for r in records)
    assert steps == [("tuning", n, 9, {}) for n in range(1, 10)]
    table = read_table(triton_tables.cache_path(HERE), HERE)
    assert sorted(key.groups for key in table) == [1, 1, 1, 1, 2]
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_run_that_is_stopped_has_stored_what_it_got_to(launches):
    def stop(phase, done, of, values):
        if done == 2:
            raise KeyboardInterrupt

    seconds, _ = clock(launches, lambda c: 1.0 / c.stages)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(network(), (1, 16), "cpu", dtypes=("float16",), seconds=seconds, progress=stop)
    assert len(read_table(triton_tables.cache_path(HERE), HERE)) == 2


def test_products_of_a_convolution_have_the_pixels_asked_for(launches):
    model = network()
    for name in ("conv", "line"):
        tiles = tuning._tiles(model[name], torch.device("cpu"))
        for pixels in (1, 16, 30, 37, 4_096):
            run = tuning._product(model[name], tiles, pixels, torch.float32, torch.device("cpu"))
            height, width = run(tiles.lines).shape[2:]
            assert height * width == pixels
            assert name == "conv" or height == 1
            assert triton_tuning.key_of(run, tiles.lines).most == bucket(pixels, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (0, 1)}, r"batches \[0, 1\]: want numbers from 1 to 256; more go through a dense copy"),
        ({"batches": (257,)}, r"batches \[257\]: want numbers from 1 to 256"),
        ({"batches": ()}, r"batches \[\]: want"),
        ({"pixels": (4_097,)}, r"pixels \[4097\]: want numbers from 1 to 4096"),
        ({"dtypes": ("int8",)}, r"dtypes \['int8'\]: want some of float16, bfloat16, float32"),
        ({"dtypes": ()}, r"dtypes \[\]: want some"),
        ({"model": torch.nn.Linear(2, 2)}, "nothing to tune in 1 modules; want packed Linears"),
        ({"device": "meta"}, "tuning needs a GPU: there is none for 'meta' here"),
    ],
)
def test_what_cannot_be_tuned_is_refused(launches, changes, message):
    with pytest.raises(ValueError, match=message):
        tuning.tune(**{"model": network(), "device": "cpu", "seconds": lambda *_: 1.0} | changes)


def test_without_triton_tuning_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Triton, which is not installed; `pip install sgsc\[triton\]`"):
        tuning.tune(network())


# ---- the kernels themselves ----

PROGRAM = """
import torch
from sgsc import tuning
from sgsc.kernels import run_form
from tests.kernels.test_tuning import layer
run_form.FORMS["cpu"] = run_form.FRAGMENTS
make = torch.Generator().manual_seed(0)
times = lambda run, words: torch.rand((), generator=make).item()
(found,) = tuning.tune({"": layer(20, 1_100)}, (2,), "cpu", dtypes=("float16",), seconds=times)
print(found["tried"], found["failed"])
"""


def test_every_candidate_is_right_in_the_interpreter(tmp_path):
    """The search itself compares: configurations chosen by random times all give the heuristic's result."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 250}
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, **how)
    assert done.returncode == 0, done.stderr
    tried, failed = map(int, done.stdout.split())
    assert tried >= 8
    assert failed == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is timed")
def test_on_the_gpu():
    one = layer(1_024, 1_024)
    (found,) = tuning.tune({"": one}, (1,), dtypes=("float16",))
    assert 0 < found["microseconds"] <= found["heuristic_microseconds"] < 1e5
    here = triton_tables.gpu(torch.cuda.current_device())
    assert len(read_table(triton_tables.cache_path(here), here)) == (found["config"] is not None)
    x = torch.randn(1, 1_024)
    y = one(x)
    assert triton_tuning.agrees(one.cuda().half()(x.cuda().half()).cpu(), y.half())

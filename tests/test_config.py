"""Settings: every bad value is refused by name, and flags, fields and JSON are one."""

import argparse
import dataclasses
import json
import math
from typing import get_type_hints

import pytest

from sgsc.config import CompressionConfig, add_settings, from_arguments

FIELDS = {f.name: f for f in dataclasses.fields(CompressionConfig)}
TYPES = get_type_hints(CompressionConfig)
NAN, INF = math.nan, math.inf
# name -> (bad values, good values)
LIMITS = {
    "target_size": ([0, 1, 0.0, 1.0, -0.1, 5, NAN, INF, -INF], [1e-9, 0.05, 0.999]),
    "tolerance": ([-0.01, 1, 1.0, 5, NAN, INF], [0, 0.0, 0.5, 0.999]),
    "margin_tolerance": ([-0.01, 1.01, NAN, INF], [0, 0.0, 0.5, 1]),
    "steps": ([0, -1], [1, 10**9]),
    "shrink_share": ([0, 1, -0.5, 2, NAN, INF], [1e-3, 0.6, 0.99]),
    "settle_share": ([0, 1, -0.5, 2, NAN, INF], [1e-3, 0.75, 0.99]),
    "preservation_weight": ([-1, -1e-9, NAN, INF], [0, 0.0, 1e6]),
    "preservation_batch": ([0, -3], [1, 4096]),
    "sparsity_weight": ([-1, NAN, INF], [0, 3.5]),
    "bit_rate": ([-0.1, NAN, INF], [0, 0.05, 8]),
    "grid_rate": ([-0.1, NAN, INF], [0, 0.05, 8]),
    "guard_every": ([0, -1], [1, 10**9]),
    "seed": ([-1, 2**63, 2**70], [0, 2**63 - 1]),
}


def settings_of(name, which):
    return [(name, value) for value in LIMITS[name][which]] if name in LIMITS else []


def test_every_number_has_its_limits_tested():
    assert LIMITS.keys() == {name for name, kind in TYPES.items() if kind in (int, float)}


@pytest.mark.parametrize(("name", "value"), [pair for name in FIELDS for pair in settings_of(name, 0)])
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value}: want ".replace("+", r"\+")):
        CompressionConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [pair for name in FIELDS for pair in settings_of(name, 1)])
def test_the_limits_are_where_they_are_said_to_be(name, value):
    assert getattr(CompressionConfig(**{name: value}), name) == value


@pytest.mark.parametrize("value", ["1", None, True, [1], 1j])
@pytest.mark.parametrize("name", LIMITS)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*: want a (whole )?number"):
        CompressionConfig(**{name: value})


@pytest.mark.parametrize("value", [0, 1, 0.5, "true", None])
def test_a_switch_is_on_or_off(value):
    with pytest.raises(ValueError, match=rf"^cut={value!r}: want True or False"):
        CompressionConfig(cut=value)


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind is int])
def test_a_fraction_is_no_whole_number(name):
    with pytest.raises(ValueError, match=f"^{name}=1.5: want a whole number"):
        CompressionConfig(**{name: 1.5})


def test_settings_are_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError, match="steps"):
        CompressionConfig().steps = 3
    with pytest.raises(TypeError, match="positional"):
        CompressionConfig(0.05)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        CompressionConfig(step=3)


def parser(**defaults):
    made = argparse.ArgumentParser(exit_on_error=False)
    add_settings(made, CompressionConfig, defaults)
    return made


@pytest.mark.parametrize("name", FIELDS)
def test_flags_fields_and_json_agree(name):
    field = FIELDS[name]
    assert field.metadata["help"]
    flag = f"--{name.replace('_', '-')}"
    action = next(a for a in parser()._actions if flag in a.option_strings)
    assert action.help == f"{field.metadata['help']} (default: {field.default})"
    assert action.default == field.default
    good = LIMITS[name][1][-1] if name in LIMITS else not field.default
    given = [flag, str(good)] if name in LIMITS else [flag]
    config = from_arguments(CompressionConfig, parser().parse_args(given))
    assert getattr(config, name) == good
    assert type(getattr(config, name)) is TYPES[name]
    back = CompressionConfig(**json.loads(json.dumps(config.as_dict())))
    assert back == config
    assert config == dataclasses.replace(CompressionConfig(), **{name: good})


def test_there_is_a_flag_for_every_field_and_no_other():
    flags = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    switches = {f"--no-{name}" for name, kind in TYPES.items() if kind is bool}
    assert flags == {f"--{name.replace('_', '-')}" for name in FIELDS} | switches


def test_no_flags_are_the_defaults_and_defaults_can_be_replaced():
    assert from_arguments(CompressionConfig, parser().parse_args([])) == CompressionConfig()
    made = parser(steps=None)
    assert made.parse_args([]).steps is None
    assert from_arguments(CompressionConfig, made.parse_args([]), steps=7).steps == 7
    assert "(default: None)" not in made.format_help()


def test_the_defaults_are_good_and_json_able():
    assert json.loads(json.dumps(CompressionConfig().as_dict())) == CompressionConfig().as_dict()
    assert list(CompressionConfig().as_dict()) == list(FIELDS)

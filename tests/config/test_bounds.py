"""Every number that a configuration reaches is finite and within bounds, whether it is parsed or
made in Python.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from sfumato import config
from sfumato.config.bounds import holds_numbers, require_bounds
from sfumato.config.schema import config_fields, members
from sfumato.errors import ConfigError, SfumatoError
from sfumato.recipes import Run, resolve
from sfumato.sampling import DDIM, Churn, DPMSolverPP2M

# intervals, whose ends may be infinite
OPEN_ENDS = {"SamplingConfig.interval", "Churn.low", "Churn.high"}
NEEDED = {
    "Tabulated": {"alphas": [1.0, 0.5, 0.0], "sigmas": [0.0, 0.5, 1.0]},
    "Warped": {"schedule": "Karras", "warp": "Shift"},
    "ZeroTerminalSNR": {"schedule": "ScaledLinear"},
    "PretrainedAutoencoder": {"path": "somewhere"},
}


def reachable(cls: type, found: dict[type, None] | None = None) -> dict[type, None]:
    found = {} if found is None else found
    if cls not in found:
        found[cls] = None
        for _, hint in config_fields(cls):
            for member in members(hint):
                reachable(member, found)
    return found


def numbers() -> Iterator[tuple[type, str, Any]]:
    """(class, field, type) of every number, or tuple of numbers, that a run's configuration
    reaches.
    """
    for cls in reachable(Run):
        yield from (
            (cls, field.name, hint) for field, hint in config_fields(cls) if holds_numbers(hint)
        )


NUMBERS = {f"{cls.__name__}.{name}": (cls, name, hint) for cls, name, hint in numbers()}


def absurd(case: str, hint: Any) -> list[float]:
    """What no number may be; the ends of open intervals may be infinite and as far out as anybody
    likes.
    """
    ints = "float" not in str(hint)
    return (
        [math.nan]
        if case in OPEN_ENDS
        else [-(10**30), 10**30]
        if ints
        else [math.nan, math.inf, -math.inf, -1e30, 1e30]
    )


def shaped(hint: Any, value: float) -> Any:
    """`value` in the form of the annotation: alone, or as every item of a tuple."""
    text = str(hint)
    if not text.startswith("tuple"):
        return value
    arguments = [argument for argument in get_args(hint) if argument is not Ellipsis]
    return [value] * max(len(arguments), 2 if "..." in text else 1)


def test_the_walk_reaches_what_it_should() -> None:
    assert len(NUMBERS) > 120
    assert {
        "DDIM.eta",
        "Churn.gamma",
        "OptimizerConfig.final_fraction",
        "SamplingConfig.interval",
        "Tabulated.alphas",
        "Budget.minutes",
    } < set(NUMBERS)
    assert set(NUMBERS) > OPEN_ENDS


@pytest.mark.parametrize("case", NUMBERS)
def test_absurd_numbers_are_refused_by_name(case: str) -> None:
    cls, name, hint = NUMBERS[case]
    for value in absurd(case, hint):
        with pytest.raises(ConfigError) as caught:
            config.parse(
                cls,
                {
                    **NEEDED.get(cls.__name__, {}),
                    **({"name": "x"} if cls is Run else {}),
                    name: shaped(hint, value),
                },
            )
        assert f"`{name}" in str(caught.value), f"{value}: {caught.value}"


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_made_in_python_is_checked_with_its_run(case: str) -> None:
    """The same bounds, where no parser has been."""
    cls, name, hint = NUMBERS[case]
    value = shaped(hint, math.nan if "float" in str(hint) else 10**30)
    blank = object.__new__(cls)
    for field in dataclasses.fields(cls):
        plain_default = field.default if field.default is not dataclasses.MISSING else None
        object.__setattr__(blank, field.name, plain_default)
    object.__setattr__(blank, name, tuple(value) if isinstance(value, list) else value)
    with pytest.raises(ConfigError):
        require_bounds(blank)


def test_the_key_of_a_refused_number_is_the_whole_path() -> None:
    with pytest.raises(
        ConfigError,
        match=r"`sampling\.sampler\.eta` = 1\.5: input should be less than or equal to 1",
    ):
        resolve("digits", ["sampling.sampler={kind: ddim, eta: 1.5}"])
    with pytest.raises(
        ConfigError, match=r"^autoencoder\.post_hoc_ema: widths"
    ):  # the class itself knows itself as `post_hoc_ema`
        resolve(
            "digits", ["autoencoder.kind=trained", "autoencoder.post_hoc_ema.widths=[0.1, 0.1]"]
        )


@pytest.mark.parametrize(
    "make", [lambda: DDIM(eta=1.5), lambda: DPMSolverPP2M(eta=math.nan), lambda: Churn(gamma=-1.0)]
)
def test_samplers_made_in_python_are_checked_by_themselves(make: Any) -> None:
    with pytest.raises(SfumatoError, match="input should be"):
        make()


def test_open_ends_of_intervals_may_be_infinite() -> None:
    run = resolve(
        "digits", ["sampling.interval=[-.inf, 3]", "sampling.sampler={kind: churn, high: .inf}"]
    )
    assert run.sampling.interval == (-math.inf, 3.0)
    assert run.sampling.sampler.high == math.inf


def test_the_json_schema_holds_the_bounds() -> None:
    eta = config.json_schema(Run)["$defs"]["sfumato_sampling_ddim_DDIM_tagged"]["properties"]["eta"]
    assert (eta["minimum"], eta["maximum"]) == (0, 1)

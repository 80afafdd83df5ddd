from dataclasses import dataclass, field
from typing import Literal

import pytest

from nucseg.config import ConfigError, from_mapping, to_plain


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    by_name: dict[str, Inner] = field(default_factory=dict)
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None


def test_nested_settings_are_built_and_turned_back_into_plain_values():
    values = {
        "name": "x",
        "inner": {"rate": 1, "sizes": [3]},
        "by_name": {"a": {"rate": 2.0}},
        "mode": "slow",
        "limit": 4,
    }
    built = from_mapping(Outer, values, "profile")
    assert built == Outer("x", Inner(1.0, (3,)), {"a": Inner(2.0)}, "slow", 4)
    assert from_mapping(Outer, to_plain(built), "profile") == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "inner": {"ratte": 1.0}}, r"profile\.inner: unknown setting 'ratte'; did you mean 'rate'\?"),
        ({"name": "x", "inner": {"rate": "1e-3"}}, r"profile\.inner\.rate: expected float, got str"),
        ({"name": "x", "inner": {"sizes": [1.5]}}, r"profile\.inner\.sizes\[0\]: expected int, got float"),
        ({"name": "x", "inner": {"rate": -1.0}}, r"profile\.inner: rate must be > 0, got -1\.0"),
        ({"name": "x", "mode": "medium"}, r"profile\.mode: 'medium' is not one of 'fast', 'slow'"),
        ({"name": "x", "limit": True}, r"profile\.limit: expected .*int"),
        ({}, r"profile: missing setting\(s\) name"),
        ({"name": "x", "inner": 3}, r"profile\.inner: expected settings by name, got int 3"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, values, "profile")

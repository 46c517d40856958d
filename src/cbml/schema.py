"""The base of every configuration object: immutable, and strict about names."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]  # of an option; it becomes a part of paths
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy and scikit-learn take


class Schema(BaseModel):
    """A pydantic model that refuses unknown parameters and says which ones it knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [str(name) for name in data if name not in cls.model_fields]
            if unknown:
                raise ValueError(f"unknown parameter {', '.join(unknown)}; allowed: {', '.join(cls.model_fields)}")
            for name, value in data.items():
                values = value if isinstance(value, list) else [value]
                if any(isinstance(each, bool) for each in values) and cls.model_fields[name].annotation is not bool:
                    raise ValueError(f"{name} is {str(value).lower()}, but is not a switch")  # to Python, True is 1
        return data


class Range(Schema):
    """The values that a parameter may be given when it is tuned: whole numbers if both ends are.

    Attributes:
        low, high: the ends, which belong to it.
        log: small values are as probable as large ones, on a logarithmic scale.
        choices: in place of the ends.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: list[bool | int | float | str] = []

    @model_validator(mode="after")
    def _ends_or_choices(self) -> Self:
        ends = self.low is not None and self.high is not None and self.low < self.high
        if ends == bool(self.choices) or (self.log and not (self.low or 0) > 0):
            raise ValueError("expected low and high, low below high and with log above 0; or choices")
        return self


def first_error(error: ValidationError, data: Any) -> str:
    """The first problem of validating `data` as one line: `path.to.parameter: what is wrong`."""
    problem = error.errors()[0]
    path: list[str] = []
    node = data
    for part in problem["loc"]:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            path.append(str(part))
            node = node[part]
        elif problem["type"] == "missing":
            path.append(str(part))
        # Anything else is the tag of a discriminated union, which the file does not have as a key.
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    got = f", got {value!r}" if isinstance(value, str | int | float | list | None) and "got" not in message else ""
    if problem["type"] == "string_type" and isinstance(value, int | float):  # 2024_01_15 is a number to YAML and Hydra
        got += f"; text that reads like a number takes quotes of its own: -S '{'.'.join(path)}=\"…\"'"
    return ": ".join(filter(None, [".".join(path), message])) + got

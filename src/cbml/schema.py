"""The base of every configuration object: immutable, and strict about names."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


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
        return data


def first_error(error: ValidationError, data: Any) -> str:
    """The first problem of validating `data` as one line: `path.to.parameter: what is wrong`."""
    problem = error.errors()[0]
    path, node = [], data
    for part in problem["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(str(part))
            node = node[part]
        elif problem["type"] == "missing":
            path.append(str(part))
        # Anything else is the tag of a discriminated union, which the file does not have as a key.
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    got = f", got {value!r}" if isinstance(value, str | int | float | list | None) and "got" not in message else ""
    return f"{'.'.join(path)}: {message}{got}"

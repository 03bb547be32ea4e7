"""What objects show of themselves: settings and results in a line, in a notebook, and as a data frame."""

from __future__ import annotations

import base64
import html
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

# Values that a line has room for.
_PLAIN = (bool, int, float, str, torch.Size)
_FEW = 8


def settings(thing: Any) -> dict[str, Any]:
    """Arguments of an object's constructor, as far as it keeps them under their names and they are short to show."""
    found = {name: getattr(thing, name, None) for name in inspect.signature(type(thing)).parameters}
    return {name: value for name, value in found.items() if _is_short(value)}


def _is_short(value: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        return True
    if isinstance(value, tuple | list):
        return len(value) <= _FEW and all(isinstance(part, _PLAIN) for part in value)
    return isinstance(value, _PLAIN)


def described(settings: Mapping[str, Any]) -> str:
    """Settings as a call shows them: ``data_dim=5, latent_dim=2``."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def as_html(title: str, frame: pd.DataFrame | Mapping[str, Any]) -> str:
    """A title above a table, for a notebook; long tables are shortened.

    Args:
        title: Plain text.
        frame: A data frame, or names and values, which make one with a row each.
    """
    import pandas as pd

    if isinstance(frame, Mapping):
        frame = pd.DataFrame({"": [str(value) for value in frame.values()]}, index=list(frame))
    return f"<p>{html.escape(title)}</p>\n{frame.to_html(max_rows=2 * _FEW)}"


def html_page(title: str, body: str) -> str:
    """A page that needs nothing else.

    Args:
        title: Plain text, which becomes its heading, too.
        body: HTML below the heading.
    """
    return _PAGE.format(title=html.escape(title), body=body)


def embedded(caption: str, png: bytes) -> str:
    """HTML of an image and its caption, in need of no file."""
    text, data = html.escape(caption), base64.b64encode(png).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .85rem; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .4rem .6rem; text-align: left; vertical-align: top; }}
img {{ max-width: 100%; }}
figure {{ margin: 2rem 0; }}
figcaption {{ color: #555; }}
</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


class Result:
    """Mixin of results that are dataclasses without a ``repr`` of their own: a line, and a table in a notebook."""

    def __repr__(self) -> str:
        """One line: numbers as they are, and of a tensor its shape and mean."""
        parts = {name: _short(value) for name, value in _parts(self).items()}
        return f"<{type(self).__name__}: {', '.join(f'{name} {text}' for name, text in parts.items() if text)}>"

    def _repr_html_(self) -> str:
        return as_html(repr(self), data_frame(self))


def _short(value: Any) -> str:
    """A part of a result in a line; empty where nothing short can be said of it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return f"{value.item():.4g}"
    if isinstance(value, Tensor):
        mean = "" if value.numel() == 0 else f" of mean {float(value.double().mean()):.4g}"
        return f"{tuple(value.shape)}{mean}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and not value:
        return ""
    if _is_interval(value):
        return f"{value.value:.4g} [{value.lower:.4g}, {value.upper:.4g}]"
    if isinstance(value, Mapping):
        return f"of {', '.join(str(name) for name in value)}"
    return repr(value) if _is_short(value) or hasattr(value, "standard_error") else ""


def _is_interval(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "upper") and isinstance(value[0], float)


def data_frame(result: Any) -> pd.DataFrame:
    """A result as a data frame: a row for each data point and a column for each number it has, or one row in all.

    Args:
        result: A dataclass, named tuple or mapping whose tensors have one first dimension; an estimate in it gives two
            columns, and its standard error the ending ``_se``. One of numbers alone gives one row, with the ends
            ``_lower`` and ``_upper`` of intervals; a list of such results one row each.

    Raises:
        TypeError: If it holds no numbers.
    """
    import pandas as pd

    if _is_records(result):
        return pd.concat([data_frame(one) for one in result], ignore_index=True)
    columns = _columns(result)
    lengths = [len(column) for column in columns.values()]
    if not lengths:
        return _one_row(result)
    longest = max(lengths)
    return pd.DataFrame({name: column for name, column in columns.items() if len(column) == longest})


def _one_row(result: Any) -> pd.DataFrame:
    import pandas as pd

    if numbers := _numbers(result):
        return pd.DataFrame({name: [value] for name, value in numbers.items()})
    for value in _parts(result).values():
        if _is_records(value):
            return data_frame(value)
    raise TypeError(f"expected a result with numbers, got {type(result).__name__}")


def _columns(result: Any, prefix: str = "") -> dict[str, Any]:
    """Columns by name of what a result holds."""
    import pandas as pd

    found: dict[str, Any] = {}
    for name, value in _parts(result).items():
        if isinstance(value, Tensor) and value.dim() > 0:
            rows = value.detach().cpu().flatten(1) if value.dim() > 1 else value.detach().cpu()[:, None]
            ends = [""] if rows.shape[1] == 1 else [f"[{k}]" for k in range(rows.shape[1])]
            found |= {f"{prefix}{name}{end}": rows[:, k].numpy() for k, end in enumerate(ends)}
        elif isinstance(value, tuple) and hasattr(value, "standard_error") and isinstance(value[0], Tensor):
            pair = _columns({name: value[0], f"{name}_se": value[1]}, prefix)
            found |= pair
        elif _is_column(value):
            found[f"{prefix}{name}"] = list(value)
        elif isinstance(value, Mapping) and _is_column(list(value.values())):
            found[f"{prefix}{name}"] = pd.Series(dict(value))
        elif is_dataclass(value):
            found |= _columns(value, f"{prefix}{name}_")
    return found


def _is_column(value: Any) -> bool:
    many = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return many and not _is_interval(value) and all(isinstance(part, str | float | int) for part in value)


def _is_records(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(_parts(part) for part in value)


def _numbers(result: Any) -> dict[str, float | str]:
    """Single numbers and words by name of what a result holds; intervals with their ends."""
    found: dict[str, float | str] = {}
    for name, value in _parts(result).items():
        if isinstance(value, str | float | int):
            found[name] = value
        elif isinstance(value, Tensor):
            found[name] = value.item()
        elif _is_interval(value):
            found |= {name: value.value, f"{name}_lower": value.lower, f"{name}_upper": value.upper}
    return found


def _parts(result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    return result._asdict() if hasattr(result, "_asdict") else {}


def first_line(error: BaseException, *, named: bool = True) -> str:
    """What an error says, shortly.

    Args:
        error: The error.
        named: After the name of its type.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return f"{type(error).__name__}: {lines[0][:200]}" if named else lines[0][:200]

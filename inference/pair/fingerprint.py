"""What tells two computations apart: configuration, classes, constants and data, and the log joint at probe points."""

from __future__ import annotations

import functools
import math
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.distributions.utils import lazy_property

from inference.core.seeding import random_state
from inference.core.storage import tensor_digest
from inference.pair.draw import Draw

# Packages whose functions and classes are known by their name; what functions of others refer to is looked at.
_LIBRARIES = {"builtins", "functools", "guides", "inference", "math", "numpy", "pyro", "scipy", "torch", "zoo"}

# What modules and objectives hold that is no setting.
_NO_SETTINGS = {*vars(nn.Module()), "store_name"}
_COUNTERS = {"step", "max_plate_nesting", "_warned"}
_CHANGES = "changes when it runs"
# The key of a description under which an iterator's class is; at which place one stands cannot be seen.
ITERATOR = "iterator"
_PROBED = 8


def described(value: Any, *, values: bool = True) -> Any:
    """Everything about a value that can change a result, as JSON values.

    Modules by their classes, attributes, buffers and parameters; functions by their name, constants, defaults and what
    they refer to; other objects by class and attributes. What a function does beyond its constants shows in
    :func:`probe`.

    Args:
        value: Any object.
        values: Whether the values of parameters and persistent buffers count, or their names and shapes alone.
    """
    return _Description(values).of(value)


def python_state(parts: Mapping[str, Any], modules: Iterable[nn.Module]) -> dict[str, Any]:
    """What must stay as it is for a recorded run to hold, as far as it can be seen: all but the values of parameters.

    Args:
        parts: Programs, and what else is run, by name.
        modules: Modules among them.
    """
    modules = list(modules)
    generator = np.random.get_state(legacy=False)  # noqa: NPY002 - what a program may use
    return {
        **{name: described(part, values=False) for name, part in parts.items()},
        "modes": [part.training for module in modules for part in module.modules()],
        "the state of random": hash(random.getstate()),
        "the state of numpy.random": repr(described(generator)),
    }


class _Description:
    """One description: objects that occur twice are described once."""

    def __init__(self, values: bool) -> None:
        self.values, self.seen = values, dict[int, Any]()

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, Tensor):
            return self._tensor(value, self.values or not value.requires_grad)
        if isinstance(value, np.ndarray):
            return [str(value.dtype), list(value.shape), tensor_digest(torch.from_numpy(_as_bytes(value)))]
        if isinstance(value, torch.dtype | torch.device | complex | bytes | np.generic):
            return repr(value)
        if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
            return name_of(value)
        if isinstance(value, types.MethodType):
            return {"method": value.__func__.__qualname__, "of": self.of(value.__self__)}
        if id(value) in self.seen:
            return f"the {list(self.seen).index(id(value))}th"
        self.seen[id(value)] = value
        return self._object(value)

    def _object(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.of(item) for key, item in value.items()}
        if isinstance(value, list | tuple | deque):
            return [self.of(item) for item in value]
        if isinstance(value, Iterator):
            return {ITERATOR: name_of(value)}
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return {"partial": self.of(value.func), "args": self.of(value.args), "keywords": self.of(value.keywords)}
        if isinstance(value, nn.Module):
            return self._module(value)
        return {"class": name_of(value)} | self._attributes(value) | self._methods(type(value))

    def _tensor(self, value: Tensor, with_values: bool) -> list[Any]:
        return [str(value.dtype), list(value.shape), *([tensor_digest(value)] if with_values else [])]

    def _module(self, module: nn.Module) -> dict[str, Any]:
        parameters = {name: self._tensor(p, self.values) for name, p in module._parameters.items() if p is not None}
        buffers = {
            name: self._tensor(b, self.values or name in module._non_persistent_buffers_set)
            for name, b in module._buffers.items()
            if b is not None
        }
        children = {name: self.of(child) for name, child in module._modules.items()}
        own = {"class": name_of(module)} | self._attributes(module) | self._methods(type(module))
        parts = {"parameters": parameters, "buffers": buffers, "modules": children}
        return own | {name: part for name, part in parts.items() if part}

    def _attributes(self, value: Any) -> dict[str, Any]:
        kind: Any = type(value)
        home = kind.__module__
        if home.startswith(("pyro.poutine", "networkx", "torch._")) or home.split(".")[0] in sys.stdlib_module_names:
            return {}
        if isinstance(value, torch.optim.Optimizer):
            return {"defaults": self.of(value.defaults)}
        left_out = _NO_SETTINGS if isinstance(value, nn.Module) else {"optimizer"}
        left_out = left_out | (_COUNTERS if isinstance(value, ELBO) else set())
        slots = {name: getattr(value, name) for name in _slots(kind) if hasattr(value, name)}
        held, caches = slots | getattr(value, "__dict__", {}), _caches(kind)
        return {
            name: self.of(item)
            for name, item in held.items()
            if name not in left_out and not name.startswith("_pyro") and name not in caches
        }

    def _methods(self, cls: type) -> dict[str, Any]:
        """Functions of classes that are in no library, which may refer to constants of their module, and attributes."""
        own = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in _LIBRARIES]
        found = {
            f"{c.__name__}.{n}": f for c in own for n, f in vars(c).items() if not n.startswith("__") or callable(f)
        }
        kinds = types.FunctionType | bool | int | float | str | list | dict | Tensor
        return {name: self.of(f) for name, f in found.items() if isinstance(f, kinds)}

    def _function(self, function: types.FunctionType) -> dict[str, Any]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        parts = {
            "function": name_of(function),
            "defaults": self.of(function.__defaults__),
            "keywords": self.of(function.__kwdefaults__),
            "attributes": {name: self.of(item) for name, item in vars(function).items() if name != "__wrapped__"},
            "closure": {name: self._cell(cell) for name, cell in cells},
        }
        if function.__module__.split(".")[0] in _LIBRARIES:
            return parts
        constants = [c for c in _constants(function.__code__) if c != repr(function.__doc__)]
        names = {n for code in _codes(function.__code__) for n in code.co_names if n in function.__globals__}
        refers = {n: self.of(function.__globals__[n]) for n in sorted(names)}
        return parts | {"constants": constants, "globals": refers}

    def _cell(self, cell: types.CellType) -> Any:
        try:
            return self.of(cell.cell_contents)
        except ValueError:  # not filled yet
            return None


def name_of(value: Any) -> str:
    """The full name of a function, a class, or an object's class."""
    named = value if hasattr(value, "__qualname__") or isinstance(value, types.ModuleType) else type(value)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', getattr(named, '__name__', ''))}"


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8).copy()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _constants(code: types.CodeType) -> list[str]:
    constants = [c for part in _codes(code) for c in part.co_consts if not isinstance(c, types.CodeType)]
    return [repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c) for c in constants]  # their order is no one's


@functools.lru_cache(maxsize=1024)
def _slots(cls: type) -> list[str]:
    """The names of the values that objects of users' classes keep outside a dictionary."""
    users = [vars(c).get("__slots__", ()) for c in cls.__mro__ if c.__module__.split(".")[0] not in _LIBRARIES]
    names = [name for own in users for name in ((own,) if isinstance(own, str) else own)]
    return [name for name in names if not name.startswith("__")]


@functools.lru_cache(maxsize=1024)
def _caches(cls: type) -> set[str]:
    """The names under which objects of a class keep what they have computed once."""
    kinds = lazy_property | functools.cached_property
    return {name for c in cls.__mro__ for name, value in vars(c).items() if isinstance(value, kinds)}


def probe(run: Callable[[], Draw]) -> list[float] | None:
    """Log-densities of both halves of a pair at a fixed draw: of the first data points, and in the mean.

    Args:
        run: Runs the pair, or the model alone, once.

    Returns:
        The numbers; None where the pair cannot be run so.
    """
    with random_state(0), torch.no_grad():
        try:
            draw = run()
            terms = [draw.log_joint[0], *([draw.log_guide[0]] if draw.guide_sites else [])]
        except (ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError, LookupError):
            return None
    return [float(v) for term in terms for v in (*term[:_PROBED].double(), term.double().mean())]


def same_numbers(a: list[float] | None, b: list[float] | None, dtype: torch.dtype) -> bool:
    """Whether two probes agree within rounding; one that is missing agrees with all."""
    if a is None or b is None:
        return True
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))


def unchanged(before: Any, after: Any) -> Any:
    """The description of something before it ran, with what the run changed (counters, caches) marked as such."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {key: unchanged(item, after[key]) for key, item in before.items() if key in after}
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [unchanged(a, b) for a, b in zip(before, after, strict=True)]
    return before if before == after else _CHANGES


def differences_of(expected: Any, got: Any, name: str = "") -> list[str]:
    """What differs between two descriptions, each as ``"place: expected, got"``."""
    if expected == got:
        return []
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = [*expected, *(key for key in got if key not in expected)]
        parts = [differences_of(expected.get(k), got.get(k), f"{name}.{k}" if name else str(k)) for k in keys]
        return [text for part in parts for text in part]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        parts = [differences_of(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(expected, got, strict=True))]
        return [text for part in parts for text in part]
    return [f"{name}: expected {_short(expected)}, got {_short(got)}"]


def iterators_in(description: Any) -> list[str]:
    """The classes of the iterators in a description."""
    if isinstance(description, dict):
        own = [description[ITERATOR]] if list(description) == [ITERATOR] else []
        return own + [found for item in description.values() for found in iterators_in(item)]
    return [found for item in description for found in iterators_in(item)] if isinstance(description, list) else []


def say_differences(expected: Any, got: Any) -> str:
    """The first differences of two descriptions, as the end of a sentence."""
    found = differences_of(expected, got)
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

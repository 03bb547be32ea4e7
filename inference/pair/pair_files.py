"""Files of pairs: their weights, how to build them again, and what else they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.core.files import AnyPath, Unreadable, reading
from inference.core.storage import load_tree, save_tree
from inference.pair.autoguide_files import AUTOGUIDES, autoguide_config, build_autoguide
from inference.pair.fingerprint import described, name_of, say_differences
from inference.pair.module import Module

_KIND = "a file written by save_pair"

# Bytes that building a module from its file may take beyond a multiple of the file's weights.
_BUILDING = 2**26


def save_pair(path: AnyPath, model: nn.Module, guide: nn.Module) -> None:
    """Write the weights of a pair, and how to build it again, to one file.

    Warning:
        What is saved is the ``state_dict`` of the two modules. A tensor that a ``pyro.param`` statement keeps in Pyro's
        store is not in it.

    Args:
        path: File to replace, atomically; its suffix is usually ``.safetensors``.
        model: Pyro model.
        guide: Pyro guide; of an AutoGuide the data of its first call are written, too, which it is built again from.

    Raises:
        TypeError: If a half is not an ``nn.Module``.
        OSError: If the file cannot be written.
    """
    halves = {"model": model, "guide": guide}
    for half, module in halves.items():
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"expected the {half} to be an nn.Module, got {type(module).__name__}: write a function or method as "
                "the forward of a module, whose weights can be saved"
            )
    save_tree(path, {half: _describe(module, model) for half, module in halves.items()})


def load_pair(
    path: AnyPath, model: nn.Module | None = None, guide: nn.Module | None = None
) -> tuple[nn.Module, nn.Module]:
    """Read a pair that :func:`save_pair` wrote.

    Args:
        path: The file.
        model: An instance to load the weights into; None builds one from the file.
        guide: Likewise.

    Returns:
        The model and the guide, on the CPU unless instances were given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of an older version, holds another class, configuration or constants than
            a given instance has, or a half that is not imported or not rebuildable; all with the file's name.
    """
    tree = load_tree(path, _KIND)
    with reading(path, _KIND):
        if not isinstance(tree, dict) or set(tree) != {"model", "guide"}:
            raise Unreadable("has another content")
        model = _restore(tree["model"], model, {})
        return model, _restore(tree["guide"], guide, {"<model>": model})


def _describe(module: nn.Module, model: nn.Module) -> dict[str, Any]:
    try:
        config = module.config() if isinstance(module, Module) else autoguide_config(module, model)
    except NotImplementedError:
        config = None
    floating = {b.dtype for b in module.buffers() if b.dtype.is_floating_point} or {torch.get_default_dtype()}
    dtypes = {p.dtype for p in module.parameters()} or floating
    return {
        "class": name_of(module),
        "config": config,
        "form": _form(module),
        "dtype": str(dtypes.pop()) if len(dtypes) == 1 else None,
        "frozen": [key for key, parameter in module.named_parameters() if not parameter.requires_grad],
        "state": dict(module.state_dict()),
    }


def _form(module: nn.Module) -> Any:
    """What a module is beside its weights."""
    return described(module, values=False)


def _restore(saved: dict[str, Any], module: nn.Module | None, references: dict[str, nn.Module]) -> nn.Module:
    got = saved["class"] if module is None else name_of(module)
    if got != saved["class"]:
        raise Unreadable(f"holds another class: expected an instance of {saved['class']} to load into, got {got}")
    if module is None:
        module = _build(saved, references)
    elif form := say_differences(_without_dtypes(saved["form"]), _without_dtypes(_form(module))):
        raise Unreadable(f"holds another {got}: the saved weights do not fit this one, {form}")
    try:
        module.load_state_dict(saved["state"])
    except RuntimeError as error:
        raise Unreadable(f"holds another {got}: the saved weights do not fit this one: {error}") from error
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key not in saved["frozen"])
    return module


def _without_dtypes(form: Any) -> Any:
    """A form without dtypes: weights are loaded into a module of any."""
    if isinstance(form, dict):
        return {key: _without_dtypes(item) for key, item in form.items()}
    if isinstance(form, list):
        return [_without_dtypes(item) for item in form if not (isinstance(item, str) and item.startswith("torch."))]
    return form


def _build(saved: dict[str, Any], references: dict[str, nn.Module]) -> nn.Module:
    if saved["config"] is None:
        raise Unreadable(
            f"is not enough: {saved['class']} cannot be rebuilt from the file alone: build one as it was and pass it "
            "to load_pair"
        )
    known = {name_of(c): c for c in _subclasses(Module)}
    if saved["class"] not in known and saved["class"] not in AUTOGUIDES:
        raise Unreadable(f"cannot be loaded yet: the file holds a {saved['class']}: import its module before loading")
    with _Limited(saved.get("state", {})):
        if saved["class"] in AUTOGUIDES:
            module = build_autoguide(saved["class"], saved["config"], references["<model>"])
        else:
            config = {key: _argument(value, references) for key, value in saved["config"].items()}
            module = known[saved["class"]](**config)
    dtypes = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
    return module.to(dtypes[saved["dtype"]]) if saved["dtype"] in dtypes else module


class _Limited(TorchDispatchMode):
    """Refuses to make far more than the weights of a file: its configuration then belongs to another one."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.left = _BUILDING + 64 * sum(tensor.nbytes for tensor in state.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and not any(isinstance(a, torch.Tensor) for a in tree_leaves((args, kwargs))):
            self._take(func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": None}))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._take(result)
        return result

    def _take(self, made: Any) -> None:
        self.left -= sum(max(t.nbytes, 1024) for t in tree_leaves(made) if isinstance(t, torch.Tensor))
        if self.left < 0:
            raise Unreadable("is damaged: its configuration builds a module far larger than its weights")


def _argument(value: Any, references: dict[str, nn.Module]) -> Any:
    """A constructor argument: what a reference stands for, a module of its own, or the value itself."""
    if isinstance(value, dict) and set(value) == {"class", "config"}:
        return _build(value | {"dtype": None}, references)
    return references.get(value, value) if isinstance(value, str) else value


def _subclasses(cls: type[Module]) -> Iterator[type[Module]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)

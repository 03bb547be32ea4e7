"""Files that are written atomically and never unpickled: tensors in safetensors, everything else as JSON in the header.

One file holds both (the JSON sits in the safetensors header), so that one atomic rename replaces it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inference.core.module import Module

_TENSOR = "__tensor__"


_TUPLE = "__tuple__"


_ITEMS = "__items__"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path next to ``path`` that replaces it when the block succeeds, and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and JSON values to one file, atomically.

    Args:
        path: File to replace.
        tree: What to write. Dict keys are strings or integers.

    Raises:
        TypeError: If a leaf is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, tensors))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"tree": text})


def load_tree(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save_tree` wrote; tensors arrive on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or not of this kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a saved file at {path}, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "tree" not in metadata:
                raise ValueError(f"expected a file written by save_tree, got {path} without its header")
            return _decode(json.loads(metadata["tree"]), file.get_tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def _encode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        key = str(len(tensors))
        tensors[key] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: key}
    if isinstance(node, dict):
        return {_ITEMS: [[key, _encode(value, tensors)] for key, value in node.items()]}
    if isinstance(node, tuple):
        return {_TUPLE: [_encode(value, tensors) for value in node]}
    if isinstance(node, list):
        return [_encode(value, tensors) for value in node]
    if node is None or isinstance(node, str | int | float | bool):
        return node
    raise TypeError(f"expected tensors and JSON values to save, got {type(node).__name__}")


def _decode(node: Any, get_tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(value, get_tensor) for value in node]
    if not isinstance(node, dict):
        return node
    if _TENSOR in node:
        return get_tensor(node[_TENSOR])
    if _TUPLE in node:
        return tuple(_decode(value, get_tensor) for value in node[_TUPLE])
    return {key: _decode(value, get_tensor) for key, value in node[_ITEMS]}


def save_pair(path: str | os.PathLike[str], model: nn.Module, guide: nn.Module) -> None:
    """Write the weights of a pair, and how to build it again, to one file.

    Warning:
        What is saved is the ``state_dict`` of the two modules. A tensor that a ``pyro.param`` statement keeps in Pyro's
        store is not in it.

    Args:
        path: File to replace, atomically; its suffix is usually ``.safetensors``.
        model: Pyro model.
        guide: Pyro guide.

    Raises:
        TypeError: If a half is not an ``nn.Module``.
    """
    halves = {"model": model, "guide": guide}
    for half, module in halves.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected the {half} to be an nn.Module, got {type(module).__name__}")
    save_tree(path, {half: _describe(module) for half, module in halves.items()})


def load_pair(
    path: str | os.PathLike[str], model: nn.Module | None = None, guide: nn.Module | None = None
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
        ValueError: If the file is damaged, holds another class, or one that is not imported or not rebuildable.
    """
    tree = load_tree(path)
    if not isinstance(tree, dict) or set(tree) != {"model", "guide"}:
        raise ValueError(f"expected a file written by save_pair, got {path} with another content")
    model = _restore(tree["model"], model, {})
    return model, _restore(tree["guide"], guide, {"<model>": model})


def _describe(module: nn.Module) -> dict[str, Any]:
    try:
        config = module.config() if isinstance(module, Module) else None
    except NotImplementedError:
        config = None
    dtypes = {p.dtype for p in module.parameters()} or {torch.get_default_dtype()}
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    dtype = str(dtypes.pop()) if len(dtypes) == 1 else None
    frozen = [key for key, parameter in module.named_parameters() if not parameter.requires_grad]
    return {"class": name, "config": config, "dtype": dtype, "frozen": frozen, "state": dict(module.state_dict())}


def _restore(saved: dict[str, Any], module: nn.Module | None, references: dict[str, nn.Module]) -> nn.Module:
    if module is None:
        module = _build(saved, references)
    got = f"{type(module).__module__}.{type(module).__qualname__}"
    if got != saved["class"]:
        raise ValueError(f"expected an instance of {saved['class']} to load into, got {got}")
    try:
        module.load_state_dict(saved["state"])
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(key not in saved["frozen"])
    except RuntimeError as error:
        raise ValueError(f"the saved weights do not fit this {got}: {error}") from error
    return module


def _build(saved: dict[str, Any], references: dict[str, nn.Module]) -> nn.Module:
    if saved["config"] is None:
        raise ValueError(
            f"{saved['class']} cannot be rebuilt from the file alone: build one as it was and pass it to load_pair"
        )
    known = {f"{c.__module__}.{c.__qualname__}": c for c in _subclasses(Module)}
    if saved["class"] not in known:
        raise ValueError(f"the file holds a {saved['class']}: import its module before loading")
    config = {key: _argument(value, references) for key, value in saved["config"].items()}
    module = known[saved["class"]](**config)
    dtypes = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
    return module.to(dtypes[saved["dtype"]]) if saved["dtype"] in dtypes else module


def _argument(value: Any, references: dict[str, nn.Module]) -> Any:
    """A constructor argument: what a reference stands for, a module of its own, or the value itself."""
    if isinstance(value, dict) and set(value) == {"class", "config"}:
        return _build(value | {"dtype": None}, references)
    return references.get(value, value) if isinstance(value, str) else value


def _subclasses(cls: type[Module]) -> Iterator[type[Module]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)

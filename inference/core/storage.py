"""Files of tensors and JSON values, written atomically, with a digest over their content, and never unpickled.

A file is in the safetensors format: the tensors, one of which holds the JSON text that says where they belong. The
header holds the version of this layout, and the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safe
from torch import Tensor

from inference.core.files import AnyPath, Unreadable, atomic_path, reading
from inference.core.sources import blocks_of

_TENSOR = "__tensor__"


_TUPLE = "__tuple__"


_ITEMS = "__items__"

_FORMAT = "elbozoo 2"

_TREE = "tree"


def save_tree(path: AnyPath, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and JSON values to one file, atomically.

    Args:
        path: File to replace.
        tree: What to write. Dict keys are strings or integers.

    Raises:
        TypeError: If a leaf is neither a tensor nor a JSON value.
        OSError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, tensors)).encode()
    tensors[_TREE] = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
    content = safe.save(tensors, {"format": _FORMAT, "sha256": _digest(tensors)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def load_tree(path: AnyPath, what: str = "a saved file") -> Any:
    """Read what :func:`save_tree` wrote; tensors arrive on the CPU, as copies of their own.

    Args:
        path: The file.
        what: What to call it in errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not of this kind, or of an older version.
    """
    with reading(path, what):
        content = Path(path).read_bytes()
        try:
            tensors = safe.load(content)
        except SafetensorError as error:
            raise Unreadable(f"is damaged or no safetensors file: {error}") from error
        _check_header(content, tensors)
        return _decode(json.loads(tensors[_TREE].numpy().tobytes()), tensors)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal; read block by block."""
    total = hashlib.sha256()
    for block in blocks_of(tensor.detach()):
        total.update(_bytes(block))
    return total.hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts one after the other, with their lengths, in hexadecimal."""
    total = hashlib.sha256()
    for text in texts:
        content = text.encode()
        total.update(b"%d " % len(content))
        total.update(content)
    return total.hexdigest()


def _check_header(content: bytes, tensors: dict[str, Tensor]) -> None:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if _TREE in metadata:
        raise Unreadable("was written by an older version, before 0.2.0, without a digest: write it anew")
    if metadata.get("format") != _FORMAT:
        raise Unreadable(f"was not written by this library: its header has no format {_FORMAT!r}")
    if metadata.get("sha256") != _digest(tensors):
        raise Unreadable("is damaged: its content is not that of its digest")


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if _TENSOR in node:
        return tensors[node[_TENSOR]]
    if _TUPLE in node:
        return tuple(_decode(value, tensors) for value in node[_TUPLE])
    return {key: _decode(value, tensors) for key, value in node[_ITEMS]}

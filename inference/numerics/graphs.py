"""Flat graphs of tensor operations: what a Python function does to tensors, recorded once and replayed without Python.

Every tensor that is named as an input is one by identity, so that a program is recorded as it stands: its parameters
and buffers need not be swapped, and what it changes in place is changed in place by the replay.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Replay = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# In the order of their numbers.
_MEMORY_FORMATS = [torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d]

_READ = torch.ops.aten._local_scalar_dense.default
# What hands a tensor's numbers to Python without an operation.
_HANDS_OVER = {getattr(Tensor, name) for name in ("numpy", "tolist", "__array__", "__dlpack__", "__repr__")}
# Raises an error where a number is not zero.
_CHECK = torch.ops.aten._linalg_check_errors.default
# What stands for an operation whose result has no memory of its own, or shares it with a constant.
_INSTEAD = {
    torch.ops.aten._efficientzerotensor.default: torch.ops.aten.zeros.default,
    torch.ops.aten.lift_fresh.default: torch.ops.aten.clone.default,
}

# Where a node notes the shape, the dtype and the device of its result.
_FORM = "form"

# Where it notes the result itself, if that depends on the shapes of what it is given alone; and such operations.
_VALUE = "value"
_OF_SHAPES = {getattr(torch.ops.aten, name).default for name in ("zeros_like", "ones_like", "full_like")}
_OF_SHAPES |= {getattr(torch.ops.aten, name).default for name in ("new_zeros", "new_ones", "new_full")}

# Operations that change the shape alone.
_SHAPING = {getattr(torch.ops.aten, name).default for name in ("view", "_unsafe_view", "expand", "alias")}

# Dtypes and devices in which an operation has the same bits for a number as for a tensor of it.
_EXACT = [(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.float64)]

# Operations that compute in the dtype of what they are given first, and may be given a number second: those of tensors.
_OF_TENSORS = {
    getattr(getattr(torch.ops.aten, name), overload): getattr(torch.ops.aten, name).Tensor
    for name in ("add", "sub", "mul", "div", "_foreach_add_")
    for overload in ("Tensor", "Scalar")
}

# The places of arguments that operations return unchanged where others, by their places, are such numbers.
_aten = torch.ops.aten
_WITHOUT_EFFECT: dict[Any, list[tuple[int, dict[int, float]]]] = {
    _aten.mul.Tensor: [(0, {1: 1.0}), (1, {0: 1.0})],
    _aten.div.Tensor: [(0, {1: 1.0})],
    _aten.add.Tensor: [(0, {1: 0.0}), (1, {0: 0.0})],
    _aten.sub.Tensor: [(0, {1: 0.0})],
    _aten.pow.Tensor_Scalar: [(0, {1: 1.0})],
    _aten.addcmul.default: [(1, {0: 0.0, 2: 1.0}), (2, {0: 0.0, 1: 1.0})],
}


# Compiled graphs, by what they say and by the forms of what they are given: the last ones.
_COMPILED: dict[tuple[str, str], Callable[..., Sequence[Tensor]]] = {}
_MOST_COMPILED = 32

# How a recorded function runs, see :func:`inference.fit`.
Level = Literal["auto", "off", "graph", "compile"]


def check_capture(level: Any) -> None:
    """Refuse what is no level of capture.

    Raises:
        ValueError: With those that there are.
    """
    if level not in get_args(Level):
        raise ValueError(f"expected capture as one of {', '.join(map(repr, get_args(Level)))}, got {level!r}")


class FlatGraph(NamedTuple):
    """A recorded function.

    Attributes:
        graph: From the inputs to the results; then, if it assumes something, whether that holds; then draws of noise
            that nothing uses, without which the draws after them would be others.
        constants: Other tensors that it refers to, by name.
        assumes: Whether the function read truth values, as for a branch or for a check of a distribution's arguments.
    """

    graph: Graph
    constants: dict[str, Tensor]
    assumes: bool


def flat_graph(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> FlatGraph:
    """The operations of a function on tensors, as a graph from the inputs to its results; it is run once.

    Args:
        function: Computes on the very tensors of ``inputs``.
        inputs: Every tensor that may be another one, or have other values, at a replay.

    Raises:
        RuntimeError: If the function reads numbers from tensors, or makes tensors whose shapes depend on values; or
            any other error of the function.
    """
    recorder = _Recorder(inputs)
    with recorder, _Guard(recorder) as guard, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the function has been run before, and has warned then
        results = list(function())
        guard.check()
        results += [recorder.holds()] if recorder.read else []
    return FlatGraph(recorder.graph(results), recorder.constants, bool(recorder.read))


def scripted(flat: FlatGraph) -> Replay:
    """A replay of a graph from C++, without a compiler; operation by operation what the graph says.

    Raises:
        RuntimeError: If an operation takes what has no name in TorchScript, such as a generator of one's own.
    """
    script = _Script(flat)
    function = torch._C._create_function_from_graph("replay", script.graph)

    def replay(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        # Its optimisations split operations, which changes the rounding.
        with torch.no_grad(), torch.jit.optimized_execution(False):
            return function(*tensors, *script.constants)

    return replay


def folded(flat: FlatGraph, *, constants: bool = True) -> FlatGraph:
    """A graph with the results of another, bit by bit, that computes nothing in vain.

    What does not vary is computed once, what is computed twice as well, and what changes nothing is left out, as a
    product with one. A graph that changes tensors in place stays as it is.

    Args:
        flat: The graph.
        constants: Whether its constants stay as they are between replays.
    """
    if any(_is_mutable(node) for node in flat.graph.nodes):
        return flat
    values = _fixed_values(flat, constants)
    return FlatGraph(*_Folding(values).graph_of(flat), flat.assumes)


class _Folding:
    """Copies a graph without what need not be computed.

    Args:
        values: Results that are known.
    """

    def __init__(self, values: dict[Node, Any]) -> None:
        self._values, self._copies = values, dict[Node, Node]()
        self._made, self._constants, self._graph = dict[str, Node](), dict[str, Tensor](), Graph()

    def graph_of(self, flat: FlatGraph) -> tuple[Graph, dict[str, Tensor]]:
        """The copy, and the constants that it refers to."""
        for node in flat.graph.nodes:
            if node.op == "get_attr" and node not in self._values:
                self._copies[node] = self._constant(flat.constants[node.target])
            elif node not in self._values:
                self._copies[node] = self._copied(node)
        _drop_unused(self._graph)
        return self._graph, self._constants

    def _copied(self, node: Node) -> Node:
        if (same := _transposed_twice(node)) is not None:
            return self._copy(same)
        if _is_result(node) or _is_noise(node) or node.op != "call_function":
            return self._graph.node_copy(node, self._copy)
        if (same := _same_as(node, self._values)) is not None:
            return self._copy(same)
        key = repr((node.target, *map_arg((node.args, node.kwargs), self._copy)))
        if key not in self._made:
            self._made[key] = self._graph.node_copy(node, self._copy)
        return self._made[key]

    def _copy(self, node: Node) -> Node:
        if node not in self._copies:
            self._copies[node] = self._constant(self._values[node])
        return self._copies[node]

    def _constant(self, tensor: Tensor) -> Node:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = tensor
        return self._graph.get_attr(name)


def compiled(flat: FlatGraph) -> Replay:
    """A replay of a graph by inductor, which fuses operations and so rounds otherwise; it compiles at the first call.

    A graph that says the same as an earlier one, of tensors of the same forms, is not compiled again. Noise is drawn as
    eager operations draw it. The calls fail where no compiler is found.
    """
    graph, constants = _constants_as_inputs(flat)
    made = list[Callable[..., Sequence[Tensor]]]()

    def replay(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = [*tensors, *constants]
        with torch.no_grad():
            if not made:
                made.append(_compiled_once(graph, inputs))
            return made[0](*inputs)

    return replay


def _constants_as_inputs(flat: FlatGraph) -> tuple[Graph, list[Tensor]]:
    """The graph with its constants as further inputs, which come after the others, and the constants."""
    graph, copies, inputs = Graph(), dict[Node, Node](), dict[str, Node]()
    for node in flat.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for node in flat.graph.find_nodes(op="get_attr"):
        if node.target not in inputs:
            inputs[node.target] = graph.placeholder(node.target)
        copies[node] = inputs[node.target]
    for node in flat.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph, [flat.constants[name] for name in inputs]


def _compiled_once(graph: Graph, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    forms = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs]
    key = graph.python_code("self").src, repr(forms)
    if key not in _COMPILED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _COMPILED[key] = _by_inductor(GraphModule({}, graph), inputs)
        while len(_COMPILED) > _MOST_COMPILED:
            _COMPILED.pop(next(iter(_COMPILED)))
    return _COMPILED[key]


def _by_inductor(module: GraphModule, tensors: list[Any]) -> Callable[..., Sequence[Tensor]]:
    """A compiled module for tensors of these shapes, called from C++ where that can be.

    Nothing checks the shapes again, as ``torch.compile`` does at each call, which takes as long as a small step.
    """
    options: dict[str, Any] = {"fallback_random": True}
    if all(tensor.device.type == "cpu" for tensor in tensors):
        try:
            return torch._inductor.compile(module, tensors, options=options | {"cpp_wrapper": True})
        except Exception:  # an operation that cannot be called so
            pass
    return torch._inductor.compile(module, tensors, options=options)


class _Script:
    """The operations of a graph in TorchScript's terms.

    Attributes:
        graph: From the inputs, and the constants after them, to a tuple of results.
        constants: Tensors that the graph refers to.
    """

    def __init__(self, flat: FlatGraph) -> None:
        graph: Any = torch._C.Graph()
        self.graph, self.constants = graph, list[Tensor]()
        self._values, self._numbers = dict[Node, Any](), dict[tuple[str, torch.dtype | None], Any]()
        nodes = list(flat.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self._values[node] = self.graph.addInput()
        for node in nodes:
            if node.op == "get_attr":
                self._values[node] = self._constant(flat.constants[node.target])
        for node in nodes:
            if node.op == "call_function":
                self._values[node] = self._call(node)
        results = self._insert("prim::ListConstruct", [self._values[node] for node in nodes[-1].args[0]])
        results[0].setType(torch._C.ListType(torch._C.TensorType.get()))
        self.graph.registerOutput(results[0])

    def _call(self, node: Node) -> Any:
        target, arguments = self._of_tensors(node)
        if target is operator.getitem:
            source, i = cast("tuple[Node, int]", arguments)
            values = self._values[source]
            if isinstance(values, list):
                return values[i]
            return self._insert("aten::__getitem__", [values, self.graph.insertConstant(i)])[0]
        schema = target._schema
        given = dict(zip((a.name for a in schema.arguments), arguments, strict=False)) | node.kwargs
        values = [given.get(a.name, a.default_value) for a in schema.arguments]
        if target is torch.ops.aten._to_copy.default and not isinstance(values[0], Node):  # of a number
            values[0] = self._number(values[0], None)
        inputs = [self._value(value, a.type) for value, a in zip(values, schema.arguments, strict=True)]
        outputs = self._insert(schema.name, inputs, len(schema.returns))
        for output, result in zip(outputs, schema.returns, strict=True):
            output.setType(result.type)
        return outputs[0] if len(outputs) == 1 else outputs

    def _of_tensors(self, node: Node) -> tuple[Any, Any]:
        """An operation and its arguments, with a number as a tensor, which need not be made anew at every replay."""
        target, arguments = cast("Any", node.target), cast("Any", node.args)
        if target not in _OF_TENSORS or not isinstance(arguments[1], int | float):
            return target, arguments
        first = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
        if not isinstance(first, Node) or first.meta.get(_FORM, ())[1:] not in _EXACT:
            return target, arguments
        number = self._number(arguments[1], first.meta[_FORM][1])
        return _OF_TENSORS[target], (arguments[0], number, *arguments[2:])

    def _number(self, value: float, dtype: torch.dtype | None) -> Any:
        """A number as a tensor, one for all places where it stands."""
        key = repr(value), dtype  # zero and minus zero are equal
        if key not in self._numbers:
            self._numbers[key] = self._constant(torch.tensor(value, dtype=dtype))
        return self._numbers[key]

    def _constant(self, tensor: Tensor) -> Any:
        """One more input, after all others."""
        self.constants.append(tensor)
        return self.graph.addInput()

    def _insert(self, name: str, inputs: list[Any], num_outputs: int = 1) -> list[Any]:
        node = self.graph.insertNode(self.graph.create(name, inputs, num_outputs))
        return list(node.outputs())

    def _value(self, value: Any, kind: Any) -> Any:
        """A value as one of a kind, of an argument's type, in the graph."""
        if isinstance(value, Node):
            return self._values[value]
        if isinstance(value, torch._C.Value):
            return value
        if kind.kind() == "OptionalType":
            kind = kind if value is None else kind.getElementType()
        if isinstance(value, list | tuple) and (not value or any(isinstance(v, Node | None) for v in value)):
            element = kind.getElementType()
            (made,) = self._insert("prim::ListConstruct", [self._value(v, element) for v in value])
            made.setType(kind)
            return made
        return self.graph.insertConstant(_plain(value, kind))


def _plain(value: Any, kind: Any) -> Any:
    """A constant as TorchScript knows it."""
    if isinstance(value, torch.memory_format):
        return _MEMORY_FORMATS.index(value)
    if isinstance(value, list | tuple):
        return [_plain(item, kind.getElementType()) for item in value]
    return float(value) if kind.kind() == "FloatType" and value is not None else value


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two results have the same bits, NaN included."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def own_memory(tensors: Sequence[Tensor], like: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Tensors in the layout of others, copied where they are not, or share memory with each other or with further ones.

    Args:
        tensors: What is to be a program's own.
        like: Tensors of the layout, one for each.
        others: What none may share memory with.
    """
    taken, results = {_address(tensor) for tensor in others}, []
    for tensor, other in zip(tensors, like, strict=True):
        if tensor.stride() != other.stride() or _address(tensor) in taken:
            tensor = torch.empty_like(other).copy_(tensor)
        taken.add(_address(tensor))
        results.append(tensor)
    return results


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Guard(TorchFunctionMode):
    """Sees what a recorder cannot: numbers of a tensor that go to Python, as a list, an array or a text.

    What Python makes of them would stay as it was, also in a branch that hardly any draw takes.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder, self._found = recorder, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HANDS_OVER and self._recorder.varies(args[0]):
            self._found.append(func.__name__)
            self.check()
        return func(*args, **kwargs or {})

    def check(self) -> None:
        """Refuse what was seen, again where the function went on after that.

        Raises:
            RuntimeError: If anything was.
        """
        if self._found:
            raise RuntimeError(f"the function reads numbers from tensors, by {self._found[0]}")


class _Recorder(TorchDispatchMode):
    """Records every operation while it is active.

    Attributes:
        read: Each truth value that was read from a tensor, with the tensor.
        constants: Tensors that were met and are neither inputs nor results, by name.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.read: list[tuple[Tensor, bool]] = []
        self._graph, self.constants = Graph(), dict[str, Tensor]()
        self._nodes, self._varying = dict[int, Node](), set[int]()
        self._kept: list[Tensor] = []  # an address in use is the address of one tensor
        for i, tensor in enumerate(inputs):
            self._enter(tensor, self._graph.placeholder(f"input_{i}"), varies=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """That nothing here is compiled, so that torch need not load its compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = _INSTEAD.get(func, func), kwargs or {}
        varies = torch.Tag.nondeterministic_seeded in func.tags
        varies |= self._vary((args, kwargs))
        if func is _CHECK:
            self.read.append((args[0], False))
            return func(*args, **kwargs)
        if func is _READ or torch.Tag.data_dependent_output in func.tags:
            return self._value(func, args, kwargs, varies)
        if _has_dynamic_shape(func, args):
            raise RuntimeError(f"the shape of the result of {func} depends on values")
        results = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default:  # another name of the same numbers
            self._enter(results, self._node(args[0]), varies)
            return results
        node = self._graph.call_function(func, *map_aggregate((args, kwargs), self._node))
        if func in _OF_SHAPES:
            node.meta[_VALUE] = results
        if isinstance(results, Tensor):
            self._enter(results, node, varies)
        elif isinstance(results, tuple | list):
            for i, result in enumerate(results):
                if isinstance(result, Tensor):
                    self._enter(result, self._graph.call_function(operator.getitem, (node, i)), varies)
        return results

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor may have other values at a replay."""
        return id(tensor) in self._varying

    def _vary(self, arguments: Any) -> bool:
        found = list[bool]()
        map_aggregate(arguments, lambda leaf: found.append(id(leaf) in self._varying))
        return any(found)

    def holds(self) -> Tensor:
        """Whether all truth values are what they were, a truth value itself."""
        flags = [tensor.all() if value else tensor.any().logical_not() for tensor, value in self.read]
        return torch.stack(flags).all()

    def graph(self, results: Sequence[Tensor]) -> Graph:
        """The graph to the results, and to all noise that nothing uses."""
        wanted = [self._node(result) for result in results]
        noise = [node for node in self._graph.nodes if _is_noise(node)]
        self._graph.output(tuple(wanted))
        _drop_unused(self._graph)
        (output,) = self._graph.find_nodes(op="output")
        output.args = ((*wanted, *(node for node in noise if not node.users)),)
        return self._graph

    def _value(self, func: Any, args: Any, kwargs: Any, varies: bool) -> Any:
        value = func(*args, **kwargs)
        if varies:
            if func is not _READ or args[0].dtype != torch.bool:
                raise RuntimeError("a number is read from a tensor")
            self.read.append((args[0], value))
        return value

    def _enter(self, tensor: Tensor, node: Node, varies: bool) -> None:
        node.meta[_FORM] = tensor.shape, tensor.dtype, tensor.device
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)
        if varies:
            self._varying.add(id(tensor))

    def _node(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            self._enter(value, self._graph.get_attr(name), varies=False)
        return self._nodes[id(value)]


def _drop_unused(graph: Graph) -> None:
    """Leave out what nothing uses, but no noise."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or _is_noise(node))


def _is_mutable(node: Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _is_result(node: Node) -> bool:
    """Whether a replay returns it, or another view of its memory: then it is to be no constant and no input."""
    return any(user.op == "output" or (_is_view(user) and _is_result(user)) for user in node.users)


def _is_view(node: Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return node.target is operator.getitem or any(result.alias_info is not None for result in returns)


def _fixed_values(flat: FlatGraph, constants: bool) -> dict[Node, Any]:
    """The values of all that depends on neither inputs nor noise, nor on constants where these may change."""
    values = dict[Node, Any]()
    for node in flat.graph.nodes:
        if node.op == "get_attr":
            values |= {node: flat.constants[node.target]} if constants else {}
        elif _VALUE in node.meta and not _is_result(node):
            values[node] = node.meta[_VALUE]
        elif _is_computed(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _is_computed(node: Node) -> bool:
    return node.op == "call_function" and not (_is_noise(node) or _is_result(node))


def _same_as(node: Node, values: dict[Node, Any]) -> Node | None:
    """The argument that an operation returns unchanged, as it has no effect; None where it has one."""
    if node.target in _SHAPING:
        kept = list(node.args[:1])
    else:
        rules = _WITHOUT_EFFECT.get(node.target, ())
        kept = [node.args[place] for place, others in rules if _are(node, others, values)]
    form = node.meta.get(_FORM)
    return next((arg for arg in kept if isinstance(arg, Node) and arg.meta.get(_FORM) == form), None)


def _transposed_twice(node: Node) -> Node | None:
    """What a node is another name of, if it is the transpose of a transpose."""
    transpose, source = _aten.t.default, cast("Any", node.args[0] if node.args else None)
    twice = node.target is transpose and source.target is transpose
    return source.args[0] if twice else None


def _are(node: Node, numbers: dict[int, float], values: dict[Node, Any]) -> bool:
    """Whether all arguments of an operation but one are such numbers everywhere, by their places."""
    if node.kwargs or len(node.args) != 1 + len(numbers):
        return False
    return all(_is_all(node.args[place], number, values) for place, number in numbers.items())


def _is_all(value: Any, number: float, values: dict[Node, Any]) -> bool:
    """Whether an argument is a number everywhere."""
    if isinstance(value, Node):
        return value in values and bool((values[value] == number).all())
    return bool(value == number)


def _is_noise(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _has_dynamic_shape(func: Any, args: Any) -> bool:
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is not torch.ops.aten.index.Tensor:
        return True
    return any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None)

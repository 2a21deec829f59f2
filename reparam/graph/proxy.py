"""Traced values.

In-place arithmetic and slice assignment become nodes that return their target, and the Python object that held the
target goes on holding the result, as it does in eager mode. With an example, sizes are concrete.
"""

import dataclasses
import dis
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from reparam.graph.callers import LOOKS_UP, is_asked_for, is_looked_up, is_read_as_attribute, is_spelled
from reparam.graph.splices import ITERATED, Rest, rests

EXAMPLE: Final = "example"  # node.meta: a meta tensor, or a structure of them, of the sizes of the example input
PLAIN: Final = "plain"  # node.meta: the value is a size, a data type, ..., not a tensor


def assign(target: Tensor, index: Any, value: Any) -> Tensor:
    """``target[index] = value``; returns ``target``."""
    target[index] = value
    return target


INPLACE: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "__iadd__": operator.iadd,
        "__isub__": operator.isub,
        "__imul__": operator.imul,
        "__itruediv__": operator.itruediv,
    }
)
METHODS_IN_PLACE: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"add_": operator.iadd, "sub_": operator.isub, "mul_": operator.imul, "div_": operator.itruediv}
)
PLAIN_ATTRIBUTES: Final = frozenset(
    ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad", "itemsize")
)
ATTRIBUTE_KINDS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device, "is_cuda": bool,
        "layout": torch.layout, "requires_grad": bool, "itemsize": int,
    }
)  # fmt: skip
RANK_NAMES: Final = ("ndim", "dim", "ndimension")
PLAIN_CALLS: Final = frozenset(
    (
        "size",
        "dim",
        "numel",
        "nelement",
        "ndimension",
        "len",
        "stride",
        "get_device",
        "is_contiguous",
        "sym_size.int",
        "element_size",
    )
)


class Traced(fx.Proxy):
    """A value of a forward that is being read."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.node = self.tracer.create_proxy("call_function", assign, (self, index, value), {}).node

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "_root"):
            raise TraceError(f"sets {name} of a value")
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What user code is told that it is, as ``functools.singledispatch`` is; other code takes it for what it is."""
        if not is_read_as_attribute():
            return Traced
        if self.node.meta.get(PLAIN):
            return kind_of_plain(self.node) or Traced
        if self.node.op == "placeholder":
            self.tracer.on_question(self.node, None)  # type: ignore[attr-defined]
        return Tensor

    def __hash__(self) -> int:
        if self.node.meta.get(PLAIN) and is_looked_up():
            self.tracer.doubtful = LOOKS_UP  # type: ignore[attr-defined]
        return id(self)

    def __str__(self) -> str:
        if self.node.meta.get(PLAIN) and is_spelled():
            self.tracer.doubtful = LOOKS_UP  # type: ignore[attr-defined]
        return super().__str__()

    def __format__(self, form: str) -> str:
        if self.node.meta.get(PLAIN) and is_spelled():
            self.tracer.doubtful = LOOKS_UP  # type: ignore[attr-defined]
        return super().__str__()

    def __iter__(self) -> Iterator[Any]:
        count = self.tracer.known_length(self.node)  # type: ignore[attr-defined]
        if count is not None:
            elements: Any = self
            return iter([elements[i] for i in range(count)])
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        return _unpacked(self, frame.f_back)

    def __len__(self) -> int:
        count: int | None = self.tracer.known_length(self.node)  # type: ignore[attr-defined]
        if count is None:
            raise TypeError("the length of a value is asked for, and depends on the input")
        return count

    def __bool__(self) -> bool:
        answer: bool = self.tracer.decide(self.node)  # type: ignore[attr-defined]
        return answer

    def __getattr__(self, name: str) -> Any:
        foreign = not hasattr(Tensor, name)
        if (foreign or self.node.op == "placeholder") and not self.node.meta.get(PLAIN) and is_asked_for():
            self.tracer.on_question(self.node, None)  # type: ignore[attr-defined]
            if foreign:
                raise AttributeError(f"a tensor has no {name}")
        if name in METHODS_IN_PLACE:
            return lambda *args, **options: self._add_in_place(name, args, options)
        ranks = self.tracer.ranks  # type: ignore[attr-defined]
        if ranks is not None and name in RANK_NAMES and not self.node.meta.get(PLAIN):
            rank = ranks.rank(self.node)
            return rank if name == "ndim" else lambda: rank
        example = self.node.meta.get(EXAMPLE)
        if isinstance(example, Tensor):
            concrete = _concrete(self, example, name)
            if concrete is not None:
                return concrete
        if name in PLAIN_ATTRIBUTES:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        attribute = super().__getattr__(name)
        if name.endswith("_") and not name.endswith("__"):
            return lambda *args, **kwargs: self._write(attribute(*args, **kwargs))
        return attribute

    def _add_in_place(self, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> "Traced":
        if len(args) != 1 or options.keys() - {"alpha"}:
            return self._write(super().__getattr__(name)(*args, **options))
        other = args[0] if options.get("alpha", 1) == 1 else args[0] * options["alpha"]
        return self._in_place(METHODS_IN_PLACE[name], other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> "Traced":
        return self._write(self.tracer.create_proxy("call_function", function, (self, other), {}))

    def _write(self, result: fx.Proxy) -> "Traced":
        self.node = result.node
        return self


for _name, _function in INPLACE.items():
    setattr(Traced, _name, lambda self, other, _f=_function: self._in_place(_f, other))
for _name, _rounding in {"__ceil__": math.ceil, "__floor__": math.floor}.items():
    setattr(Traced, _name, lambda self, _f=_rounding: self.tracer.create_proxy("call_function", _f, (self,), {}))


def _concrete(value: Traced, example: Tensor, name: str) -> Any:
    """A size or rank that an example fixes; None for everything else."""
    if name in ("shape", "ndim"):
        value.tracer.specialised = True  # type: ignore[attr-defined]
        return getattr(example, name)
    if name in ("size", "dim", "numel", "nelement", "ndimension"):
        value.tracer.specialised = True  # type: ignore[attr-defined]
        return getattr(example, name)
    return None


def kind_of_plain(node: fx.Node) -> type | None:
    """The class of a size, data type or the like; None if it is not known."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is getattr:
        return ATTRIBUTE_KINDS.get(str(node.args[1]))
    if name == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if name in PLAIN_CALLS:
        return {"is_contiguous": bool, "stride": None}.get(str(name), int)
    kinds = [kind_of_plain(a) if isinstance(a, fx.Node) else type(a) for a in node.args]
    if name == "getitem" and kinds[0] is torch.Size:
        return torch.Size if isinstance(node.args[1], slice) else int
    if name in ("add", "sub", "mul", "floordiv", "mod", "ceil", "floor") and kinds and all(k is int for k in kinds):
        return int
    return float if name == "truediv" and all(kind in (int, float) for kind in kinds) else None


def is_plain(kind: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation gives a size, a data type or the like."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if kind == "call_function" and target is getattr:
        return args[1] in PLAIN_ATTRIBUTES
    if kind in ("call_method", "call_function") and name in PLAIN_CALLS:
        return True
    nodes = [a for a in args if isinstance(a, fx.Node)]
    home = getattr(target, "__module__", "")
    return (
        kind == "call_function"
        and home in ("_operator", "math", "builtins")
        and bool(nodes)
        and all(node.meta.get(PLAIN) for node in nodes)
    )


def _unpacked(proxy: Any, frame: FrameType) -> Iterator[Any]:
    """Elements for ``a, b = proxy``: their number stands in the byte code of the caller."""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
            assert isinstance(instruction.argval, int)
            return iter([proxy[i] for i in range(instruction.argval)])
    found = rests(proxy, frame) if proxy.tracer.splices and proxy.node.meta.get(PLAIN) else None
    if found is None:
        raise TraceError(ITERATED)
    return found


def has_traced(value: Any) -> bool:
    """Whether a structure of arguments holds a traced value."""
    kind = type(value)
    if kind is Traced or kind is Rest or issubclass(kind, fx.Proxy):
        return True
    if isinstance(value, dict | Mapping):
        return any(has_traced(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(has_traced(v) for v in value)
    if isinstance(value, slice):
        return has_traced((value.start, value.stop, value.step))
    if hasattr(kind, "__dataclass_fields__"):
        return any(has_traced(getattr(value, name)) for name in kind.__dataclass_fields__)
    return False


def made_of_its_fields(kind: type) -> bool:
    """Whether a data class makes an instance of its fields and nothing else."""
    options = kind.__dataclass_params__  # type: ignore[attr-defined]
    whole = options.init and all(field.init for field in dataclasses.fields(kind))
    own = "__init__" in vars(kind) and "__dataclass_fields__" not in vars(kind)
    return whole and not own and not hasattr(kind, "__post_init__") and "__new__" not in vars(kind)


def meta(value: Any) -> Any:
    """A structure with every tensor on the meta device."""
    if type(value) is not Traced and isinstance(value, Tensor):
        return (
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            if (value.layout is torch.strided)
            else value.to("meta")
        )
    if isinstance(value, Mapping):
        return {k: meta(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [meta(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value

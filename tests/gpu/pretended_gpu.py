"""A GPU that is none: tensors on "cuda" that compute on the CPU, so that a test can train on it on any machine.

As on a GPU, tensors on it do not mix with those of the CPU, and whoever wants a value waits for it: such waits are
noted. Autograd, which would ask CUDA for its streams, sees the tensors as the CPU's. The random numbers are the CPU's.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten


class Pinned(Tensor):
    """A tensor of the CPU in memory that the GPU can read, so that nobody waits for its copy to the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class OnGPU(Tensor):
    """A tensor on the GPU."""

    held: Tensor
    """The values."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made: OnGPU = make(cls, held.size(), **place, dtype=held.dtype, device=CPU)
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        PretendedGPU.current.note_wait("repr")
        return f"OnGPU({self.held})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Let ``nn.Module.to`` swap a parameter for one on another device."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: None, size: Any, stride: Any) -> OnGPU:
        return OnGPU(inner["held"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = (tuple(args), kwargs or {})
        tensors = [value for value in pytree.tree_leaves(given) if isinstance(value, Tensor)]
        PretendedGPU.current.check(func, given[0], tensors)
        on_gpu = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
        held_args, held_kwargs = pytree.tree_map_only(OnGPU, lambda tensor: tensor.held, given)
        result = func(*held_args, **held_kwargs)
        if func is aten.copy_.default and not isinstance(args[0], OnGPU):
            return result  # a copy to the CPU
        return pytree.tree_map_only(
            Tensor, lambda made: on_gpu[id(made)] if id(made) in on_gpu else OnGPU(made), result
        )


@dataclass(frozen=True)
class Wait:
    """A moment at which a program has waited for the GPU."""

    why: str
    stack: list[traceback.FrameSummary]  # the outermost call first

    def is_in(self, functions: Collection[str]) -> bool:
        return any(frame.name in functions for frame in self.stack)

    def __str__(self) -> str:
        *_, own = (frame for frame in self.stack if "/torch/" not in frame.filename)
        return f"{self.why} in {own.name}, {own.filename}:{own.lineno}"


class PretendedGPU(TorchFunctionMode):
    """While it is entered, torch's functions know the GPU, and it notes what its tensors are used for."""

    current: ClassVar[PretendedGPU]

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.num_received = 0  # copies of tensors from the CPU

    def note_wait(self, why: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        self.waits.append(Wait(why, stack))

    def note_received(self, source: Tensor, *, non_blocking: bool) -> None:
        self.num_received += 1
        if not (non_blocking and isinstance(source, Pinned)):
            self.note_wait("a copy to the GPU")

    def check(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Note what an operation does with the GPU's tensors; raise an error if it has those of the CPU, too."""
        if func is aten.copy_.default:
            if not isinstance(args[1], OnGPU):
                self.note_received(args[1], non_blocking=len(args) > 2 and args[2])
            elif not isinstance(args[0], OnGPU):
                self.note_wait("a copy to the CPU")
            return
        of_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
        if any(tensor.dim() > 0 or torch.Tag.pointwise not in func.tags for tensor in of_cpu):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")
        is_indexing = func in (aten.index.Tensor, aten.index_put_.default)
        has_mask = is_indexing and any(index is not None and index.dtype == torch.bool for index in args[1])
        has_unknown_shape = torch.Tag.dynamic_output_shape in func.tags and not is_indexing
        if func is aten._local_scalar_dense.default or has_mask or has_unknown_shape:
            self.note_wait(str(func))

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0].clone().as_subclass(Pinned)
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        if args and isinstance(args[0], OnGPU):
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("a tensor on cuda:0 is no array: use Tensor.cpu()")
            if func is Tensor.tolist:
                self.note_wait("tolist")
                return args[0].held.tolist()
            if func is Tensor.new_tensor:
                made = args[0].held.new_tensor(*args[1:], **kwargs)
                self.note_received(made, non_blocking=False)
                return OnGPU(made)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": CPU})
        if func in (torch.tensor, torch.as_tensor):
            self.note_received(made, non_blocking=False)
        return made if isinstance(made, OnGPU) else OnGPU(made)

    def _moved(self, func: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device: torch.device | None = CPU
        dtype, non_blocking = None, False
        if args and isinstance(args[0], Tensor):
            device, dtype = args[0].device, args[0].dtype
        elif func is Tensor.to:
            kwargs.pop("copy", None)
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        options = {"dtype": dtype or tensor.dtype, "memory_format": kwargs.get("memory_format", torch.preserve_format)}
        if device is None or device.type == tensor.device.type:
            return tensor.to(**options)
        if isinstance(tensor, OnGPU):
            self.note_wait("a copy to the CPU")
            return tensor.held.to(**options, copy=True)
        self.note_received(tensor, non_blocking=non_blocking)
        return OnGPU(tensor.detach().to(**options, copy=True))


class Moment:
    """A moment of the GPU's stream, as ``torch.cuda.Event``."""

    def __init__(self, *, enable_timing: bool) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: Moment) -> float:
        return 1000 * (end._at - self._at)


def by_device(*args: Any) -> dict[tuple[Any, ...], Any]:
    """Do what torch does in C++, where tensors of the pretended GPU are the CPU's."""
    groups = _group_tensors(*args)
    return {(CUDA if isinstance(group[0][0][0], OnGPU) else key[0], *key[1:]): group for key, group in groups.items()}


_group_tensors = torch._C._group_tensors_by_device_and_dtype


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Pretend that this machine has a GPU."""
    PretendedGPU.current = gpu = PretendedGPU()
    size = 2**34
    instead: dict[str, Any] = {
        "torch._C._group_tensors_by_device_and_dtype": by_device,
        "torch.accelerator.current_accelerator": lambda *args, **kwargs: None,
        "torch.accelerator.is_available": lambda: True,
        "torch.amp.grad_scaler.torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.backends.cudnn.version": lambda: None,
        "torch.cuda.Event": Moment,
        "torch.cuda.default_generators": (torch.default_generator,),
        "torch.cuda.get_device_name": lambda device: "a pretended GPU",
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.mem_get_info": lambda device: (size, size),
        "torch.cuda.memory_allocated": lambda device: 0,
        "torch.cuda.memory_reserved": lambda device: 0,
        "torch.cuda.synchronize": lambda *args: gpu.note_wait("synchronize"),
    }
    with contextlib.ExitStack() as stack:
        for name, value in instead.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(gpu)
        yield gpu

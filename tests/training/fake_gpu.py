"""A GPU that need not be there: fake tensors, which have its device, a shape and a type, and no content.

Operators on them check what they always check first, such as that all their tensors are on one device; and wherever the
host would wait for the GPU, there is nothing that it could be told, so that it can be counted.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmoe_rec import devices
from mmoe_rec.model import products

CUDA = torch.device("cuda", 0)
PACKAGE = Path(devices.__file__).parent
# Operators whose result has as many elements as the host is told; fake tensors of a GPU refuse them themselves.
COUNTED = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "is_nonzero",
    "equal",
)


class Waits:
    """Where the host waits for the GPU: (file and function of this package, what it calls), in the order of calls.

    backward: stands in for the backward pass, which autograd refuses without a GPU.
    """

    def __init__(self, backward: Callable[[Tensor], None] | None = None) -> None:
        self.found: list[tuple[str, str]] = []
        self.backward = backward

    def note(self, what: str) -> None:
        """Something waits now."""
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        places = [f"{Path(frame.filename).relative_to(PACKAGE)} {frame.name}" for frame in frames]
        self.found.append((places[-1] if places else "elsewhere", what))

    @contextlib.contextmanager
    def watching(self) -> "Iterator[Waits]":
        """Within the block."""
        with _Functions(self), _Operators(self):
            yield self


class _Functions(TorchFunctionMode):
    """What can be seen in calls of Python's functions alone."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and args[0].is_cuda:
            self.waits.note("tolist")
            return [0.0] * args[0].numel()
        if func is Tensor.backward and self.waits.backward is not None:
            return self.waits.backward(args[0])
        result = func(*args, **kwargs)
        made = func in (torch.tensor, torch.as_tensor, torch.scalar_tensor, Tensor.new_tensor)
        if made and isinstance(result, Tensor) and result.is_cuda:
            self.waits.note("tensor from the host")
        return result


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in args)
        if name in ("_local_scalar_dense", "item") and isinstance(args[0], FakeTensor):
            if on_gpu:
                self.waits.note("item")
            return 1
        if name in COUNTED and on_gpu:
            self.waits.note(name)
        if name == "index" and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]):
            self.waits.note("index by bool")
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            waits = not kwargs.get("non_blocking", False)
            if source.is_cuda and not result.is_cuda:
                self.waits.note("copy to the host")
            elif waits and result.is_cuda and not source.is_cuda:
                self.waits.note("copy from the host")
        return result


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Within the block, new tensors are fake, and a GPU of compute capability 9 seems to be there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(products, "_capability", lambda device: (9, 0))
    monkeypatch.delattr(FakeTensor, "tolist")  # which reads one number after the other
    devices.constant.cache_clear()
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        devices.constant.cache_clear()  # what it keeps is fake


def on_gpu(model: nn.Module) -> None:
    """Replaces a model's weights and buffers by fake ones on the GPU."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=CUDA)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))

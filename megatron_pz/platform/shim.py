"""What stock Megatron-Core asks of CUDA, answered on a machine without it.

The shim is the table `PATCHES`: target, replacement, reason, versions of megatron-core, and a probe that fails while
the target is stock and passes once it is replaced; a test runs each both ways. `install()` is process-wide, idempotent
and meant for the CPU only; it applies the table of `engineless` too, which a GPU without Transformer Engine shares.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils._device

from megatron_pz.platform import engineless, uneven
from megatron_pz.platform.patch import Patch, patches_of
from megatron_pz.platform.streams import Event, Stream

CPU = torch.device("cpu")
FACTORIES = tuple("zeros ones empty full tensor arange rand randn zeros_like ones_like empty_like".split())


_STREAM: Any = Stream()


def _constant(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """A replacement function that returns `value` whatever it is given."""
    return lambda stock: lambda *args, **kwargs: value


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _on_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that takes `device="cuda"` for the CPU and leaves out `pin_memory`."""

    @functools.wraps(stock)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return stock(*args, **kwargs)

    return factory


def _to_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to` that takes CUDA for the CPU."""

    @functools.wraps(stock)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return stock(self, *(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    return to


def _cuda_type_for_optimizers(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type` that tells Megatron's optimizers what they compare with: `torch.cuda.FloatTensor` and kin."""

    @functools.wraps(stock)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, *args, **kwargs)
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(found, str) and asker.startswith("megatron.core.optimizer"):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    return type_


def _numpy_splits(stock: Any) -> Callable[..., Any]:
    """`maybe_move_tensor_to_cpu` that makes numpy splits of CPU tensors too."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    return move


def _probe_rng_state() -> None:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state(random._get_cuda_rng_state(clone=True, graph_safe=True))


def _probe_set_rng_state() -> None:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state(torch.get_rng_state(), graph_safe=False)
    # Stock queues the call for the moment when CUDA starts, and returns: nothing was set.
    if torch.cuda.current_device() != CPU:
        raise RuntimeError("the state was not set")


def _probe_splits() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    if not isinstance(token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(1), as_numpy=True), np.ndarray):
        raise TypeError("splits stay tensors")


def _probe_type() -> None:
    scope: dict[str, Any] = {"__name__": "megatron.core.optimizer.probe", "tensor": torch.ones(1)}
    exec("found = tensor.type()", scope)  # as if an optimizer module asked
    if scope["found"] != "torch.cuda.FloatTensor":
        raise TypeError(scope["found"])


def _probe_stream() -> None:
    if torch.cuda.Stream is not Stream:
        torch.cuda.Stream()


def _probe_event() -> None:
    torch.cuda.Event(enable_timing=True).record()


def _probe_inert(name: str) -> Callable[[], object]:
    """A probe for functions that are silent or harmless on some builds: replaced or not is all that can be seen."""

    def probe() -> None:
        if "shim" not in getattr(functools.reduce(getattr, name.split("."), torch.cuda), "__module__", ""):
            raise RuntimeError(f"torch.cuda.{name} is stock")

    return probe


def _torch_patches() -> Iterator[Patch]:
    c = torch.cuda
    yield Patch("torch.cuda:current_device", _constant(CPU), "device= of every buffer", lambda: c.current_device())
    yield Patch("torch.cuda:synchronize", _constant(None), "schedules.py, timers", lambda: c.synchronize())
    yield Patch("torch.cuda:empty_cache", _constant(None), "distrib_optimizer.py", _probe_inert("empty_cache"))
    yield Patch("torch.cuda:Stream", lambda stock: Stream, "token_dispatcher.py:445", _probe_stream)
    yield Patch("torch.cuda:Event", lambda stock: Event, "token_dispatcher.py:871", _probe_event)
    yield Patch("torch.cuda:current_stream", _constant(_STREAM), "param_and_grad_buffer.py", lambda: c.current_stream())
    yield Patch("torch.cuda:default_stream", _constant(_STREAM), "token_dispatcher.py", lambda: c.default_stream())
    yield Patch(
        "torch.cuda:stream",
        lambda stock: lambda stream=None: contextlib.nullcontext(),
        "token_dispatcher.py:873",
        lambda: c.stream(c.current_stream()).__enter__(),
    )
    get_state = lambda stock: lambda *args, **kwargs: torch.random.get_rng_state()  # noqa: E731
    yield Patch("torch.cuda:get_rng_state", get_state, "tensor_parallel/random.py:238", lambda: c.get_rng_state())
    yield Patch("torch.cuda.random:get_rng_state", get_state, "random.py:50", lambda: c.random.get_rng_state())
    yield Patch(
        "torch.cuda:set_rng_state",
        lambda stock: lambda state, *args, **kwargs: torch.random.set_rng_state(state),
        "tensor_parallel/random.py",
        _probe_inert("set_rng_state"),
    )
    yield Patch(
        "torch.cuda:manual_seed",
        lambda stock: lambda seed: torch.random.default_generator.manual_seed(int(seed)),
        "tensor_parallel/random.py:237,422",
        _probe_inert("manual_seed"),
    )
    for name in ("nvtx.range_push", "nvtx.range_pop"):  # torch's builds for CUDA have them without a device too
        owner, _, function = name.partition(".")
        yield Patch(f"torch.cuda.{owner}:{function}", _constant(None), "utils.py, attention.py", _probe_inert(name))
    yield Patch(
        "torch:Tensor.cuda", lambda stock: lambda self, *a, **k: self, "p2p, schedules", lambda: torch.ones(1).cuda()
    )
    yield Patch(
        "torch:Tensor.record_stream", _constant(None), "token_dispatcher", lambda: torch.ones(1).record_stream(_STREAM)
    )
    yield Patch("torch:Tensor.to", _to_cpu, "dist_checkpointing, utils.py:1207", lambda: torch.ones(1).to("cuda"))
    yield Patch("torch:Tensor.type", _cuda_type_for_optimizers, "optimizer.py:671, clip_grads.py:167", _probe_type)
    for name in FACTORIES:
        args = {"full": ((1,), 0.0), "tensor": (0,)}.get(name, (torch.ones(1),) if name.endswith("_like") else (1,))
        probe = functools.partial(_make, name, args)
        yield Patch(f"torch:{name}", _on_cpu, 'device="cuda" literals (schedules.py:596, transformer/utils.py)', probe)


def _make(name: str, args: tuple[Any, ...]) -> torch.Tensor:
    return getattr(torch, name)(*args, device="cuda")


def _megatron_patches() -> Iterator[Patch]:
    yield Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        lambda stock: lambda device="cuda", clone=False, graph_safe=False: torch.random.get_rng_state(),
        "the tracker's fork() reads the device generator",
        _probe_rng_state,
    )
    yield Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        lambda stock: lambda state, device=-1, graph_safe=False: torch.random.set_rng_state(state),
        "the tracker's fork() sets the device generator",
        _probe_set_rng_state,
    )
    yield Patch(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        _numpy_splits,
        "splits become numpy only if is_cuda; all_to_all_single refuses tensors",
        _probe_splits,
    )
    yield Patch(
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        uneven.gather,
        "token_dispatcher.py: tokens of expert-tensor-parallel ranks; gloo takes equal pieces only",
        uneven.probe,
    )


PATCHES: tuple[Patch, ...] = (*_torch_patches(), *_megatron_patches())
_installed = False


def install() -> None:
    """Replace every target of `PATCHES` that the installed megatron-core needs. A second call does nothing."""
    global _installed
    if _installed:
        return
    # torch caches its factories for `with torch.device(...)` on first use; it must see the stock ones.
    torch.utils._device._device_constructors()
    # Those of torch first: importing megatron may already ask for CUDA.
    for patch in sorted(patches_of(PATCHES), key=lambda patch: patch.target.startswith("megatron")):
        patch.apply()
    engineless.install()
    _installed = True


def is_installed() -> bool:
    """Whether `install` has run in this process."""
    return _installed

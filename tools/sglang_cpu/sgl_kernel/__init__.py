"""Stands for SGLang's kernel package on a CPU (README.md in tools/sglang_cpu of megatron_pz).

With its CPU engine on, SGLang's KV cache imports a name from here when it is loaded. Every name can be imported; a
call fails with the kernel's name. SGLang takes its plain torch paths where the processor lacks AMX operators in torch,
so that Qwen3, Qwen3-MoE and Llama in float32 call no kernel.
"""

import torch


class Runtime:
    """In place of the CUDA runtime, of which there is none: every call does nothing and answers 0, which is success.

    The capture of routed experts has the runtime pin its host buffer, which on a CPU needs no pinning.
    """

    def __getattr__(self, name):
        return lambda *arguments: 0


if not torch.cuda.is_available():
    torch.cuda.cudart = Runtime


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)  # Python asks for `__path__` and others; those are not kernels

    def kernel(*arguments, **settings):
        raise NotImplementedError(f"kernel {name} of sgl_kernel is not to be had on this CPU")

    return kernel

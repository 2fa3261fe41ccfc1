"""Functions compile when they are called, not when they are decorated (platform/quick_imports.py)."""

import gc
import subprocess
import sys

import torch

from megatron_pz.platform.quick_imports import quick_imports


def test_a_function_is_compiled_when_it_is_first_called_and_once():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    stock = torch.compile
    with quick_imports():
        assert not gc.isenabled()

        @torch.compile(backend=backend)
        def inner(x):
            """Adds."""
            return x + 1

        outer = torch.compile(lambda x: inner(x) * 2, backend=backend, fullgraph=True)
    assert torch.compile is stock and gc.isenabled()
    assert not seen and inner.__doc__ == "Adds."
    for _ in range(2):
        assert outer(torch.ones(2)).tolist() == [4.0, 4.0]
    assert len(seen) == 1, "inner is a part of outer"
    assert inner(torch.zeros(3)).tolist() == [1.0] * 3
    assert len(seen) == 2


def test_megatron_is_imported_without_the_compiler():
    code = """
import sys
from megatron_pz.platform.quick_imports import quick_imports
with quick_imports():
    from megatron_pz.platform.select import select_platform
    select_platform("cpu")
    import megatron_pz.checkpoint.convert
print(sorted({"megatron.core", "torch._dynamo", "torch._inductor.compile_fx"} & sys.modules.keys()))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "['megatron.core']\n"

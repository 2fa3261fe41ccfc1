"""The fused kernels compiled for Hopper (sm_90) by Triton and ptxas, for which no GPU is needed; never run.

Prints as JSON, for each kernel, dtype and tiles: shared memory in bytes, whether tensor cores' wgmma is used, and the
bytes that ptxas spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_pz.models.kernels import fused_log_probs as kernels

HOPPER = GPUTarget("cuda", 90, 32)
SCALARS = {"num_tokens": "i32", "num_rows": "i32", "hidden_stride": "i32", "weight_stride": "i32", "is_small": "i32"}
SCALARS |= {"inverse_temperature": "fp32", "first_row": "i32"}
FORWARD = {"hidden": "*{}", "weight": "*{}", "places": "*i64", "found": "*fp32"}
BACKWARD = {
    "hidden": "*{}",
    "weight": "*{}",
    "places": "*i64",
    "log_normalizer": "*fp32",
    "grad": "*fp32",
    "grad_logits": "*{}",
}


def compiled(kernel, pointers, dtype, tiles, constants, options):
    function = kernel.fn
    names = function.arg_names
    types = {name: kind.format(dtype) for name, kind in pointers.items()} | SCALARS
    constants = constants | tiles
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [*pointers, "hidden_stride", "weight_stride"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(
        function, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    done = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(done.asm["ptx"], encoding="utf-8")
        told = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", path, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill stores", told))
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", told))
    return {
        "shared": done.metadata.shared,
        "wgmma": "wgmma" in done.asm["ptx"],
        "spilled": spilled,
        "registers": registers,
    }


def main(every):
    results = {}
    for dtype in ("bf16", "fp32"):
        configs = kernels._forward_kernel.configs
        chosen = configs if every else [configs[0] if dtype == "bf16" else configs[-1]]
        for config in chosen:
            tiles, options = dict(config.kwargs), {"num_warps": config.num_warps, "num_stages": config.num_stages}
            name = f"{dtype} {'x'.join(map(str, tiles.values()))} {config.num_warps} warps {config.num_stages} stages"
            for kind, kernel, pointers, more in (
                ("forward", kernels._forward_kernel, FORWARD, {"SPLIT": kernels.SPLIT_ROWS}),
                ("gradient", kernels._gradient_kernel, BACKWARD, {}),
            ):
                results[f"{kind} {name}"] = compiled(kernel, pointers, dtype, tiles, {"H": 2560} | more, options)
    print(json.dumps(results))


if __name__ == "__main__":
    main("--every" in sys.argv)

"""In SGLang's environment: its own FP8 model, built on a CPU, takes buckets as a server does, and its tensors are written out.

python fp8_reader.py CONFIG.json BUCKETS OUT.safetensors      BUCKETS: a line of base64 a bucket, as requests carry them

No kernel is called (SGLang has none of FP8 for this CPU): names, shapes, dtypes and places in fused weights are what is seen.
"""

import base64
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


def model(folder, quantization):
    """SGLang's class for the folder's config.json, with FP8 parameters that hold nothing yet."""
    import torch
    from sglang.srt import runtime_context, server_args
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from transformers import AutoConfig

    given = server_args.ServerArgs(model_path=str(folder), device="cpu", attention_backend="torch_native")
    runtime_context.publish(given, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    parallel_state.init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/rendezvous"
    )
    parallel_state.initialize_model_parallel()
    dp_attention.initialize_dp_attention(given)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "qwen3_moe":
        from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM as Model
    else:
        from sglang.srt.models.qwen3 import Qwen3ForCausalLM as Model
    torch.set_default_dtype(torch.bfloat16)
    return Model(config, quant_config=Fp8Config.from_config(quantization))


def main(folder, quantization, buckets, out):
    import torch
    from safetensors.torch import save_file
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.utils.common import SafeUnpickler

    taking = model(folder, json.loads(quantization))
    updater = SimpleNamespace(get_model=lambda: taking)
    import io

    for line in Path(buckets).read_text().splitlines():
        bucket = SafeUnpickler(io.BytesIO(base64.b64decode(line))).load()
        done, told = WeightUpdater._update_weights_from_flattened_bucket(updater, bucket)
        assert done, told
    found = {name: tensor.detach().clone().contiguous() for name, tensor in taking.named_parameters()}
    torch.set_default_dtype(torch.float32)
    save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

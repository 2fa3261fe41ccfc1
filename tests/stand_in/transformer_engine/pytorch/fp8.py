"""Where Megatron-Core 0.16 looks for the FP8 context."""

from transformer_engine.pytorch import fp8_autocast, fp8_model_init

__all__ = ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False

    @staticmethod
    def reset():
        pass

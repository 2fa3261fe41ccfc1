"""What would fail later, found before a worker or a queue is taken: `python -m megatron_pz doctor CONFIG.toml`."""

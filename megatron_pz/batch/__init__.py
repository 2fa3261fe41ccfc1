"""From samples to what the trainer takes: packing into micro-batches, balance over ranks, context-parallel cuts. No torch."""

"""What samples: ids and parameters in, ids and log-probs out. `embedded` is the trainer's own model, `sglang` real servers."""

"""Generation inside the trainer's own processes, with its weights: the reference of every other engine.

requests -> replicas (shares) -> batch.decode: prefill unique prompts, then rows token by token -> responses
"""

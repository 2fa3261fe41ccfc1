"""SGLang servers as the engine: their processes, the requests to them, and what happens when one is lost.

No torch, Megatron or SGLang is imported here: a server is another process, in an environment of its own, spoken to by HTTP.
"""

"""Memory, traffic and time of a layout, from the trainer's own model built without memory."""

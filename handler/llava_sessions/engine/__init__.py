"""The engine process: the model, the KV caches and the schedule. The only package that imports torch."""

"""Number formats of weights and KV caches."""

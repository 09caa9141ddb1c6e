"""Packing, serving and shipping the model archive. Speaks to the handler over HTTP only; imports nothing from it."""

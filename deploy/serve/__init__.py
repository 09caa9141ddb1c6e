"""Serve a packed model on this machine: TorchServe behind HAProxy, both restarted when they die."""

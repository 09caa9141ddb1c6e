"""The demo: a picture chat with a real TorchServe. Speaks the wire protocol only."""

"""The demo: a picture chat with a real TorchServe over HTTP."""

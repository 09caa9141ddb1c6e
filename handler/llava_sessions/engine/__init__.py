"""The session engine: everything that imports torch.

It speaks token ids, pixel arrays and session ids; it must not know TorchServe, payloads or HTTP.
"""

"""The checkpoint's tokenizer, chat template and processor. Used by the worker and the engine process; no torch."""

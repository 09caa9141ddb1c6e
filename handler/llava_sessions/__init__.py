"""LLaVA Sessions: multi-turn picture chats whose pictures and KV cache stay on the device between turns.

The package travels in the model archive beside `llava_handler.py`. Nothing in it imports `ts`; only `engine/` imports
torch.
"""

"""The web chat: a static page, and a small server that talks to LLaVA Sessions through the Python client."""

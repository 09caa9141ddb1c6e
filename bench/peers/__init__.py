"""Comparison with vLLM and OpenVINO GenAI on a CPU: the same checkpoint, pictures, questions and answer lengths.

`python -m bench.peers` installs both peers into environments of their own, builds one checkpoint for all sides, and
measures six sides round by round. This module imports nothing but the standard library, because the peers'
environments run parts of this package.
"""

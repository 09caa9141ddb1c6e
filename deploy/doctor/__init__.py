"""Check this machine, a checkpoint and a configuration before serving, and print what to do about each problem.

`llava-deploy doctor`, `make doctor` and `python -m deploy.doctor` run it. It needs no AWS account.
"""

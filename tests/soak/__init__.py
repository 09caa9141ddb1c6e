"""Long fault tests on the real server: `make soak`, or `python -m tests.soak NAME --help`. CI runs short ones
(tests/server/test_faults.py); these take minutes each and leave their figures in bench/results/soak_NAME.json.
"""

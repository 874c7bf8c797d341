"""What the plugin costs, each figure beside its limit and what else there is, in one run.

    make bench                          # everything
    .venv/bin/python -m benchmarks channels --rounds 20

Contenders take turns, round by round, so that whatever else the machine does hits all of them.
"""

"""Does adapting help, when, and at what cost: tasks x methods x lengths x seeds against a running service.

    python3 -m refocus.evaluate run --tasks ledger --lengths 1000 --methods in-context,qttt --out results/
    python3 -m refocus.evaluate report results/

docs/evaluation.md of the repository says what every task, method and score is.
"""

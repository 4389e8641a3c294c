"""Tasks by name."""
from __future__ import annotations

from collections.abc import Callable

from refocus.evaluate.item import Item
from refocus.evaluate.tasks import Settings, bank, bugs, hops, ledger, noisy, ruler

TASKS: dict[str, Callable[[int, int, Settings], Item]] = {
    "ledger": ledger.recall,
    "symbols": ledger.symbolic,
    "symbols-later": ledger.later,
    "bank": bank.transaction_log,
    "bugs": bugs.localise,
    "hops": hops.multi_hop,
    "noisy": noisy.messy,
    **{name: ruler.niah(name) for name in ruler.NIAH_TASKS},
    "vt": ruler.variable_tracking,
    "cwe": ruler.common_words,
    "fwe": ruler.frequent_words,
}

ABOUT = {
    "ledger": "associative recall: what an account of a ledger holds",
    "symbols": "the same as token ids, for the small model that comes with Refocus",
    "symbols-later": "the values that come back in the 1,536 tokens behind such a ledger, all read at once",
    "bank": "a transaction log with one anomaly; kind and place",
    "bugs": "the line of a bug in real Python source code",
    "hops": "who reports to whom, over two to four steps",
    "noisy": "facts in messy logs, several languages and scanning errors",
    **{name: f"RULER: needles in {ruler.NIAH_TASKS[name][0]}" for name in ruler.NIAH_TASKS},
    "vt": "RULER: variable tracking",
    "cwe": "RULER: common words",
    "fwe": "RULER: frequent coded words",
}

"""A campaign of faults against whole federations: `python -m tests.chaos [--only WORD] [--list] [--out FILE]`.

Each case is a run of a real server and three real clients with real ledgers, over mutual TLS, to which one thing
happens at a named moment. `cases` is the table; `federation` runs a case; `score` judges it. pytest collects none of
this; `tests/test_chaos.py` runs a sample.
"""

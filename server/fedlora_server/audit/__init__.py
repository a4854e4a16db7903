"""The audit log: an append-only, hash-chained file in a run's folder of who joined, uploaded, and was averaged.

    log      writes the file while a run lasts
    chain    the lines, their hashes, and what is wrong with a file
    compare  holds the file against the clients' signed privacy reports
    command  fedlora-server audit-log
"""

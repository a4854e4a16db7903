"""The coordinator's certificates: an authority for those who have none, and the list of the clients that are allowed.

    fedlora-server pki init|sign|invite|renew|revoke|list

An outside authority is as good: the list of allowed clients is by the fingerprint of their public keys.
"""

"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else of any of them.

The protocol is that of Bonawitz et al. (CCS 2017), over the complete graph of a roster that the clients check. Each
client adds its share of the privacy noise to its own vector, so that the sum carries what one central mechanism would.
This package computes; it knows neither sockets nor training.

    integers     the ring in which vectors are added, and how real values get there and back
    rounding     the noise on the grid
    shamir       secrets of which a threshold of members can recover what fewer learn nothing of
    masks        keys that two members agree on, and the masks drawn from them
    statements   what is signed, and what each signature is bound to
    roster       who is in, checked by each member
    member       a client's part: packages, upload, survivors, reveal
    collector    the server's part: cohort, sum of masked uploads, unmasking
    guarantee    what a client's records are promised towards whoever sees the sums alone
"""

"""Simulations of whole federations on one machine, audits of their privacy, and attacks on them."""

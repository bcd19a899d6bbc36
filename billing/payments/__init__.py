"""Money that comes in and goes back through a payment provider: what was asked for, what was seen, what follows.

Knows no HTTP and no Stripe library: `deployments.payments` asks Stripe and hands in what it saw as plain values.
"""

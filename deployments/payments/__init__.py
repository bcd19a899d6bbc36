"""Payments as they run: Stripe asked and listened to, and what it says handed to the ledger.

`gateway` is the only module that knows Stripe's library; `service` is what happens to a top-up from the request to the
balance; `sweeps` heals what was missed; `actor` runs them, one per cluster; `desk` is what the routes talk to.
"""

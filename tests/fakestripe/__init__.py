"""A Stripe to test against: a real HTTP server with its own state, signed webhooks, a test clock and faults on demand.

It speaks the part of the API that this service uses, in the version of the pinned library, and refuses what that
library's own parameter types do not know. It never runs in production: nothing outside `tests/` imports it.
"""

"""What runs on Ray, speaking in messages: ingress, scheduler, replica, ledger actor. Knows no HTTP."""

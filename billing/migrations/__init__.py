"""The only way the ledger's tables are made. Revisions are history: never edited once released."""

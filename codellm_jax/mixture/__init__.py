"""The training data: schedules, the order of rows, the rows, batches, and the ledger."""

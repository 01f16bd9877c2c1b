"""What is trained on: schedules, the order of rows, the rows themselves, batches, and the ledger."""

"""A run in TensorBoard, Weights & Biases and MLflow: configuration, records, ledger, scores, report."""

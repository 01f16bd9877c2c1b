"""Reports a run to TensorBoard, Weights & Biases and MLflow: configuration, records, ledger, scores, report."""

"""What operators see: `metrics` names every metric, `record` turns what happened into them, `logs` writes lines."""

"""What operators see: `metrics` names every metric once, `record` turns what happened into them, `logs` writes lines."""

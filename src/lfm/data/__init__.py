"""Files → typed records → batches."""

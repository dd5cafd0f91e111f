"""What happens to a call of `tinkex.training_client`: checks, numbers, batches, losses."""

"""What happens to a call of `tinkex.sampling_client`: checks, gates, work, streams."""

"""Downloading checkpoints: resumable transfers, and safe unpacking of archives."""

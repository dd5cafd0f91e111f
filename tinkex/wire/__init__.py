"""How bulk values travel: the JSON and protobuf dialects, and the cutting of batches.

No I/O, no threads.  ``codec`` holds the interface and the choice by content type.
"""

"""The JSON and protobuf encodings of bulk values, and the splitting of batches.

No I/O, no threads.  ``codec`` defines the interface and chooses an encoding by content type.
"""

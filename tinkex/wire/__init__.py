"""The JSON and protobuf encodings of bulk values, and the splitting of batches.

No I/O, no threads.  ``codec`` holds the interface and the choice by content type.
"""

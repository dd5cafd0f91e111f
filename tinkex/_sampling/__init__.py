"""The requests behind the calls of a sampling client."""

"""The HTTP routes: a class of views per topic, each with a table of its rules."""

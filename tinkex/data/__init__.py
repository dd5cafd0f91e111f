"""Turns files of examples into training data: JSONL, chat templates, datums (docs/data.md).

`open_examples` reads a file; `example_datum` and `preference_data` make datums of its examples.
"""

from tinkex.data.datums import (
    chat_datum as chat_datum,
    completion_datum as completion_datum,
    example_datum as example_datum,
    preference_data as preference_data,
    sampled_datum as sampled_datum,
    text_datum as text_datum,
    weighted_tokens as weighted_tokens,
)
from tinkex.data.examples import (
    Completion as Completion,
    Conversation as Conversation,
    Example as Example,
    Message as Message,
    Preference as Preference,
    Text as Text,
    parse_example as parse_example,
)
from tinkex.data.reader import Examples as Examples, open_examples as open_examples

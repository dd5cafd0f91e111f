"""An OpenAI-compatible endpoint of the embedded server, under ``/v1`` and ``/oai/api/v1``.

See docs/openai.md for what it supports, and how it differs.  Modules, from the bottom up:

- `errors`: errors in OpenAI's form
- `text`: the model's tokenizer and chat template
- `choices`: tokens in, text and log-probabilities out, one choice at a time
- `parameters`: the body of a request, checked
- `samplers`: the samplers behind model names
- `generation`: one request on its way through the scheduler
- `bodies`: responses and chunks as JSON
- `routes`: the HTTP routes
"""

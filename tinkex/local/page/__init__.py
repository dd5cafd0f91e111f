"""The web page of the embedded server, at ``/``: what is going on, and a box to try a prompt.

See docs/page.md.  Modules and files:

- `state`: what the page shows, as JSON
- `routes`: the HTTP routes
- ``index.html``, ``page.css``, ``icon.svg``, and ``*.js``, the scripts in the browser
"""

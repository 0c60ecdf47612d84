"""The HTTP service: `edgelm serve`. Needs the extra `serve`.

A request comes in through `front` (key, size, time, disconnect, log line), is a route's of `tei`,
`openai` or `own`, and reaches its model through `state`, which bounds what is under way.
docs/service.md has the contract.
"""

from __future__ import annotations

"""The environment of whoever started the tests, before they isolate themselves."""

from __future__ import annotations

import os

ENVIRONMENT = dict(os.environ)

"""A request that nobody waits for any more gives back what it holds."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable

from tests.serving.running_server import QUIRE, RunningServer

from quire_client import AsyncClient, Client

PROMPT = "Once upon a time"
LONG = 1800

"""What every test in the Triton language's interpreter needs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter convert float32 to e4m3 as GPUs do.

    By itself it leaves the exponent behind where rounding goes up to a power of two, and knows no numbers
    below the normal ones.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    own, language = interpreter._convert_float, interpreter.tl

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == language.float32 and target == language.float8e4nv:
            wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
            return wide.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == language.float8e4nv and target in (language.float16, language.float32):
            narrow = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(torch.float8_e4m3fn)
            dtype, bits = (
                (torch.float16, np.uint16) if target == language.float16 else (torch.float32, np.uint32)
            )
            return narrow.to(dtype).numpy().view(bits)
        return own(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
